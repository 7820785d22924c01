"""Decode steps in ONNX Runtime: the graph without candidates, with all of them, and with those that rows come to."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import cdsurgery
from benchmarks.machine import Limits
from benchmarks.models import bytes_of, filled_cache
from benchmarks.plain import plain_artifact
from benchmarks.report import Table, compared
from benchmarks.roofline import Roofline
from benchmarks.setting import Setting
from benchmarks.shapes import random_model
from cdsurgery import export
from cdsurgery.timing import interleaved


def decode_steps(setting: Setting, limits: Limits) -> Table:
    """One new token a row on a cache of `context` tokens.

    Random weights move nearly every row by a layer or more, so the draw of `probability` decides how many do: `rate`.
    """
    plain = random_model(setting.shape, setting.torch_dtype)
    cache = bytes_of(filled_cache(plain, setting.batch, setting.context))
    steps = Roofline(plain, limits).steps(setting.batch, cache, setting.lookback, setting.rate)
    model = cdsurgery.wrap(plain, lookback=setting.lookback, probability=setting.rate, seed=0)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        artifacts = {"unwrapped": Path(place) / "unwrapped"}
        print("exporting unwrapped ..", file=sys.stderr, flush=True)
        plain_artifact(model, artifacts["unwrapped"], target="cpu")
        for way, scan in (("lazy", "lazy"), ("full", "static")):
            print(f"exporting {way} ..", file=sys.stderr, flush=True)
            artifacts[way] = Path(place) / way
            export.to_onnx(model, artifacts[way], target="cpu", scan=scan, parity=False)  # type: ignore[arg-type]
        del model, plain
        ways = {way: _step(path, setting.batch, setting.context) for way, path in artifacts.items()}
        return compared(interleaved(ways, setting.rounds), steps)


def _step(folder: Path, batch: int, context: int) -> Callable[[], object]:
    """Decode on from a prompt, a token at each call."""
    runner = export.load(folder)
    token = torch.zeros(batch, 1, dtype=torch.int64)
    cache = [runner(torch.zeros(batch, context, dtype=torch.int64)).past_key_values]

    def step() -> None:
        cache[0] = runner(token, past_key_values=cache[0]).past_key_values

    return step
