"""Hybrid models -> their body as a graph in ONNX Runtime, and plain transformers to compare it with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
from families import tiny_model
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from cdsurgery.export.delta_rule import expand_delta_rule
from cdsurgery.export.linear_attention import (
    Target,
    keep_float32,
    linear_layer,
    linear_states,
    traceable_linear_attention,
)
from cdsurgery.export.onnx import _quiet

HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")
KERNEL = 4


@functools.cache
def hybrid(family: str, layers: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """Two linear-attention layers, one full-attention layer, and so on."""
    kinds = ["linear_attention", "linear_attention", "full_attention"] * layers
    return tiny_model(family, dtype, num_hidden_layers=layers, layer_types=kinds[:layers])


class Body(nn.Module):
    """A causal LM as a function of tensors: new tokens and two states a layer -> logits and the new states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]) -> Any:
        cache = DynamicCache(config=self.model.config)
        for index, states in enumerate(zip(past[::2], past[1::2], strict=True)):
            if isinstance(cache.layers[index], LinearAttentionLayer):
                cache.layers[index] = linear_layer(*states)
            else:
                cache.layers[index].update(*states)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        return {"logits": logits} | {f"present.{i}": state for i, state in enumerate(cache_states(cache))}


def cache_states(cache: DynamicCache) -> list[Tensor]:
    """Two tensors a layer: states of the convolution and of the rule, or keys and values."""
    pairs = [
        linear_states(layer, KERNEL) if isinstance(layer, LinearAttentionLayer) else (layer.keys, layer.values)
        for layer in cache.layers
    ]
    return [state for pair in pairs for state in pair]


def empty_past(model: Any, batch: int, past: int = 0) -> list[Tensor]:
    """Zeros for every state; attention layers get `past` tokens."""
    cache = DynamicCache(config=model.config)
    model(torch.ones(batch, 5, dtype=torch.int64), past_key_values=cache)
    attention = [kind == "full_attention" for kind in model.config.layer_types for _ in range(2)]
    states = zip(cache_states(cache), attention, strict=True)
    return [torch.zeros_like(state[:, :, :1].expand(-1, -1, past, -1) if grows else state) for state, grows in states]


def trace(model: Any, target: Target) -> onnx_ir.Model:
    """The body as an ONNX model, its recurrent states float32 whatever the model is."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    with torch.no_grad():
        past = empty_past(model, 2, 4)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -3:]
    inputs = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": mask, "position_ids": positions, "past": past}
    both = {0: Dim.AUTO, 1: Dim.AUTO}
    kinds = [kind for kind in model.config.layer_types for _ in range(2)]
    states = [{0: Dim.AUTO} | ({2: Dim.AUTO} if kind == "full_attention" else {}) for kind in kinds]
    shapes: dict[str, Any] = {"input_ids": both, "attention_mask": both, "position_ids": both, "past": states}
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=20)
    with torch.no_grad(), traceable_linear_attention(model, target), _quiet():
        graph = OnnxExporter().export(Body(model), inputs, config=config).program
    expand_delta_rule(graph)
    for value, kind in zip(graph.graph.inputs[4::2], model.config.layer_types, strict=True):
        if kind == "linear_attention":
            keep_float32(value)
    return graph


@functools.cache
def session(family: str, target: Target, dtype: torch.dtype = torch.float32) -> onnxruntime.InferenceSession:
    graph = trace(hybrid(family, dtype=dtype), target)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx_ir.to_proto(graph).SerializeToString(), options)


def run(graph: onnxruntime.InferenceSession, ids: Tensor, mask: Tensor, past: Sequence[Any]) -> list[np.ndarray]:
    """New tokens `[B, S]` under a mask `[B, P+S]` -> logits `[B, S, V]` and the new states."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    values = [ids.numpy(), mask.numpy(), positions.numpy(), *(np.asarray(state) for state in past)]
    return graph.run(None, {value.name: array for value, array in zip(graph.get_inputs(), values, strict=True)})
