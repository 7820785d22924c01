"""Decode steps in ONNX Runtime's CPU: the graph without candidates, with all of them, and with a branch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import cdsurgery
from benchmarks.plain import plain_artifact
from benchmarks.shapes import random_model
from benchmarks.timing import Timing, interleaved
from cdsurgery import export


def decode_steps(shape: str, lookback: int, batch: int, context: int, rate: float, rounds: int) -> list[Timing]:
    """One new token on a cache of `context` tokens, float32.

    Random weights move nearly every row by a layer or more, so the draw of `probability` decides how many do: `rate`.
    """
    model = cdsurgery.wrap(random_model(shape, torch.float32), lookback=lookback, probability=rate, seed=0)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        artifacts = {"static": Path(folder) / "static", "lazy": Path(folder) / "lazy"}
        for scan, path in artifacts.items():
            export.to_onnx(model, path, target="cpu", scan=scan, parity=False)  # type: ignore[arg-type]
        plain = plain_artifact(model, Path(folder) / "plain", target="cpu")
        ways = {"no candidates": plain, **artifacts}
        return interleaved({name: _step(path, batch, context) for name, path in ways.items()}, rounds)


def _step(folder: Path, batch: int, context: int) -> Callable[[], object]:
    """Decode on from a prompt, a token at each call."""
    runner = export.load(folder)
    token = torch.zeros(batch, 1, dtype=torch.int64)
    cache = [runner(torch.zeros(batch, context, dtype=torch.int64)).past_key_values]

    def step() -> None:
        cache[0] = runner(token, past_key_values=cache[0]).past_key_values

    return step
