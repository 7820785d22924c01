"""Tiny models, their quantised artifacts, and copies of them with the weights that ONNX Runtime multiplies with."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from artifacts import shared
from families import tiny_model

import cdsurgery
from cdsurgery import export
from cdsurgery.export.artifact.manifest import read_manifest

LAYERS, LOOKBACK = 4, 2


@dataclass(frozen=True)
class Case:
    """A tiny model and how it is quantised. 72 is no multiple of a block's 32; 64, 96 and 256 are."""

    family: str
    scheme: Any
    head: bool = True
    tied: bool = True
    hidden: int = 64

    def __str__(self) -> str:
        parts = self.family, self.scheme, "head" if self.head else "kept", "tied" if self.tied else "untied"
        return "-".join([*parts, str(self.hidden)])


INT4 = Case("llama", "int4")
INT8 = Case("llama", "int8")
CASES = [
    INT4,
    INT8,
    Case("qwen3", "int4", hidden=72),
    Case("qwen3", "int4", tied=False, head=False),
]
USUAL = CASES[:2]


@functools.cache
def wrapped(case: Case) -> Any:
    options = {"num_hidden_layers": LAYERS, "tie_word_embeddings": case.tied, "hidden_size": case.hidden}
    return cdsurgery.wrap(tiny_model(case.family, **options), lookback=LOOKBACK)


@functools.cache
def artifact(case: Case) -> Path:
    options: dict[str, Any] = {"quantization": case.scheme, "quantize_head": case.head}
    return shared(str(case), lambda folder: export.to_onnx(wrapped(case), folder, **options))


def graph(case: Case) -> Any:
    return onnx.load(artifact(case) / "model.onnx").graph


def head_name(case: Case) -> str:
    return "model.embed_tokens.weight" if case.tied else "lm_head.weight"


def multiplied(case: Case, name: str) -> np.ndarray:
    """The matrix `[in, out]` that ONNX Runtime multiplies with: its own kernel on the rows of the identity."""
    weights = {tensor.name: tensor for tensor in graph(case).initializer if tensor.name.startswith(name)}
    if case.scheme == "int8":
        # One product of integers with nothing to round: DequantizeLinear is its definition.
        inputs = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
        node = onnx.helper.make_node("DequantizeLinear", inputs, ["y"], axis=1)
        depth = None
    else:
        (found,) = [node for node in graph(case).node if node.op_type == "MatMulNBits" and f"{name}_Q4" in node.input]
        node = onnx.helper.make_node("MatMulNBits", ["x", *found.input[1:]], ["y"], domain="com.microsoft")
        node.attribute.extend(found.attribute)
        depth = next(attribute.i for attribute in found.attribute if attribute.name == "K")
    inputs = [] if depth is None else [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    alone = onnx.helper.make_graph([node], "alone", inputs, outputs, list(weights.values()))
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(alone, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {} if depth is None else {"x": np.eye(depth, dtype=np.float32)})[0]


@functools.cache
def twin(case: Case) -> Any:
    """A copy of the model with the weights that ONNX Runtime multiplies with."""
    model = copy.deepcopy(wrapped(case))
    parameters = dict(model.named_parameters())
    for name in quantized_names(case):
        parameters[name].data = torch.from_numpy(multiplied(case, name).T.copy())
    return model


def quantized_names(case: Case) -> list[str]:
    left = read_manifest(artifact(case)).quantization["float"]  # type: ignore[index]
    return [name for name, weight in wrapped(case).named_parameters() if weight.ndim > 1 and name not in left]
