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
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from cdsurgery.errors import UnsupportedModelError


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
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            yield index, "key", layer.keys
            yield index, "value", layer.values
        elif type(layer) is LinearAttentionLayer and layer.number_of_states == 1:
            for part, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                if states[0] is not None:  # lfm2 has convolutions only
                    yield index, part, states[0]
        elif type(layer) is not DummyLayer:
            raise UnsupportedModelError(
                f"Layer {index} of this model keeps its state in a {type(layer).__name__}. What can be exported: keys "
                "and values, or one convolution and one recurrent state of linear attention."
            )


def build_cache(names: Sequence[str], tensors: Iterable[Tensor]) -> DynamicCache:
    """The cache that holds the given tensors, as if a model had filled it.

    Sliding windows are not cut here: the graph keeps every token and masks those outside the window.

    Args:
        names: of the graph's past inputs.
        tensors: `[B, ...]`, one for each name.
    """
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in zip(names, tensors, strict=True):
        place = parsed_name(name)
        assert place is not None, name
        index, part = place
        kept.setdefault(index, {})[part] = tensor
    cache = DynamicCache()
    cache.layers = [_layer(kept.get(index, {})) for index in range(max(kept) + 1)]
    return cache


def parsed_name(name: str) -> tuple[int, str] | None:
    """ "past_key_values.3.key" -> (3, "key"), and so do the names that other exporters give, ".3.keys" among them.

    None where the name does not say which layer's it is, or what of it.
    """
    match = re.search(r"(\d+)\W(\w+?)s?$", name)
    return None if match is None else (int(match[1]), match[2])


def _layer(parts: dict[str, Tensor]) -> Any:
    if not parts:
        return DummyLayer()
    layer: Any = DynamicLayer() if "key" in parts else LinearAttentionLayer()
    some = next(iter(parts.values()))
    layer.dtype, layer.device = some.dtype, some.device
    if "key" in parts:
        layer.keys, layer.values, layer.is_initialized = parts["key"], parts["value"], True
        return layer
    # Zeros are the states of an empty past, so there always is a previous state.
    layer.has_previous_state[0] = True
    if "conv" in parts:
        layer.conv_states[0], layer.is_conv_states_initialized[0] = parts["conv"], True
        layer.conv_kernel_size[0] = parts["conv"].shape[-1]
    if "recurrent" in parts:
        layer.recurrent_states[0], layer.is_recurrent_states_initialized[0] = parts["recurrent"], True
    return layer
