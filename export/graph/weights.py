"""The weights of a traced graph -> named as the model's parameters are, each stored once, none copied.

PyTorch stores the matrix of a linear layer as [out, in], ONNX multiplies by [in, out]. The tracer's constant folding
turns one into the other as a view of the parameter's own memory, with a number for a name. Where a weight is also read
in another way, as a tied embedding is, it leaves a Transpose in the graph, and a runtime folds that into a second copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape
from torch import nn


def name_weights(graph: onnx_ir.Model, model: nn.Module) -> None:
    """Give every initializer that is a parameter or buffer of the model, as it is or transposed, its name there.

    It is one if it begins at the same address and is as long: the tracer hands the model's memory on. The weights of a
    model on another device were copied, so those keep the tracer's names.
    """
    names: dict[tuple[int, int], str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault((tensor.data_ptr(), tensor.nbytes), name)
    initializers = graph.graph.initializers
    for value in list(initializers.values()):
        numbers = array(value)
        own_name = names.get((numbers.ctypes.data, numbers.nbytes))
        if own_name is not None and own_name not in initializers:
            value.name = own_name


def multiply_in_place(graph: onnx_ir.Model) -> None:
    """Where a weight is transposed only to be multiplied with, let the product read it as it stands.

    MatMul(x, Transpose(W)) becomes Gemm(x, W, transB=1), with x `[..., in]` as rows. What the tracer leaves of such
    transposes are tied unembeddings, and ONNX Runtime would hold their V x D numbers twice.
    """
    for node in list(graph.graph.all_nodes()):
        weight = transposed_weight(node)
        if weight is None:
            continue
        tape, state = Tape(), node.inputs[0]
        width, depth = array(weight).shape
        as_rows = tape.initializer(onnx_ir.tensor([-1, depth], name=f"{node.name}.rows"))
        last = tape.initializer(onnx_ir.tensor([width], name=f"{node.name}.width"))
        rows = tape.op("Gemm", [tape.op("Reshape", [state, as_rows]), weight], {"transB": 1})
        shape = tape.op("Concat", [tape.op("Shape", [state], {"end": -1}), last], {"axis": 0})
        replace_node(graph.graph, node, tape, tape.op("Reshape", [rows, shape], {"allowzero": 1}))
    RemoveUnusedNodesPass()(graph)


def transposed_weight(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """W `[N, K]`, an initializer, where the node is MatMul(x, Transpose(W)); None for any other node."""
    factor = node.inputs[1] if node.op_type == "MatMul" else None
    transpose = factor.producer() if factor is not None else None
    weight = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
    return weight if weight is not None and weight.is_initializer() and array(weight).ndim == 2 else None


def array(weight: onnx_ir.Value) -> np.ndarray[Any, Any]:
    """An initializer's numbers, in the memory where they are."""
    assert weight.const_value is not None
    return weight.const_value.numpy()


def replace_node(graph: onnx_ir.Graph, node: onnx_ir.Node, tape: Tape, result: onnx_ir.Value) -> None:
    """Put what a tape recorded in the place of a node with one output, which `result` becomes, under the same name.

    The node may stand in the body of a Scan; the tape's initializers go into the `graph` around it, which bodies read.
    """
    place = node.graph
    assert isinstance(place, onnx_ir.Graph)
    for index, new in enumerate(tape.nodes):
        new.name = new.outputs[0].name = f"{node.name}.{index}"
    for value in tape.initializers:
        graph.register_initializer(value)
    onnx_ir.convenience.replace_nodes_and_values(place, node, [node], tape.nodes, node.outputs, [result])
