"""Decode steps and prefills in PyTorch: the unwrapped model, the wrapped one, and the authors' published step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.machine import Limits
from benchmarks.models import bytes_of, decode_step, filled_cache, step_ways, wrapped_ways
from benchmarks.report import Table, compared
from benchmarks.roofline import Roofline
from benchmarks.schedule import scheduled
from benchmarks.setting import Setting
from benchmarks.shapes import random_model
from cdsurgery.timing import finish, interleaved


def decode_steps(setting: Setting, limits: Limits) -> Table:
    """One new token a row on a cache of `context` tokens; `rate` of the rows move by one layer."""
    plain = random_model(setting.shape, setting.torch_dtype)
    return _decode_steps(plain, step_ways(plain, setting.lookback), setting, limits)


def compiled_steps(setting: Setting, limits: Limits) -> Table:
    """The same of models that torch.compile compiles, each; a compiled step goes by no value, so none is "lazy"."""
    plain = random_model(setting.shape, setting.torch_dtype)
    ways = wrapped_ways(plain, setting.lookback)
    compiled = {way: torch.compile(model, dynamic=False) for way, model in ways.items() if way != "lazy"}
    return _decode_steps(plain, compiled, setting, limits)


def _decode_steps(plain: Any, models: dict[str, Any], setting: Setting, limits: Limits) -> Table:
    cache = filled_cache(plain, setting.batch, setting.context)
    steps = Roofline(plain, limits).steps(setting.batch, bytes_of(cache), setting.lookback, setting.rate)
    timings = _in_turns(models, setting, lambda model: decode_step(model, cache, setting.batch))
    return compared(timings, steps | {"published": steps["full"]})


def prefills(setting: Setting, limits: Limits) -> Table:
    """A prompt of `context` tokens a row into an empty cache, of which the last one's logits are wanted.

    A machine that others share is not the same for two prompts. So it is also said how much longer the forward takes
    behind its last layer, where all that is added happens but for K slices of a row, in parts of the unwrapped prompt.
    """
    plain = random_model(setting.shape, setting.torch_dtype)
    steps = Roofline(plain, limits).steps(setting.batch, 0, setting.lookback, setting.rate, tokens=setting.context)
    models = wrapped_ways(plain, setting.lookback)
    last = models["full"].anatomy.layers[-1]
    behind: list[list[float]] = []  # of each model, of all its runs

    def prefill(model: Any) -> Callable[[], object]:
        ids = torch.zeros(setting.batch, setting.context, dtype=torch.int64, device=model.device)
        ends: list[float] = []
        own: list[float] = []
        behind.append(own)
        model.get_submodule(last).register_forward_hook(lambda *_: ends.append(_now()))

        def run() -> None:
            model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
            own.append(_now() - ends.pop())

        return run

    timings = _in_turns(models, setting, prefill)
    table = compared(timings, steps | {"published": steps["full"]})
    tails = [statistics.median(seconds[1:]) for seconds in behind]  # but of the run that is not counted
    added = [(tail - tails[0]) / (timings[0].milliseconds / 1e3) for tail in tails]
    rows = [(*row, share) for row, share in zip(table.rows, added, strict=True)]
    return Table((*table.columns, "more behind the last layer"), rows)


def _now() -> float:
    finish()
    return time.perf_counter()


def _in_turns(models: dict[str, Any], setting: Setting, work: Callable[[Any], Callable[[], object]]) -> Any:
    with torch.no_grad(), scheduled(setting.rate):
        return interleaved({name: work(model) for name, model in models.items()}, setting.rounds)
