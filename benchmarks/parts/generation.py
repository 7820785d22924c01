"""Whole texts by `generate`: the unwrapped model, the wrapped ones, and DoLa."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.machine import Limits
from benchmarks.models import wrapped_ways
from benchmarks.parts import dola
from benchmarks.report import Table, compared
from benchmarks.schedule import scheduled
from benchmarks.setting import Setting
from benchmarks.shapes import random_model
from benchmarks.text import writing
from cdsurgery.timing import interleaved


def generations(setting: Setting, _limits: Limits) -> Table:
    """`new` tokens after prompts of `context` tokens; `rate` of them move by a layer."""
    models = wrapped_ways(random_model(setting.shape, setting.torch_dtype), setting.lookback)
    with scheduled(setting.rate):
        timings = interleaved({way: writing(model, setting) for way, model in models.items()}, setting.rounds)
    del models
    note = "DoLa is transformers' own, of an older version, against the unwrapped model there."
    try:
        timings += dola.generations(setting)
    except FileNotFoundError as error:
        note = f"DoLa was not measured: {error}"
    return replace(compared(timings), notes=(note,))
