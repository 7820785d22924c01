"""A trigger rate -> rows that descend as often as that, whatever random weights would have them do.

Entropies are computed as ever, so that they cost what they cost; only then are others put in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from cdsurgery.entropy import MEASURES
from cdsurgery.kernels.pick_trough import pick_further, pick_trough


class Schedule:
    """A measure whose rows move one layer back with a given probability, and no further.

    The paper's 11.5 % of tokens that move, with a mean depth of 0.116, are such rows (arXiv 2606.21906, table 5).

    Args:
        rate: in [0, 1].
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.generator = rate, torch.Generator().manual_seed(0)
        self.calls = 0
        self._entropies: dict[torch.Size, Tensor] = {}

    def __call__(self, logits: Tensor) -> Tensor:
        """`[B, T, V]`, then `[K, B, T, V]` of all candidates before, or `[R, V]` of each in turn -> without V."""
        measured = _entropy(logits)
        if measured.ndim == 3:
            scheduled = torch.full_like(measured, 2.0)
            scheduled[0] = torch.where(self._moving(measured[0]), 0.5, 2.0)
            return scheduled
        if measured.ndim == 2:
            self.calls = 0
            return torch.full_like(measured, 1.0)
        self.calls += 1
        return torch.where(self._moving(measured) & (self.calls == 1), 0.5, 2.0)

    def depth(self, entropy: Tensor, _allowed: Tensor | None) -> Tensor:
        """`[B, T, M]` -> `[B, T]`, in place of the depth that a fused scan finds in its first reading."""
        return self._moving(entropy[..., 0]).long()

    def pick(self, entropy: Tensor, products: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """`pick_trough`, which finds that depth itself where all products were written, on other entropies."""
        if entropy.shape not in self._entropies:
            self._entropies[entropy.shape] = torch.full_like(entropy, 2.0)
            self._entropies[entropy.shape][0] = 1.0
        others = self._entropies[entropy.shape]
        # Below 1 as often as the rate says; in place, so that a captured step has one operation more and no other.
        others[1:2].uniform_(1 - self.rate, 2 - self.rate, generator=self._generator_of(entropy))
        return pick_trough(others, products, allowed)

    @staticmethod
    def pick_no_further(*given: Tensor) -> tuple[Tensor, Tensor]:
        """`pick_further`, of which the same is true."""
        *rows, deeper, products = given
        return pick_further(*rows, torch.full_like(deeper, float("inf")), products)

    @staticmethod
    def further(entropy: Tensor) -> Tensor:
        """The same of a later reading: no row of those that it has goes on."""
        return torch.ones_like(entropy[..., 0], dtype=torch.int64)

    def _moving(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self._generator_of(like), device=like.device) < self.rate

    def _generator_of(self, tensor: Tensor) -> torch.Generator | None:
        # Of a GPU's own generator each replay of a captured step draws other numbers.
        return self.generator if tensor.is_cpu else None


_entropy = MEASURES["entropy"]


@contextmanager
def scheduled(rate: float) -> Iterator[None]:
    """Let wrapped models select by a `Schedule` instead of by entropy."""
    schedule = Schedule(rate)
    written = {"pick_trough": schedule.pick, "pick_further": schedule.pick_no_further}
    projected_again = {"allowed_depth": schedule.depth, "trough_depth": schedule.further}
    with (
        patch.dict(MEASURES, {"entropy": schedule}),
        patch.multiple("cdsurgery.one_pass", **written, **projected_again),
    ):
        yield
