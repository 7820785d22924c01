"""A shape -> the unwrapped model and wrapped ones on the same weights, and caches for their steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

import cdsurgery
from benchmarks.shapes import heads_of_cache

# How `wrap` is asked for each way that is compared with the unwrapped model. The last is the authors' published
# selection re-expressed: all candidates of every row, ranked by -sum (log p)^2.
WAYS: dict[str, dict[str, Any]] = {
    "lazy": {"scan": "lazy"},
    "full": {"scan": "full"},
    "published": {"scan": "full", "measure": "log_p_squared"},
}


def on_shared_weights(plain: Any) -> Any:
    """A copy of a model whose parameters and buffers are the model's own."""
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    return copy.deepcopy(plain, dict(shared))


def wrapped_ways(plain: Any, lookback: int) -> dict[str, Any]:
    """The unwrapped model first, then what each of `WAYS` makes of it."""
    return {"unwrapped": plain} | {
        way: cdsurgery.wrap(on_shared_weights(plain), lookback=lookback, **options) for way, options in WAYS.items()
    }


def filled_cache(model: Any, batch: int, context: int) -> DynamicCache:
    """A cache of `context` tokens of random numbers in each row."""
    cache = DynamicCache(config=model.config)
    heads, width = heads_of_cache(model.config)
    for layer in range(model.config.num_hidden_layers):
        state = torch.randn(batch, heads, context, width, dtype=model.dtype, device=model.device)
        cache.update(state, state, layer)
    return cache


def decode_step(model: Any, cache: DynamicCache, batch: int) -> Callable[[], object]:
    """Decode one token in each row on that cache, and take it off again, unless a window forgot others for it."""
    crops = not any(layer.is_sliding for layer in cache.layers)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if crops:
            cache.crop(-1)

    return step
