"""`compact`, in PyTorch and as a kernel: rows that count come first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cdsurgery.kernels.compact
from cdsurgery import InvalidInputError
from cdsurgery.kernels.compact import compact

pytest.importorskip("triton", reason="Triton is for Linux only")
from cdsurgery.kernels.launch import launch_compact

has_gpu = torch.cuda.is_available()

Compacted = tuple[Tensor, Tensor, Tensor]


def kernel(counts: Tensor) -> Compacted:
    """The kernel in Triton's interpreter."""
    from interpreter import interpreted

    order, place, active = torch.full((len(counts),), 99), torch.full((len(counts),), 99), torch.tensor(99)
    with interpreted():
        launch_compact(counts, order, place, active)
    return order, place, active


def on_gpu(counts: Tensor) -> Compacted:
    """The operator on a GPU."""
    order, place, active = compact(counts.cuda())
    return order.cpu(), place.cpu(), active.cpu()


def sorted_on_gpu(counts: Tensor) -> Compacted:
    """The same of more rows than its kernel takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cdsurgery.kernels.compact, "MOST_ROWS", 0)
        return on_gpu(counts)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu, reason="needs a CUDA device")]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(kernel, id="interpreter", marks=pytest.mark.skipif(has_gpu, reason="it is compiled here")),
        pytest.param(compact, id="pytorch"),
        pytest.param(on_gpu, id="gpu", marks=GPU),
        pytest.param(sorted_on_gpu, id="gpu, sorted", marks=GPU),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 128, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_rows_that_count_come_first_and_each_part_keeps_its_order(
    way: Callable[[Tensor], Compacted], rows: int, share: float
) -> None:
    counts = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < share
    order, place, active = way(counts)
    flags = counts.tolist()
    true = [row for row in range(rows) if flags[row]] + [row for row in range(rows) if not flags[row]]
    assert order.tolist() == true
    assert [true[at] for at in place.tolist()] == list(range(rows))
    assert (active.shape, int(active)) == ((), sum(flags))


def test_pytorch_takes_it_for_an_operator_like_its_own() -> None:
    torch.library.opcheck(compact, (torch.tensor([False, True, False, True]),))


@pytest.mark.parametrize("counts", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.bool)], ids=["numbers", "axes"])
def test_what_is_no_bool_for_each_row_is_refused(counts: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"compact got \[3.* It takes a bool for each row, \[N\]"):
        compact(counts)
