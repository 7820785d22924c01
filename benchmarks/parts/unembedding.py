"""A few rows times one unembedding: the ways that PyTorch has, and the one that `cdsurgery.unembedding` takes."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from benchmarks.machine import Limits
from benchmarks.report import Table, compared
from benchmarks.setting import Setting
from benchmarks.shapes import config_of
from cdsurgery.timing import interleaved
from cdsurgery.unembedding import few_rows_linear


@torch.no_grad()
def products(setting: Setting, _limits: Limits) -> Table:
    """`[batch, D]` times `[V, D]`, float32."""
    config, rows = config_of(setting.shape), setting.batch
    weight, state = torch.randn(config.vocab_size, config.hidden_size), torch.randn(rows, config.hidden_size)
    several = state if rows > 1 else state.repeat(2, 1)
    ways = {
        "x @ W.T": lambda: linear(state, weight),
        "W @ x.T": lambda: (weight @ several.T).T[:rows],
        "few_rows_linear": lambda: few_rows_linear(state, weight, None),
        "read W": weight.sum,
    }
    return compared(interleaved(ways, setting.rounds))
