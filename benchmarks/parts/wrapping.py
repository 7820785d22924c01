"""A loaded model -> the seconds that `wrap` takes: it finds the parts, and proves them on a few tokens."""

from __future__ import annotations

import torch

import cdsurgery
from benchmarks.machine import Limits, best
from benchmarks.report import Table
from benchmarks.setting import Setting
from benchmarks.shapes import random_model


def seconds(setting: Setting, _limits: Limits) -> Table:
    """Of `wrap`, beside those of one forward over one token, which reads all weights once."""
    model = random_model(setting.shape, setting.torch_dtype)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        forward = best(lambda: model(token), runs=3)

    def wrap_and_unwrap() -> None:
        cdsurgery.unwrap(cdsurgery.wrap(model, lookback=setting.lookback))

    parameters = sum(weight.numel() for weight in model.parameters()) / 1e9
    rows = [(setting.shape, parameters, best(wrap_and_unwrap, runs=3), forward)]
    return Table(("shape", "parameters, 1e9", "wrap, s", "one token, s"), rows)
