"""A quantised artifact -> its weights as numbers again, lent to the model it was made from.

That separates what rounding the weights did, which is meant, from what the graph does with them, which must be exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from cdsurgery.errors import ArtifactError
from cdsurgery.export.artifact.clients import GRAPH_FILE

Array = np.ndarray[Any, Any]


class _Weight(NamedTuple):
    """A dequantised matrix `[out, in]` float32, and how far each of its numbers may be from the one it was made of."""

    values: Array
    steps: Array


@contextmanager
def borrowed_weights(folder: Path, model: Any) -> Iterator[Collection[str]]:
    """Run the block with the artifact's quantised weights in the model; its own are put back afterwards.

    Yields the names of the parameters that are borrowed: none where nothing is quantised. Both sets are held meanwhile.

    Raises:
        ArtifactError: a quantised weight belongs to no parameter of the model, or is not a rounding of it.
    """
    parameters = dict(model.named_parameters())
    own: dict[str, Tensor] = {}
    try:
        for name, weight in _dequantized(folder / GRAPH_FILE):
            if name not in parameters:
                raise ArtifactError(f"{folder} holds a quantised '{name}', which this {type(model).__name__} has not.")
            parameter = parameters[name]
            own[name] = parameter.data
            parameter.data = _fitted(name, weight, parameter.data)
        yield own.keys()
    finally:
        for name, tensor in own.items():
            parameters[name].data = tensor


def _fitted(name: str, weight: _Weight, own: Tensor) -> Tensor:
    """The weight in the layout of the parameter, [out, in] or, as in GPT-2, [in, out]: where it is a rounding of it."""
    numbers = own.detach().float().cpu().numpy()
    for values, steps in ((weight.values, weight.steps), (weight.values.T, weight.steps.T)):
        if values.shape == numbers.shape and (np.abs(values - numbers) <= steps).all():
            return torch.from_numpy(np.ascontiguousarray(values)).to(own)
    raise ArtifactError(
        f"The artifact's '{name}' is no quantised form of the model's: some numbers lie farther apart than rounding "
        "takes them. Compare it with the model that it was made from."
    )


def _dequantized(path: Path) -> Iterator[tuple[str, _Weight]]:
    """Every quantised matrix of a graph, one at a time, by the name of the parameter it was made of."""
    graph = onnx_ir.load(path).graph
    for node in graph:
        if node.op_type == "MatMulNBits":
            packed, scales = (_array(value) for value in node.inputs[1:3])
            yield _name(node.inputs[1], "_Q4"), _int4(packed, scales, node.attributes["K"].as_int())
        elif node.op_type == "MatMulInteger":
            weight, zero = node.inputs[1], node.inputs[3]
            name = _name(weight, "_quantized")
            yield name, _int8(_array(weight), _array(zero), _array(graph.initializers[f"{name}_scale"]))


def _name(value: onnx_ir.Value | None, ending: str) -> str:
    assert value is not None and value.name is not None
    return value.name.removesuffix(ending)


def _array(value: onnx_ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def _int4(packed: Array, scales: Array, depth: int) -> _Weight:
    """MatMulNBits without zero points: `[out, blocks, 16]` bytes, low half first; a number n is (n - 8) x scale.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
    """
    width, blocks, half = packed.shape
    numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(width, blocks, 2 * half).astype(np.float32) - 8
    scale = scales.astype(np.float32).reshape(width, blocks, 1)
    # A scale in float16 is a multiple of 2^-24, 0 included, and is taken up to 8 times.
    rounding = 8 * 2.0**-25 if scales.dtype == np.float16 else 0.0
    # Half a step by rounding, and up to a whole one where 8 was wanted and 7 is the largest.
    values, steps = numbers * scale, np.broadcast_to(np.abs(scale) * 1.001 + rounding, numbers.shape)
    return _Weight(values.reshape(width, -1)[:, :depth], steps.reshape(width, -1)[:, :depth])


def _int8(packed: Array, zero: Array, scale: Array) -> _Weight:
    """MatMulInteger: `[in, out]` bytes; a number n of output o is (n - zero[o]) x scale[o]."""
    values = (packed.astype(np.float32) - zero.astype(np.float32)) * scale
    # Half a step by rounding the number, half a one by rounding the zero point.
    return _Weight(values.T, np.broadcast_to(scale * 1.001, values.shape).T)
