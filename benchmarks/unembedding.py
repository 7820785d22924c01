"""A few rows times one unembedding: the ways that PyTorch has, and the one that `cdsurgery.unembedding` takes."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from benchmarks.timing import Timing, interleaved


def products(vocabulary: int, width: int, rows: int, rounds: int) -> list[Timing]:
    """`[rows, width]` times `[vocabulary, width]`, float32."""
    weight, state = torch.randn(vocabulary, width), torch.randn(rows, width)
    several = state if rows > 1 else state.repeat(2, 1)
    return interleaved(
        {
            "x @ W.T": lambda: linear(state, weight),
            "W @ x.T": lambda: (weight @ several.T).T[:rows],
            "read W": weight.sum,
        },
        rounds,
    )
