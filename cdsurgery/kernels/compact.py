"""Which rows count -> an order in which those come first: `cdsurgery::compact` in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cdsurgery.errors import InvalidInputError

# A GPU takes so many rows in one program; more, which no decode step has, are sorted.
MOST_ROWS = 8192


@torch.library.custom_op(
    "cdsurgery::compact",
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema="(Tensor counts) -> (Tensor, Tensor, Tensor)",
)
def compact(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An order of rows in which those that count come first; each of both parts keeps its own order.

    Args:
        counts: `[N]` bool.

    Returns:
        order `[N]` int64, the place of each row before; place `[N]` int64, that of each in the order; active `[]`
        int64, how many count.

    Raises:
        InvalidInputError: counts is something else.
    """
    if counts.ndim != 1 or counts.dtype != torch.bool:
        raise InvalidInputError(f"compact got {list(counts.shape)} {counts.dtype}. It takes a bool for each row, [N].")
    if counts.is_cuda and len(counts) <= MOST_ROWS:
        from cdsurgery.kernels.launch import launch_compact  # imports Triton

        order, place, active = _shapes(counts)
        launch_compact(counts.contiguous(), order, place, active)
        return order, place, active
    order = counts.logical_not().argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, place, counts.sum()


@compact.register_fake
def _shapes(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    order, place = (counts.new_empty(counts.shape, dtype=torch.int64) for _ in range(2))
    return order, place, counts.new_empty((), dtype=torch.int64)
