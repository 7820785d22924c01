"""The gated delta rule -> standard ONNX operators, right for any number of tokens.

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = S_t^T q_t / sqrt(Dk)

S is the state `[Dk, Dv]` of one head. Tokens go through in chunks of C = min(T, 64): matrix products within a chunk, a
Scan over the chunks. Source: Yang et al., Gated Delta Networks, https://arxiv.org/abs/2412.06464, with the chunks of
https://arxiv.org/abs/2406.06484, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import Value

DOMAIN, NAME = "cdsurgery", "GatedDeltaRule"
CHUNK = 64  # tokens, as in transformers and fla
_SIZES = (1, 2, 4, 8, 16, 32, CHUNK)  # of blocks: each is made of two of the size before
_END = 2**31 - 1


def expand_delta_rule(model: onnx_ir.Model) -> None:
    """Replace every cdsurgery::GatedDeltaRule of a graph by the operators it stands for, in place.

    Its inputs, all float32: query and key `[B, T, Hk, Dk]` of length 1, where a head serves the next Hv / Hk heads of
    values; value `[B, T, Hv, Dv]`; decay `[B, T, Hv]`, g <= 0; beta `[B, T, Hv]` in [0, 2]; state `[B, Hv, Dk, Dv]`.
    Outputs: `[B, T, Hv, Dv]`, and the state after the last token. T, at least 1, and B are the same for all of them.
    """
    rules = [node for node in model.graph if node.domain == DOMAIN]
    ops = _Operators("delta_rule")
    chunks: _Chunks | None = None
    for rule in rules:
        inputs: list[Any] = list(rule.inputs)
        chunks = chunks or _Chunks(ops, inputs[1])
        outputs = _chunked(ops, chunks, *inputs)
        onnx_ir.convenience.replace_nodes_and_values(model.graph, rule, [rule], ops.take(), rule.outputs, outputs)
    model.opset_imports.pop(DOMAIN, None)


def _chunked(
    ops: _Operators, chunks: _Chunks, query: Value, key: Value, value: Value, decay: Value, beta: Value, state: Value
) -> list[Value]:
    (heads, key_size), (value_heads, value_size) = _sizes(key), _sizes(value)
    groups = value_heads // heads
    tokens = [chunks.cut(ops, tensor, [heads, 1, key_size]) for tensor in (ops.Mul(query, key_size**-0.5), key)]
    tokens.append(chunks.cut(ops, value, [heads, groups, value_size]))
    tokens += [chunks.cut(ops, tensor, [heads, groups, 1]) for tensor in (decay, beta)]
    grouped = ops.Reshape(state, [0, heads, groups, key_size, value_size])
    last, output = ops.scan(_step(ops, chunks), [grouped, *tokens])
    output = ops.Reshape(ops.Transpose(output, perm=[1, 0, 4, 2, 3, 5]), [0, -1, value_heads, value_size])
    return [ops.Slice(output, [0], chunks.length, [1]), ops.Reshape(last, [0, value_heads, key_size, value_size])]


def _sizes(tensor: Value) -> list[int]:
    """Heads and their size; they are the model's, so that every tracer knows them."""
    assert tensor.shape is not None
    return [int(size) for size in tensor.shape[2:]]  # type: ignore[arg-type]  # a name would raise


def _step(outer: _Operators, chunks: _Chunks) -> onnx_ir.Graph:
    """One chunk: the state before and C tokens -> the state after and C outputs, each `[B, Hk, G or 1, .., ..]`."""
    ops = outer.nested()
    inputs = [ops.value() for _ in range(6)]
    state, query, key, value, decay, beta = inputs
    total = ops.CumSum(decay, 3)
    since_start = ops.Exp(total)
    between = ops.Exp(ops.Where(chunks.future, -np.inf, ops.Sub(total, ops.transposed(total))))
    alike = ops.Mul(ops.Mul(beta, ops.MatMul(key, ops.transposed(key))), between)
    inverse = _unit_inverse(ops, alike, chunks)
    # What each token writes, once what the state and the tokens before it already say is taken off.
    known = ops.Mul(since_start, ops.MatMul(key, state))
    written = ops.MatMul(inverse, ops.Mul(beta, ops.Sub(value, known)))
    from_state = ops.Mul(since_start, ops.MatMul(query, state))
    from_chunk = ops.MatMul(ops.Mul(ops.MatMul(query, ops.transposed(key)), between), written)
    end = ops.Slice(total, [-1], [_END], [3])
    left = ops.Mul(ops.Exp(end), state)
    added = ops.MatMul(ops.transposed(ops.Mul(ops.Exp(ops.Sub(end, total)), key)), written)
    outputs = [ops.Add(left, added), ops.Add(from_state, from_chunk)]
    return onnx_ir.Graph(inputs, outputs, nodes=ops.take(), name=ops.value().name)


def _unit_inverse(ops: _Operators, matrix: Value, chunks: _Chunks) -> Value:
    """The inverse of I + (strictly lower part of `matrix [.., C, C]`) by block elimination.

    The inverses of two neighbouring diagonal blocks give that of the block they make: T <- T - T offdiagonal T. Every
    factor is a part of the result. The usual product of I + (-A)^(2^i) goes through powers of A instead, which reach
    1e18 when keys are alike, while the inverse stays around 1.
    """
    first, *rest = (ops.Where(pair, matrix, 0.0) for pair in chunks.pairs)
    inverse = ops.Sub(chunks.identity, first)
    for offdiagonal in rest:
        inverse = ops.Sub(inverse, ops.MatMul(ops.MatMul(inverse, offdiagonal), inverse))
    return inverse


class _Chunks:
    """What all layers share: how tokens are cut, and masks within a chunk.

    Attributes:
        length: `[1]` int64, the tokens.
        future: `[C, C]` bool, column after row.
        identity: `[C, C]` float32.
        pairs: for blocks of 1, 2, 4 .. 32 tokens, `[C, C]` bool: row in the second of a pair of blocks, column in its
            first.
    """

    def __init__(self, ops: _Operators, key: Value) -> None:
        self.length = ops.Shape(key, start=1, end=2)
        self._chunk = ops.Min(self.length, [CHUNK])
        self._padding = ops.Concat([0], ops.Mod(ops.Neg(self.length), self._chunk), axis=0)
        self._shapes: dict[tuple[int, ...], Value] = {}
        column = ops.Unsqueeze(ops.Range(0, ops.Squeeze(self._chunk), 1), [0])
        row = ops.Reshape(column, [-1, 1])
        self.future = ops.Less(row, column)
        self.identity = ops.Cast(ops.Equal(row, column), to=onnx_ir.DataType.FLOAT.value)
        blocks = [(ops.Div(row, [size]), ops.Div(column, [size])) for size in _SIZES]
        same = [ops.Equal(*block) for block in blocks]
        self.pairs = [
            ops.And(ops.Greater(*block), together) for block, together in zip(blocks[:-1], same[1:], strict=True)
        ]

    def cut(self, ops: _Operators, tensor: Value, sizes: Sequence[int]) -> Value:
        """`[B, T, ..]` -> `[chunks, B, Hk, G, C, D]`; zeros at the end, rate 0 and decay 1, change no state."""
        key = tuple(sizes)
        if key not in self._shapes:
            self._shapes[key] = ops.Concat([0, -1], self._chunk, sizes, axis=0)
        padded = ops.Pad(tensor, self._padding, None, [1])
        return ops.Transpose(ops.Reshape(padded, self._shapes[key]), perm=[1, 0, 3, 4, 2, 5])


class _Operators(onnx_ir.tape.Tape):
    """A tape on which `ops.MatMul(a, b)` writes a node and returns its value; numbers become constants, each once."""

    def __init__(self, prefix: str, outer: _Operators | None = None) -> None:
        super().__init__()
        self._prefix, self._outer, self._count, self._taken = prefix, outer, 0, 0
        self._constants: dict[tuple[Any, ...], Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Value]:
        def write(*inputs: Any, **attributes: Any) -> Value:
            values = [x if x is None or isinstance(x, Value) else self._constant(x) for x in inputs]
            return self.op(op_type, values, attributes, output=self.value())

        return write

    def value(self) -> Value:
        """A new value with a name of its own."""
        self._count += 1
        return Value(name=f"{self._prefix}_{self._count}")

    def nested(self) -> _Operators:
        """A tape for the body of a Scan, which reads its constants from outside."""
        return _Operators(str(self.value().name), self)

    def take(self) -> Sequence[onnx_ir.Node]:
        """The nodes written since the last time."""
        nodes = self.nodes[self._taken :]
        self._taken = len(self.nodes)
        return nodes

    def scan(self, body: onnx_ir.Graph, inputs: Sequence[Value]) -> Sequence[Value]:
        """One state and all other inputs cut along axis 0 -> the last state, and the outputs along a new axis 0."""
        attributes: dict[str, Any] = {"body": body, "num_scan_inputs": len(inputs) - 1}
        return self.op_multi_out("Scan", inputs, attributes, outputs=[self.value(), self.value()])

    def transposed(self, tensor: Value) -> Value:
        """The last two of five axes exchanged."""
        return self.Transpose(tensor, perm=[0, 1, 2, 4, 3])

    def _constant(self, number: Any) -> Value:
        if self._outer is not None:
            return self._outer._constant(number)
        array = np.asarray(number)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.Constant(value=onnx_ir.tensor(array))
        return self._constants[key]
