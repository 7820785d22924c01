"""`logits` -> the tail: the nodes that lead from the residual stream to them, found backwards and copied onto rows.

Everything in a tail treats each row for itself (`rowwise`). So it may be applied to any rows `[N, D]`, and what only
moves rows (reshapes, the choice of the last token) is left out of the copy. What the copies read that is constant, they
share: no weight is there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir

from cdsurgery.export.graft.flow import CASTS, Flow, describe, refuse
from cdsurgery.export.graft.rowwise import NORMS, PROJECTIONS, ROW_MOVES, SKIP_NORMS, check_rowwise

# Of norms that add first, the output that is the sum, and the input that is a bias, which is part of it:
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
SKIP_SUM = 3
BIAS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}


@dataclass(frozen=True)
class Tail:
    """How states become logits.

    Attributes:
        nodes: in the order of the graph; the last makes `logits`.
        entries: what the nodes read of the residual stream: x^(L), or, where a norm adds first, its two summands.
        logits: the graph's own, before the surgery.
    """

    nodes: tuple[onnx_ir.Node, ...]
    entries: tuple[onnx_ir.Value, ...]
    logits: onnx_ir.Value

    @property
    def skip_norm(self) -> onnx_ir.Node | None:
        """The norm that adds first, if the tail begins with one."""
        return self.nodes[0] if self.nodes[0].op_type in SKIP_NORMS else None

    def copy_before(
        self, place: onnx_ir.Node, rows: Sequence[onnx_ir.Value], flow: Flow, prefix: str, *, summed: bool
    ) -> onnx_ir.Value:
        """Copy the tail into the graph, applied to rows.

        Args:
            place: the node before which the copies go.
            rows: `[N, D]` for each entry.
            flow: of the graph.
            prefix: of the names of the copies.
            summed: a norm that adds first must not add its bias, because the rows are sums that have it.

        Returns:
            logits `[N, V]`.
        """
        values = dict(zip(self.entries, rows, strict=True))
        for node in self.nodes:
            if node.op_type in ROW_MOVES:
                values[node.outputs[0]] = values[flow.varying_inputs(node)[0]]
                continue
            inputs = [value if value is None else values.get(value, value) for value in node.inputs]
            if summed and node is self.skip_norm:
                inputs = inputs[: BIAS[node.op_type]]
            inputs = [_own_weight(place, value, prefix) if _is_dequantized(value) else value for value in inputs]
            values[node.outputs[0]] = _copy_before(place, node, inputs, prefix)
        return values[self.logits]

    def replace_entries_(self, state: onnx_ir.Value, prefix: str) -> None:
        """Let the tail itself, in place, read another state."""
        replaced = dict.fromkeys(self.entries, state)
        norm = self.skip_norm
        if norm is not None:
            assert norm.graph is not None
            zeros = onnx_ir.Node("", "Sub", [state, state], name=f"{prefix}zeros")
            zeros.outputs[0].name = f"{prefix}zeros"
            norm.graph.insert_before(norm, zeros)
            replaced[self.entries[1]] = zeros.outputs[0]
            for index in range(BIAS[norm.op_type], len(norm.inputs)):
                norm.replace_input_with(index, None)
        for node in self.nodes:
            for index, value in enumerate(node.inputs):
                if value in replaced:
                    node.replace_input_with(index, replaced[value])


def _is_dequantized(value: onnx_ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return (
        node is not None
        and node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and (node.inputs[0].is_initializer())
    )


def _own_weight(place: onnx_ir.Node, value: onnx_ir.Value | None, prefix: str) -> onnx_ir.Value:
    """A dequantised weight again, from tensors of its own.

    ONNX Runtime fuses a DequantizeLinear and a product only where nothing else reads its weight and scales, and merges
    two nodes that read the same.
    """
    node = None if value is None else value.producer()
    assert node is not None and place.graph is not None
    inputs = list(node.inputs)
    for index, given in enumerate(inputs):
        if given is not None and given.is_initializer():
            name, tensor = f"{prefix}{given.name}", given.const_value
            inputs[index] = own = onnx_ir.Value(name=name, shape=given.shape, type=given.type, const_value=tensor)
            place.graph.register_initializer(own)
    return _copy_before(place, node, inputs, prefix)


def _copy_before(
    place: onnx_ir.Node, node: onnx_ir.Node, inputs: list[onnx_ir.Value | None], prefix: str
) -> onnx_ir.Value:
    """The first output of a copy of `node` that reads `inputs`."""
    assert place.graph is not None
    copy = onnx_ir.Node(
        node.domain, node.op_type, inputs, [*node.attributes.values()], num_outputs=1, name=f"{prefix}{node.name}"
    )
    copy.outputs[0].name = f"{prefix}{node.outputs[0].name}"
    place.graph.insert_before(place, copy)
    return copy.outputs[0]


def find_tail(logits: onnx_ir.Value, flow: Flow) -> Tail:
    """Walk backwards from the logits, past the unembedding and the final norm, to the residual stream.

    The open ends of the walk are followed latest first. Where a single one is left behind a norm, and it is a sum of
    two things that vary, all of the logits came through it: that is the residual stream after the last layer.

    Raises:
        UnsupportedModelError: something on the way does not treat every row for itself, or a part is missing.
    """
    nodes: list[onnx_ir.Node] = []
    entries: tuple[onnx_ir.Value, ...]
    open_ = {logits}
    while True:
        value = max(open_, key=flow.order)
        node = value.producer()
        if node is None:
            raise refuse(f"no final norm and unembedding lie between the input {describe(value)} and 'logits'.")
        normed = any(n.op_type in (*NORMS, "ReduceMean") for n in nodes)
        if normed and len(open_) == 1 and is_update(scaled_from(value, flow), flow):
            entries = (value,)
            break
        check_rowwise(node, value, flow)
        nodes.append(node)
        open_ = (open_ - {value}) | set(flow.varying_inputs(node)[: 1 if node.op_type in ROW_MOVES else None])
        if len(open_) > 1 and (strangers := [v for v in open_ if v.producer() is None]):
            raise refuse(f"'logits' depend on the input '{strangers[0].name}' beside the residual stream.")
        if node.op_type in SKIP_NORMS and len(open_) == 2:
            entries = tuple(flow.varying_inputs(node))
            break
    if not any(n.op_type in PROJECTIONS for n in nodes):
        raise refuse(f"no unembedding ({', '.join(PROJECTIONS)} with constant weights) was found before 'logits'.")
    start = flow.uncast(entries[0]) if len(entries) == 1 else None
    while start is not None and entries[0] is not start:  # the casts behind a state belong to the tail
        cast = entries[0].producer()
        assert cast is not None
        nodes.append(cast)
        entries = (flow.varying_inputs(cast)[0],)
    return Tail(tuple(sorted(nodes, key=lambda n: flow.order(n.outputs[0]))), entries, logits)


def is_update(value: onnx_ir.Value, flow: Flow) -> bool:
    """Whether the value is a sum of things that vary: an update of the residual stream."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in SKIP_NORMS:
        return node.outputs.index(value) == SKIP_SUM
    return node.op_type in ("Add", "Sum") and len(flow.varying_inputs(node)) >= 2


def scaled_from(value: onnx_ir.Value, flow: Flow) -> onnx_ir.Value:
    """The sum that a state is made of, before casts and a layer's own constant factor."""
    node = value.producer()
    while node is not None and (node.op_type in CASTS or _is_scaling(node, flow)):
        (value,) = flow.varying_inputs(node)
        node = value.producer()
    return value


def _is_scaling(node: onnx_ir.Node, flow: Flow) -> bool:
    return node.op_type in ("Mul", "Div") and len(flow.varying_inputs(node)) == 1
