"""A graph in float -> the same graph with its matrices in 8 or 4 bits, each stored once, by ONNX Runtime's quantisers.

int4: weights only. `MatMulNBitsQuantizer` rounds each run of 32 numbers along the input axis to multiples of its own
scale; the product itself is in float, so the graph is as exact as any other with those weights.
int8: weights and activations. `quantize_dynamic` gives every output its scale; each product's input is rounded to 255
steps between its own least and largest number while the graph runs. That depends on everything in the input, so the
rows of a batch and the M candidates touch each other, by an amount that `verify` measures.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

A table that is also read row by row (a tied embedding) is then read from its quantised form, so that it too stands in
the file once. What is no product with a constant matrix stays in float: norms, biases, position tables, embeddings that
are not tied, and experts, which a graph picks by token.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.graph.weights import array, replace_node
from cdsurgery.export.options import GraphOptions

Scheme = Literal["int8", "int4"]

# What llama.cpp's Q4_0 and onnxruntime-genai's builder use: 5 bits a weight with float32 scales.
BLOCK_SIZE = 32


class _Product(NamedTuple):
    """state @ matrix (+ bias): a MatMul or Gemm with a constant weight, `[in, out]` or, transposed, `[out, in]`."""

    state: onnx_ir.Value
    weight: onnx_ir.Value
    matrix: np.ndarray[Any, Any]
    transposed: bool
    bias: onnx_ir.Value | None


def quantize(graph: onnx_ir.Model, scheme: Scheme, names: Collection[str], folder: Path) -> tuple[str, ...]:
    """Quantise the products with some of a graph's initializers, in place.

    Args:
        graph: in float32, or float16 for int4.
        scheme: "int8" or "int4".
        names: of the initializers that may be quantised.
        folder: where the quantisers may write one matrix at a time. The system's own for temporary files is memory on
            many machines, and an unembedding has gigabytes.

    Returns:
        The names of those that were: the ones that a MatMul or Gemm multiplies with. Initializer `name` is replaced by
        `name_Q4` `[out, blocks, 16]` uint8 and `name_scales` `[out, blocks]`, or by `name_quantized` `[in, out]` uint8,
        `name_scale` and `name_zero_point` `[out]`.
    """
    quantized: dict[str, onnx_ir.Model] = {}
    tables: set[str] = set()  # [out, in], so that their rows are those of the quantised form
    for node in list(graph.graph):
        product = _product(node)
        if product is None or (name := product.weight.name) is None or name not in names:
            continue
        if name not in quantized:
            with _logging_as_it_was():
                quantized[name] = _QUANTIZERS[scheme](name, product, folder)
        if product.transposed:
            tables.add(name)
        tape = Tape()
        result = _copy(quantized[name].graph, graph.graph, tape, product.state)
        if product.bias is not None:
            result = tape.op("Add", [result, product.bias])
        replace_node(graph.graph, node, tape, result)
    for node in list(graph.graph):
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
            continue
        table, ids = node.inputs
        if table is not None and ids is not None and table.name in tables:
            tape = Tape()
            replace_node(graph.graph, node, tape, _ROWS[scheme](graph.graph, tape, table, ids))
    CommonSubexpressionEliminationPass()(graph)  # products of one input round it once
    RemoveUnusedNodesPass()(graph)
    if scheme == "int4":
        graph.graph.opset_imports["com.microsoft"] = 1
    return tuple(quantized)


def _product(node: onnx_ir.Node) -> _Product | None:
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    state, weight = node.inputs[:2]
    if state is None or weight is None or not weight.is_initializer() or array(weight).ndim != 2:
        return None
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if options.get("transA") or options.get("alpha", 1) != 1 or options.get("beta", 1) != 1:
        return None
    transposed = bool(options.get("transB"))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _Product(state, weight, array(weight).T if transposed else array(weight), transposed, bias)


def _alone(name: str, product: _Product, folder: str) -> str:
    """A file with this product only: what a quantiser is given. One at a time, because they hold all they are given."""
    dtype = product.weight.dtype
    assert dtype is not None
    state, result = (onnx_ir.val(letter, dtype, [None, None, None]) for letter in ("state", "result"))
    tensor = onnx_ir.Tensor(product.matrix, dtype=dtype, name=name)
    weight = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(dtype), const_value=tensor)
    node = onnx_ir.node("MatMul", [state, weight], outputs=[result], name="product")
    graph = onnx_ir.Graph([state], [result], nodes=[node], initializers=[weight], opset_imports={"": 20})
    # The mark of ONNX Runtime's own preprocessing, which has nothing to do on one node and would be asked for.
    model = onnx_ir.Model(graph, ir_version=10, metadata_props={"onnx.quant.pre_process": "onnxruntime.quant"})
    path = str(Path(folder) / "product.onnx")
    onnx_ir.save(model, path, external_data="product.onnx.data")
    return path


def _int4(name: str, product: _Product, place: Path) -> onnx_ir.Model:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with _scratch(place) as folder:
        # Symmetric, without zero points, so that a Gather can read the same table; what onnxruntime-genai's builder
        # does too. accuracy_level stays unset: activations and sums are float32.
        quantizer = MatMulNBitsQuantizer(_alone(name, product, folder), block_size=BLOCK_SIZE, is_symmetric=True)
        quantizer.process()
    return onnx_ir.from_proto(quantizer.model.model)


def _int8(name: str, product: _Product, place: Path) -> onnx_ir.Model:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _scratch(place) as folder:
        source, target = _alone(name, product, folder), str(Path(folder) / "quantized.onnx")
        # QUInt8: with signed weights, processors without VNNI saturate the 16 bits in which they add two products.
        options = {"per_channel": True, "weight_type": QuantType.QUInt8, "use_external_data_format": True}
        quantize_dynamic(source, target, **options)
        model = onnx_ir.load(target)
        onnx_ir.external_data.load_to_model(model)
    return model


@contextmanager
def _scratch(place: Path) -> Iterator[str]:
    """A folder in `place` that is there for the block, and has all of Python's temporary files meanwhile.

    `quantize_dynamic` writes its input once more, and takes no folder for that.
    """
    own = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=place) as folder:
        tempfile.tempdir = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = own


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """ONNX Runtime's quantisers set up logging for the whole process, and tell of every node. Warnings stay."""
    root, own = logging.getLogger(), logging.getLogger("onnxruntime.quantization")
    levels, handlers = (root.level, own.level), root.handlers[:]
    own.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(levels[0])
        own.setLevel(levels[1])
        root.handlers[:] = handlers


def _copy(part: onnx_ir.Graph, whole: onnx_ir.Graph, tape: Tape, state: onnx_ir.Value) -> onnx_ir.Value:
    """Record the nodes of a quantised product, with `state` for its input and initializers that all copies share."""
    values: dict[onnx_ir.Value | None, onnx_ir.Value | None] = {None: None, part.inputs[0]: state}
    for name, value in part.initializers.items():
        if name not in whole.initializers:
            assert value.const_value is not None
            whole.register_initializer(
                onnx_ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
            )
        values[value] = whole.initializers[name]
    for node in part:
        inputs = [values[value] for value in node.inputs]
        outputs = tape.op_multi_out(
            node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs)
        )
        values.update(zip(node.outputs, outputs, strict=True))
    result = values[part.outputs[0]]
    assert result is not None
    return result


def _int4_rows(graph: onnx_ir.Graph, tape: Tape, table: onnx_ir.Value, ids: onnx_ir.Value) -> onnx_ir.Value:
    """Rows `[B, S, D]` of a table that the head multiplies with, for ids `[B, S]`."""

    def integers(name: str, *values: int) -> onnx_ir.Value:
        return tape.initializer(onnx_ir.tensor(list(values), name=f"{table.name}_{name}"))

    packed, scales = (graph.initializers[f"{table.name}_{part}"] for part in ("Q4", "scales"))
    # MatMulNBits insists on three axes for the data and two for the scales, a Gather on as many for both.
    blocks = tape.op(
        "GatherBlockQuantized",
        [packed, ids, tape.op("Unsqueeze", [scales, integers("last", -1)])],
        {"gather_axis": 0, "quantize_axis": 2, "block_size": BLOCK_SIZE, "bits": 4},
        domain="com.microsoft",
    )
    rows = tape.op("Reshape", [blocks, integers("rows", 0, 0, -1)])
    depth = array(table).shape[1]
    if depth % BLOCK_SIZE:
        ends = integers("begin", 0), integers("end", depth), integers("axis", -1)
        rows = tape.op("Slice", [rows, *ends])
    return rows


def _int8_rows(graph: onnx_ir.Graph, tape: Tape, table: onnx_ir.Value, ids: onnx_ir.Value) -> onnx_ir.Value:
    """Rows `[B, S, D]` of a table that the head multiplies with as `[D, V]`, for ids `[B, S]`."""
    packed, scale, zero = (graph.initializers[f"{table.name}_{part}"] for part in ("quantized", "scale", "zero_point"))
    last = tape.initializer(onnx_ir.tensor([-1], name=f"{table.name}_last"))

    def number(values: onnx_ir.Value) -> onnx_ir.Value:
        return tape.op("Cast", [values], {"to": onnx_ir.DataType.FLOAT})

    columns = tape.op("Gather", [packed, ids], {"axis": 1})
    rows = tape.op("Transpose", [columns], {"perm": [1, 2, 0]})
    zeros, scales = (tape.op("Unsqueeze", [tape.op("Gather", [each, ids]), last]) for each in (zero, scale))
    return tape.op("Mul", [tape.op("Sub", [number(rows), number(zeros)]), scales])


_QUANTIZERS = {"int8": _int8, "int4": _int4}
_ROWS = {"int8": _int8_rows, "int4": _int4_rows}


def quantizable(model: Any, options: GraphOptions, scheme: Scheme, head: bool) -> set[str]:
    """The names of the parameters that may be quantised: all, or all but the unembedding.

    Raises:
        InvalidInputError: there is no such scheme, or it cannot be applied to this model.
    """
    if scheme not in get_args(Scheme):
        raise InvalidInputError(f"quantization is {scheme!r}; it must be 'int4', 'int8' or None.")
    if scheme == "int8" and model.dtype != torch.float32:
        raise InvalidInputError(
            f"The model is in {model.dtype}; ONNX Runtime rounds activations to int8 from float32 only. Convert the "
            "model first with model.float(), or quantise to int4."
        )
    if scheme == "int8" and options.positions == "score":
        raise InvalidInputError(
            "A graph that scores returns no logits, on which the noise of int8 is measured. Quantise it to int4, or "
            "export with positions='all'."
        )
    if model.device.type != "cpu":
        raise InvalidInputError(f"The model is on {model.device}; to be quantised it must be on the CPU: model.cpu().")
    unembedding = model.get_submodule(model.anatomy.unembedding).weight
    return {name for name, parameter in model.named_parameters() if head or parameter is not unembedding}
