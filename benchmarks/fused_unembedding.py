"""Several rows times one unembedding: entropies by way of all logits, and in the one pass that `scan="fused"` makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.timing import Timing, interleaved
from cdsurgery.entropy import entropy, entropy_of_sums
from cdsurgery.kernels.unembed_sums import unembed_sums


def unembeddings(vocabulary: int, width: int, rows: int, dtype: torch.dtype, rounds: int) -> list[Timing]:
    """`[rows, width]` times `[vocabulary, width]`, on a GPU where there is one.

    Args:
        rows: M, or K where the final row is the model's own.

    Returns:
        Of one row's logits, as the unwrapped model makes them; of reading the weight once, the least that any of them
        can take; of all rows' logits and their entropies; of these entropies without the logits, and with them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Logits as far apart as a trained model's.
    weight = torch.randn(vocabulary, width, dtype=dtype, device=device) / width**0.5 * 4
    state = torch.randn(rows, width, dtype=dtype, device=device)

    def fused(write: bool) -> Tensor:
        maximum, _, s, t, _ = unembed_sums(state, weight, None, 1.0, None, dtype, write)
        return entropy_of_sums(maximum, s, t)

    ways = {
        "one row's logits": lambda: linear(state[:1], weight),
        "read W": weight.sum,
        "logits, then entropy": lambda: entropy(linear(state, weight)),
        "fused": lambda: fused(write=False),
        "fused, logits written": lambda: fused(write=True),
    }
    with torch.no_grad():
        return interleaved({name: finished(way, device) for name, way in ways.items()}, rounds)


def finished(way: Callable[[], object], device: str) -> Callable[[], object]:
    """The same, returning when the GPU is done."""

    def run() -> None:
        way()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
