"""K, the batch and the vocabulary grow one at a time -> what each candidate, row and entry more costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.machine import GPU, Limits
from benchmarks.models import bytes_of, decode_step, filled_cache, on_shared_weights, wrapped
from benchmarks.picture import overhead_picture
from benchmarks.report import Cell, Table
from benchmarks.roofline import Roofline
from benchmarks.schedule import scheduled
from benchmarks.setting import Setting
from benchmarks.shapes import random_model
from cdsurgery.timing import Timing, interleaved

LOOKBACKS, BATCHES, SHARES = (1, 2, 5, 10, 20), (1, 2, 4, 8, 16), (0.25, 0.5, 1.0)
SCANS = ("full", "fused") if GPU else ("lazy", "full", "fused")  # as of `step_ways`
Point = tuple[int, int, int]  # rows, K, entries of the vocabulary


def sweep(setting: Setting, limits: Limits) -> Table:
    """Decode steps at all points in turns, and straight lines through what they take beyond the unwrapped step."""
    plain = random_model(setting.shape, setting.torch_dtype)
    whole, usual = plain.get_output_embeddings().weight.shape[0], setting.lookback
    # Axes cross where everything is as usual; a point of several is timed once.
    axes: dict[str, dict[int, Point]] = {
        "batch": {batch: (batch, usual, whole) for batch in BATCHES},
        "K": {k: (1, k, whole) for k in LOOKBACKS if k < plain.config.num_hidden_layers},
        "V": {size: (1, usual, size) for size in (int(share * whole) for share in SHARES)},
    }
    caches = {batch: filled_cache(plain, batch, setting.context) for batch in BATCHES}
    unwrapped = {size: with_vocabulary(plain, size) for size in axes["V"]}

    @functools.cache
    def model_of(k: int, size: int, way: str) -> Any:
        return wrapped(unwrapped[size], k, way)

    ways: dict[tuple[Point, str], Callable[[], object]] = {}
    with torch.no_grad(), scheduled(setting.rate):
        for batch, k, size in (point for points in axes.values() for point in points.values()):
            models = {"unwrapped": unwrapped[size]} | {way: model_of(k, size, way) for way in SCANS}
            for way, model in models.items():
                at = (batch, 0 if way == "unwrapped" else k, size)
                ways[at, way] = decode_step(model, caches[batch], batch)
        timings = interleaved({repr(key): way for key, way in ways.items()}, setting.rounds)
    found = dict(zip(ways, timings, strict=True))
    roofline = Roofline(plain, limits)
    least = {
        (batch, k, size): roofline.steps(batch, bytes_of(caches[batch]), k, setting.rate)
        for axis in ("batch", "K")
        for batch, k, size in axes[axis].values()
    }
    return _table(axes, found, least)


def _table(
    axes: dict[str, dict[int, Point]], found: dict[tuple[Point, str], Timing], least: dict[Point, dict[str, float]]
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    beyond: dict[tuple[str, str], list[tuple[int, float]]] = {}
    overheads: dict[str, list[tuple[int, float, float]]] = {}
    for axis, value, way in ((axis, value, way) for axis, points in axes.items() for value in points for way in SCANS):
        batch, k, size = axes[axis][value]
        timing, unwrapped = found[(batch, k, size), way], found[(batch, 0, size), "unwrapped"]
        ratio, limit = timing.milliseconds / unwrapped.milliseconds, None
        if axis != "V":
            steps = least[batch, k, size]
            limit = steps[way] / steps["unwrapped"]
            if axis == "batch":
                overheads.setdefault(way, []).append((batch, ratio - 1, limit - 1))
        rows.append((axis, value, way, ratio, limit, timing.milliseconds))
        beyond.setdefault((axis, way), []).append((value, timing.ratio - unwrapped.ratio))
    units = {"batch": (1, "row"), "K": (1, "candidate"), "V": (1000, "thousand entries of the vocabulary")}
    notes = [
        f"{way}: one {units[axis][1]} more costs {100 * units[axis][0] * slope(points):.2g} % of the unwrapped step of "
        "one row."
        for (axis, way), points in beyond.items()
    ]
    columns = ("axis", "value", "way", "ratio", "ratio of the roofline", "ms, here and now")
    return Table(columns, rows, tuple(notes), overhead_picture(overheads))


def slope(points: list[tuple[int, float]]) -> float:
    """Of the straight line nearest to (value, cost), by least squares."""
    values, costs = np.array(points).T
    return float(np.polyfit(values, costs, 1)[0])


def with_vocabulary(plain: Any, size: int) -> Any:
    """The same model with the first `size` rows of its unembedding."""
    model = on_shared_weights(plain)
    head = model.get_output_embeddings()
    smaller = nn.Linear(head.in_features, size, bias=False, device="meta")
    smaller.weight = nn.Parameter(head.weight[:size], requires_grad=False)
    model.set_output_embeddings(smaller)
    return model
