"""Decode steps in TensorRT: an engine with the confident head and one without, in turns on the same inputs. On a GPU.

Engines are of one new token a row on a cache of `context` tokens, of a wrapped model with random weights.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import cdsurgery
from benchmarks.machine import Limits
from benchmarks.plain import plain_artifact
from benchmarks.report import SPREAD, Cell, Table
from benchmarks.roofline import Roofline
from benchmarks.setting import Setting
from benchmarks.shapes import config_of, random_model
from cdsurgery import export
from cdsurgery.export.runtime.lengths import shape_of
from cdsurgery.export.signature import BATCH, PAST, SEQUENCE, TOTAL, Signature, torch_dtype
from cdsurgery.export.tensorrt import EngineSession
from cdsurgery.timing import interleaved

BATCHES = (1, 8, 32, 128)


def decode_steps(setting: Setting, limits: Limits) -> Table:
    """A row for each of `BATCHES`; where it does not fit into the GPU's memory, one that says so."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        sessions = _engines(setting, Path(place))
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config_of(setting.shape), dtype=setting.torch_dtype)
        roofline = Roofline(shapes, limits)
        rows: list[tuple[Cell, ...]] = []
        for batch in BATCHES:
            try:
                feed = decode_feed(next(iter(sessions.values())).signature, batch, setting.context, "cuda")
                timings = interleaved({way: _run(session, feed) for way, session in sessions.items()}, setting.rounds)
            except torch.OutOfMemoryError:
                rows.append((batch, "does not fit", None, None, None, None))
                continue
            cache = sum(feed[spec.name].nbytes for spec in next(iter(sessions.values())).signature.past)
            found, steps = timings[1], roofline.steps(batch, cache, setting.lookback, setting.rate)
            limit = steps["one pass"] / steps["unwrapped"]
            rows.append((batch, found.ratio, found.low, found.middle, found.high, limit, found.milliseconds))
    columns = ("batch", "ratio", *SPREAD, "ratio of the roofline", "ms, here and now")
    return Table(columns, rows)


def decode_feed(signature: Signature, batch: int, context: int, device: str) -> dict[str, torch.Tensor]:
    """One new token a row, on a cache of random numbers."""
    lengths = {BATCH: batch, SEQUENCE: 1, PAST: context, TOTAL: context + 1}
    feed = {}
    for spec in signature.inputs:
        shape, dtype = shape_of(spec.axes, lengths), torch_dtype(spec)
        filling = {"attention_mask": 1, "position_ids": context, "input_ids": 7}.get(spec.name)
        feed[spec.name] = (
            torch.randn(shape, device=device).to(dtype)
            if filling is None
            else torch.full(shape, filling, dtype=dtype, device=device)
        )
    return feed


def _engines(setting: Setting, place: Path) -> dict[str, EngineSession]:
    model = cdsurgery.wrap(random_model(setting.shape, setting.torch_dtype), lookback=setting.lookback)
    plain_artifact(model, place / "unwrapped")
    export.to_onnx(model, place / "confident", parity=False)
    del model
    torch.cuda.empty_cache()
    sessions = {}
    for way in ("unwrapped", "confident"):
        print(f"building {way} ..", file=sys.stderr, flush=True)
        export.to_tensorrt(place / way, place / f"{way}-engine", batch=max(BATCHES), sequence=1, past=setting.context)
        shutil.rmtree(place / way)  # 16 GB of an 8B model, and as many of its engine
        sessions[way] = EngineSession(place / f"{way}-engine")
    return sessions


def _run(session: EngineSession, feed: dict[str, Any]) -> Callable[[], object]:
    return lambda: session.run(feed)
