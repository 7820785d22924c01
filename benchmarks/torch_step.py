"""Decode steps and prefills in PyTorch: the unwrapped model, the wrapped one, and the authors' published step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

import cdsurgery
from benchmarks.schedule import scheduled
from benchmarks.shapes import random_model
from benchmarks.timing import Timing, interleaved

# How `wrap` is asked for each way that is compared with the unwrapped model. The last is the authors' published
# selection re-expressed: all candidates of every row, ranked by -sum (log p)^2.
WAYS: dict[str, dict[str, Any]] = {
    "lazy": {"scan": "lazy"},
    "full": {"scan": "full"},
    "published": {"scan": "full", "measure": "log_p_squared"},
}


def decode_steps(
    shape: str, dtype: torch.dtype, lookback: int, batch: int, context: int, rate: float, rounds: int
) -> list[Timing]:
    """One new token on a cache of `context` tokens; `rate` of the rows move by one layer."""
    models = _models(shape, dtype, lookback)

    def step(model: Any) -> Callable[[], object]:
        cache = _filled_cache(model, batch, context)
        token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        return lambda: model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return _compared(models, step, rate, rounds)


def prefills(shape: str, dtype: torch.dtype, lookback: int, tokens: int, rate: float, rounds: int) -> list[Timing]:
    """A prompt of so many tokens into an empty cache, of which the last one's logits are wanted."""
    models = _models(shape, dtype, lookback)

    def prefill(model: Any) -> Callable[[], object]:
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
        return lambda: model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    return _compared(models, prefill, rate, rounds)


def _models(shape: str, dtype: torch.dtype, lookback: int) -> dict[str, Any]:
    """The unwrapped model and the wrapped ones, all on the same weights."""
    plain = random_model(shape, dtype)
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    wrapped = {
        way: cdsurgery.wrap(copy.deepcopy(plain, dict(shared)), lookback=lookback, **options)
        for way, options in WAYS.items()
    }
    return {"unwrapped": plain, **wrapped}


def _filled_cache(model: Any, batch: int, context: int) -> DynamicCache:
    config, cache = model.config, DynamicCache(config=model.config)
    heads = config.num_key_value_heads or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        state = torch.randn(batch, heads, context, width, dtype=model.dtype, device=model.device)
        cache.update(state, state, layer)
    return cache


def _compared(
    models: dict[str, Any], work: Callable[[Any], Callable[[], object]], rate: float, rounds: int
) -> list[Timing]:
    with torch.no_grad(), scheduled(rate):
        return interleaved({name: work(model) for name, model in models.items()}, rounds)
