"""An operator between the residual stream and the logits -> does it treat each row for itself? If not, it is refused.

A norm over the last axis does, a product with constant weights (quantised ones included), and what combines element by
element with constants. Rows may be moved, too.
"""

from __future__ import annotations

import onnx_ir

from cdsurgery.export.graft.flow import Flow, operator, refuse

NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")
# They add first and norm then: what they norm is the residual stream.
SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
PROJECTIONS = ("MatMul", "Gemm", "MatMulNBits")
ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Tanh", "Cast", "Identity", "Where", "Clip", "Neg"),
    *("QuantizeLinear", "DequantizeLinear"),
)
ROW_MOVES = ("Reshape", "Flatten", "Gather", "Slice", "Squeeze", "Unsqueeze")


def check_rowwise(node: onnx_ir.Node, value: onnx_ir.Value, flow: Flow) -> None:
    """Refuse an operator whose result for one row may depend on others."""
    kind, varying = node.op_type, flow.varying_inputs(node)
    constants = all(v is None or v in flow.static or v in flow.varying for v in node.inputs)
    why = None
    if value is not node.outputs[0]:
        why = "another output than its first is used"
    elif kind in ROW_MOVES:
        why = _wrong_move(node, varying, flow)
    elif kind in PROJECTIONS:
        why = None if varying == [node.inputs[0]] and constants else "its weights are not constant"
        if kind == "Gemm" and _integer(node, "transA", 0):
            why = "it transposes the state"
    elif kind in NORMS:
        why = _wrong_axis(node, varying, constants)
    elif kind in SKIP_NORMS:
        why = None if varying == [*node.inputs[:2]] and constants else "its weights are not constant"
    elif kind == "ReduceMean":
        why = None if _mean_axes(node) == [-1] else "it is not the mean over the last axis"
    elif kind in ELEMENTWISE:
        why = None if constants else "it combines the state with something that is neither constant nor of it"
    else:
        why = "it is not known to treat every row for itself"
    if why is not None:
        raise refuse(
            f"'logits' come from {operator(node)} ('{node.name or value.name}'), and {why}. Between the residual "
            "stream and the logits there may be a norm over the last axis, a product with constant weights, a choice "
            f"of rows, and {', '.join(ELEMENTWISE)} with constants."
        )


def _wrong_axis(node: onnx_ir.Node, varying: list[onnx_ir.Value], constants: bool) -> str | None:
    if varying != [node.inputs[0]] or not constants:
        return "its weights are not constant"
    return None if _integer(node, "axis", -1) == -1 else "it does not norm over the axis -1"


def _wrong_move(node: onnx_ir.Node, varying: list[onnx_ir.Value], flow: Flow) -> str | None:
    """Why a move of rows is none, as far as the graph shows; the rest shows when the copies are run."""
    given = node.inputs[0]
    if given is None or given not in flow.varying or len(varying) != 1:
        return "it picks rows by data"
    axes, alike = [], [given]
    if node.op_type == "Gather":
        axes = [_integer(node, "axis", 0)]
    elif node.op_type == "Slice":
        axes, alike = _constants(node, 3) or [], [given, *node.outputs]
    last = {-1, *(len(value.shape) - 1 for value in alike if value.shape is not None)}
    return "it cuts the last axis" if last & {*axes} else None


def _constants(node: onnx_ir.Node, index: int) -> list[int] | None:
    """The integers of an input; None where it is left out or not constant."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def _mean_axes(node: onnx_ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    return _constants(node, 1)


def _integer(node: onnx_ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
