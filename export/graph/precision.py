"""Half-precision weights -> a graph that computes in float32 on them, for providers without half-precision kernels."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import onnx_ir
import onnxruntime
import torch

from cdsurgery.errors import InvalidInputError, UnsupportedModelError
from cdsurgery.export.options import GraphOptions

_STORED = {torch.bfloat16: onnx_ir.DataType.BFLOAT16, torch.float16: onnx_ir.DataType.FLOAT16}
# Below this size a Cast costs more than the bytes it saves.
_SMALL = 1024


def computing_model(model: Any, options: GraphOptions) -> Any:
    """The model whose arithmetic the graph has: the given one, or a float32 copy of it where it is to be upcast.

    Raises:
        InvalidInputError: there is nothing to upcast.
    """
    if not options.upcast:
        return model
    if model.dtype not in _STORED:
        raise InvalidInputError(f"upcast was asked for, but the model is in {model.dtype} already. Leave it out.")
    return copy.deepcopy(model).float()


def providers_for(model: Any, options: GraphOptions) -> list[str]:
    """The providers of ONNX Runtime on which a graph of this model can be run here.

    Raises:
        UnsupportedModelError: none; said before anything is traced.
    """
    available = onnxruntime.get_available_providers()
    half = model.dtype == torch.bfloat16 and not options.upcast
    if not half and options.target != "cuda":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in available:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    why = (
        "the model is in bfloat16, for which ONNX Runtime has no kernels on the CPU (no Add, Mul, MatMul, ...)"
        if half
        else "a graph for target='cuda' has operators that only the CUDA provider has"
    )
    remedy = "pass upcast=True to keep the weights in bfloat16 and compute in float32, " if half else ""
    raise UnsupportedModelError(
        f"The graph could not be run here: {why}, and this ONNX Runtime has {', '.join(available)}. Either {remedy}"
        f"{'convert the model with model.half() or model.float(), ' if half else 'choose another target, '}"
        "export where the CUDA provider is, or pass parity=False to write the graph unverified."
    )


def narrow_weights_(graph: onnx_ir.Model, dtype: torch.dtype, names: Collection[str]) -> None:
    """Store float32 weights that half precision holds exactly in half precision, and cast them where they are used.

    Args:
        graph: whose initializers are changed.
        dtype: torch.bfloat16 or torch.float16.
        names: of the initializers that may be narrowed. Scales of quantised matrices are left out: bfloat16 holds many
            exactly, an eighth of a weight each, and they are no weights.
    """
    stored = _STORED[dtype]
    for value in list(graph.graph.initializers.values()):
        tensor = value.const_value if value.name in names else None
        if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or tensor.size < _SMALL:
            continue
        wide = torch.from_numpy(tensor.numpy().copy())
        narrow = wide.to(dtype)
        if not torch.equal(narrow.float(), wide):
            continue
        name = value.name
        assert name is not None
        half = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(stored))
        bits = narrow.view(torch.int16).numpy().view(stored.numpy())
        half.const_value = onnx_ir.Tensor(bits, dtype=stored, name=name)
        cast = onnx_ir.node("Cast", [half], {"to": onnx_ir.DataType.FLOAT.value})
        widened = cast.outputs[0]
        widened.name, widened.type, widened.shape = f"{name}.float32", value.type, value.shape
        value.replace_all_uses_with(widened)
        graph.graph.insert_before(graph.graph[0], cast)
        graph.graph.initializers.pop(name)
        graph.graph.register_initializer(half)
