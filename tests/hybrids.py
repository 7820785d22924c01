"""Hybrid models -> their body as a graph in ONNX Runtime, and plain transformers to compare it with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from artifacts import Client, shared
from families import tiny_model
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

import cdsurgery
from cdsurgery import export
from cdsurgery.export.options import Target

HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")
KERNEL = 4


@functools.cache
def hybrid(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Two linear-attention layers, one full-attention layer."""
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    return tiny_model(family, dtype, num_hidden_layers=len(kinds), layer_types=kinds)


@functools.cache
def client(family: str, target: Target, dtype: torch.dtype = torch.float32) -> Client:
    """Its artifact, open; logits at every position."""
    model = cdsurgery.wrap(copy.deepcopy(hybrid(family, dtype)), lookback=2)
    name = f"{family}-{target}-{dtype}-hybrid"
    return Client(shared(name, lambda folder: export.to_onnx(model, folder, target=target, positions="all")))


def cache_states(cache: DynamicCache) -> list[Tensor]:
    """Two tensors a layer: states of the convolution and of the rule, or keys and values."""
    pairs: list[tuple[Any, Any]] = [
        (layer.conv_states[0][..., 1 - KERNEL :], layer.recurrent_states[0])
        if isinstance(layer, LinearAttentionLayer)
        else (layer.keys, layer.values)
        for layer in cache.layers
    ]
    return [state for pair in pairs for state in pair]


def run(graph: Client, ids: Tensor, mask: Tensor, past: Sequence[Any] | None = None) -> list[np.ndarray]:
    """New tokens `[B, S]` under a mask `[B, P+S]` -> final logits `[B, S, V]` and the new states."""
    names = [value.name for value in graph.cache_inputs]
    out = graph(ids, mask, past and dict(zip(map(present, names), past, strict=True)))
    return [out["final_logits"], *(out[present(name)] for name in names)]


def present(name: str) -> str:
    """The output that is the next input of that name."""
    return name.replace("past_key_values", "past").replace("past", "present")
