"""K, the batch and the vocabulary grow one at a time -> what each candidate, row and entry more costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import cdsurgery
from benchmarks.machine import Limits
from benchmarks.models import WAYS, decode_step, filled_cache, on_shared_weights
from benchmarks.picture import overhead_picture
from benchmarks.report import Cell, Table
from benchmarks.roofline import Roofline
from benchmarks.schedule import scheduled
from benchmarks.setting import Setting
from benchmarks.shapes import random_model
from benchmarks.timing import Timing, interleaved

LOOKBACKS, BATCHES, SHARES = (1, 2, 5, 10, 20), (1, 2, 4, 8, 16), (0.25, 0.5, 1.0)
SCANS = ("lazy", "full")
Point = tuple[str, int, str]  # axis, its value, way


def sweep(setting: Setting, limits: Limits) -> Table:
    """Decode steps at all points in turns, and straight lines through what they take beyond the unwrapped step."""
    plain = random_model(setting.shape, setting.torch_dtype)
    vocabulary, layers = plain.get_output_embeddings().weight.shape[0], plain.config.num_hidden_layers
    lookbacks = [k for k in LOOKBACKS if k < layers]
    caches = {batch: filled_cache(plain, batch, setting.context) for batch in {setting.batch, *BATCHES}}
    usual = {scan: _wrap(plain, setting.lookback, scan) for scan in SCANS}
    ways: dict[Point, Callable[[], object]] = {}
    for batch in BATCHES:
        models = {"unwrapped": plain} | usual
        ways |= {("batch", batch, way): decode_step(model, caches[batch], batch) for way, model in models.items()}
    for k in lookbacks:
        models = {scan: _wrap(plain, k, scan) for scan in SCANS}
        ways |= {("K", k, way): decode_step(model, caches[1], 1) for way, model in models.items()}
    for size in (int(share * vocabulary) for share in SHARES):
        smaller = with_vocabulary(plain, size)
        models = {"unwrapped": smaller} | {scan: _wrap(smaller, setting.lookback, scan) for scan in SCANS}
        ways |= {("V", size, way): decode_step(model, caches[1], 1) for way, model in models.items()}
    with torch.no_grad(), scheduled(setting.rate):
        found = dict(zip(ways, interleaved({repr(point): way for point, way in ways.items()}, setting.rounds),
                         strict=True))  # fmt: skip
    return _table(found, setting, Roofline(plain, limits))


def _table(found: dict[Point, Timing], setting: Setting, roofline: Roofline) -> Table:
    rows: list[tuple[Cell, ...]] = []
    beyond: dict[tuple[str, str], list[tuple[int, float]]] = {}
    overheads: dict[str, list[tuple[int, float, float]]] = {}
    for (axis, value, way), timing in found.items():
        if way == "unwrapped":
            continue
        unwrapped = found.get((axis, value, "unwrapped"), found["batch", 1, "unwrapped"])
        ratio, limit = timing.milliseconds / unwrapped.milliseconds, None
        if axis != "V":
            batch, k = (value, setting.lookback) if axis == "batch" else (1, value)
            steps = roofline.steps(batch, setting.context, k, setting.rate)
            limit = steps[way] / steps["unwrapped"]
            if axis == "batch":
                overheads.setdefault(way, []).append((batch, ratio - 1, limit - 1))
        rows.append((axis, value, way, ratio, limit, timing.milliseconds))
        beyond.setdefault((axis, way), []).append((value, timing.ratio - unwrapped.ratio))
    names = {"K": "candidate", "batch": "row", "V": "entry of the vocabulary"}
    notes = [
        f"{way}: a {names[axis]} more costs {100 * slope(points):.3g} % of the unwrapped step of one row."
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


def _wrap(plain: Any, lookback: int, scan: str) -> Any:
    return cdsurgery.wrap(on_shared_weights(plain), lookback=lookback, **WAYS[scan])
