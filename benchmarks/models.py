"""A shape -> the unwrapped model and wrapped ones on the same weights, and caches for their steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import cdsurgery
from benchmarks import machine
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


def step_ways(plain: Any, lookback: int) -> dict[str, Any]:
    """`wrapped_ways`, on a GPU without "lazy": steps are captured there, and a captured step goes by no value."""
    ways = wrapped_ways(plain, lookback)
    return {way: model for way, model in ways.items() if way != "lazy" or not machine.GPU}


@torch.no_grad()
def filled_cache(model: Any, batch: int, context: int) -> DynamicCache:
    """What the model keeps of a prompt of `context` tokens, the same in each row, and room for one token more.

    Its tokens are those of `tokens`: all alike, they would all be sent to the same few experts.

    A token's keys and values go to that room and no further, so that every step finds the cache as it was, where it
    was, and copies nothing of it. A recurrent state goes on from step to step.
    """
    cache = DynamicCache(config=model.config)
    ids = tokens(model, context)[None]
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = torch.zeros(batch, dtype=torch.int64, device=model.device)
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
            layer.reorder_cache(rows)
        else:
            room = [pad(states, (0, 0, 0, 1)).index_select(0, rows) for states in (layer.keys, layer.values)]
            layer.keys, layer.values = (states[..., :-1, :] for states in room)
            layer.update = functools.partial(_into_room, *room)  # type: ignore[method-assign]
    return cache


def _into_room(keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What `DynamicLayer.update` returns, of keys and values whose last place is the token's."""
    keys[..., -1:, :], values[..., -1:, :] = own_keys, own_values
    return keys, values


def tokens(model: Any, count: int) -> Tensor:
    """So many tokens `[count]`, as different as the vocabulary allows."""
    return torch.arange(count, device=model.device) % model.get_input_embeddings().weight.shape[0]


def bytes_of(cache: DynamicCache) -> int:
    """That a step reads of a cache."""
    return sum(state.nbytes for _, _, state in cache_states(cache))


def decode_step(model: Any, cache: DynamicCache, batch: int) -> Callable[[], object]:
    """One token in each row on that cache; on a GPU captured as a CUDA graph."""
    token = tokens(model, batch)[:, None]

    @torch.no_grad()
    def step() -> None:
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return machine.captured(step)
