"""A shape -> the unwrapped model and wrapped ones on the same weights, and caches for their steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import cdsurgery
from cdsurgery.export.graph.cache import cache_states

# How `wrap` is asked for each way that is compared with the unwrapped model. The last is the authors' published
# selection re-expressed: all candidates of every row, ranked by -sum (log p)^2.
WAYS: dict[str, dict[str, Any]] = {
    "lazy": {"scan": "lazy"},
    "full": {"scan": "full"},
    "fused": {"scan": "fused"},
    "published": {"scan": "full", "measure": "log_p_squared"},
}


def on_shared_weights(plain: Any) -> Any:
    """A copy of a model whose parameters and buffers are the model's own."""
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    return copy.deepcopy(plain, dict(shared))


def wrapped(plain: Any, lookback: int, way: str) -> Any:
    """A copy on the same weights, wrapped in one of `WAYS`, its steps as inside of `generate`."""
    model = cdsurgery.wrap(on_shared_weights(plain), lookback=lookback, **WAYS[way])
    model._generating = True  # nobody sees the entropies that decide nothing, so "fused" need not make them
    return model


def wrapped_ways(plain: Any, lookback: int) -> dict[str, Any]:
    """The unwrapped model first, then what each of `WAYS` makes of it."""
    return {"unwrapped": plain} | {way: wrapped(plain, lookback, way) for way in WAYS}


@torch.no_grad()
def filled_cache(model: Any, batch: int, context: int) -> DynamicCache:
    """What the model keeps of a prompt of `context` tokens, the same in each row."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, context, dtype=torch.int64, device=model.device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.reorder_cache(torch.zeros(batch, dtype=torch.int64, device=model.device))
    return cache


def bytes_of(cache: DynamicCache) -> int:
    """That a step reads of a cache."""
    return sum(state.nbytes for _, _, state in cache_states(cache))


def decode_step(model: Any, cache: DynamicCache, batch: int) -> Callable[[], object]:
    """Decode one token in each row on that cache, and take it off again, unless a window or a state forgets for it."""
    crops = all(type(layer) is DynamicLayer for layer in cache.layers)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if crops:
            cache.crop(-1)

    return step
