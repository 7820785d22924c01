"""A transformers cache <-> the flat tensors of a graph: what each kind of layer keeps between two steps.

Attention keeps keys and values, which grow with every token; linear attention keeps a convolution's last inputs and a
recurrent state, which do not. Layers that keep nothing (experts, or attention that reads another layer's keys) have no
tensors. Names are those of optimum and onnxruntime-genai.
https://github.com/microsoft/onnxruntime-genai/blob/main/src/python/py/models/README.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from cdsurgery.errors import UnsupportedModelError

_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
_LINEAR = (LinearAttentionLayer,)
_BOTH = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


@dataclass(frozen=True)
class Part:
    """One of the tensors that a layer keeps.

    Attributes:
        past, present: the names of the graph's input and output, with a place for the layer's index.
        growing: the axis of tokens, or None for a state of fixed size.
    """

    past: str
    present: str
    growing: int | None


PARTS = {
    "key": Part("past_key_values.{}.key", "present.{}.key", growing=2),
    "value": Part("past_key_values.{}.value", "present.{}.value", growing=2),
    "conv": Part("past.{}.conv", "present.{}.conv", growing=None),
    "recurrent": Part("past.{}.recurrent", "present.{}.recurrent", growing=None),
}


def cache_states(cache: Cache) -> Iterator[tuple[int, str, Tensor]]:
    """Every tensor of a filled cache: (layer, part, `[B, ...]`), layer by layer, in the order of the signature.

    Raises:
        UnsupportedModelError: a layer keeps something else, or nothing yet.
    """
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        kind = type(layer)
        if kind is DummyLayer:
            continue
        if kind not in _ATTENTION + _LINEAR + _BOTH or getattr(layer, "number_of_states", 1) != 1:
            raise UnsupportedModelError(
                f"Layer {index} of this model keeps its state in a {kind.__name__}. What can be exported: keys and "
                "values, and the convolution and recurrent state of linear attention, one of each a layer."
            )
        if kind not in _LINEAR:
            yield index, "key", layer.keys
            yield index, "value", layer.values
        if kind not in _ATTENTION:
            for part, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                if states[0] is not None:  # lfm2 has convolutions only
                    yield index, part, states[0]


def build_cache(names: Sequence[str], tensors: Iterable[Tensor]) -> DynamicCache:
    """The cache that holds the given tensors, as if a model had filled it.

    Sliding windows are not cut here: the graph keeps every token and masks those outside the window.

    Args:
        names: of the graph's past inputs.
        tensors: `[B, ...]`, one for each name.
    """
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in zip(names, tensors, strict=True):
        index, part = _parsed(name)
        kept.setdefault(index, {})[part] = tensor
    cache = DynamicCache()
    cache.layers = [_layer(kept.get(index, {})) for index in range(max(kept) + 1)]
    return cache


def _parsed(name: str) -> tuple[int, str]:
    """ "past_key_values.3.key" -> (3, "key")."""
    match = re.fullmatch(r"past(?:_key_values)?\.(\d+)\.(\w+)", name)
    assert match is not None, name
    return int(match[1]), match[2]


def _layer(parts: dict[str, Tensor]) -> Any:
    attention, linear = "key" in parts, "conv" in parts or "recurrent" in parts
    if not parts:
        return DummyLayer()
    layer: Any = LinearAttentionAndFullAttentionLayer() if linear and attention else None
    layer = layer or (LinearAttentionLayer() if linear else DynamicLayer())
    some = next(iter(parts.values()))
    layer.dtype, layer.device = some.dtype, some.device
    if attention:
        layer.keys, layer.values, layer.is_initialized = parts["key"], parts["value"], True
    if linear:
        _fill_linear(layer, parts)
    return layer


def _fill_linear(layer: Any, parts: dict[str, Tensor]) -> None:
    """A past of zeros is what an empty one is, so the layer always has a previous state."""
    for part, states, ready in (
        ("conv", layer.conv_states, layer.is_conv_states_initialized),
        ("recurrent", layer.recurrent_states, layer.is_recurrent_states_initialized),
    ):
        if part in parts:
            states[0], ready[0] = parts[part], True
    layer.has_previous_state[0] = True
    if "conv" in parts:
        layer.conv_kernel_size[0] = parts["conv"].shape[-1]
