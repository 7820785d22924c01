"""`pick_trough`, in PyTorch and as a kernel, against a literal loop over one row's entropies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdsurgery import InvalidInputError
from cdsurgery.kernels.pick_trough import pick_trough

pytest.importorskip("triton", reason="Triton is for Linux only")
from cdsurgery.kernels.launch import PART, launch_pick

NAN, INF = float("nan"), float("inf")
has_gpu = torch.cuda.is_available()

Picked = tuple[Tensor, Tensor]


def kernel(entropy: Tensor, products: Tensor, allowed: Tensor | None) -> Picked:
    """The kernel in Triton's interpreter, on results that hold something else before."""
    from interpreter import interpreted

    depth = torch.full(entropy.shape[1:], 99)
    chosen = torch.full((len(depth), products.shape[1]), 99, dtype=products.dtype)
    with interpreted():
        launch_pick(entropy, products, allowed, depth, chosen)
    return depth, chosen


def on_gpu(*given: Tensor | None) -> Picked:
    """The operator on a GPU."""
    depth, chosen = pick_trough(*(None if one is None else one.cuda() for one in given))
    return depth.cpu(), chosen.cpu()


WAYS = [
    pytest.param(kernel, id="interpreter", marks=pytest.mark.skipif(has_gpu, reason="kernels are compiled here")),
    pytest.param(pick_trough, id="pytorch"),
    pytest.param(
        on_gpu, id="gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not has_gpu, reason="needs a CUDA device")]
    ),
]


def true_depth(entropies: list[float], allowed: bool) -> int:
    depth = 0
    while allowed and depth + 1 < len(entropies) and entropies[depth + 1] < entropies[depth]:
        depth += 1
    return depth


def given(layers: int, rows: int, vocabulary: int, dtype: torch.dtype) -> Picked:
    """Entropies that descend for any number of layers, ties and broken ones among them; products unlike each other."""
    generator = torch.Generator().manual_seed(layers * rows)
    entropy = torch.randint(0, 4, (layers, rows), generator=generator).float()
    entropy[:, rows // 2 :] += torch.arange(layers, 0, -1)[:, None] * 3
    entropy[torch.rand(layers, rows, generator=generator) < 0.1] = NAN
    entropy[torch.rand(layers, rows, generator=generator) < 0.05] = INF
    entropy[:, -1] = torch.arange(layers, 0, -1)  # all the way
    products = torch.arange(layers * rows)[:, None] * 7 + torch.arange(vocabulary) % 5
    products = products.to(dtype)
    products[0, 0], products[-1, -1] = NAN, -INF
    return entropy, products


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("layers", "rows", "vocabulary", "dtype"),
    [
        (1, 3, 5, torch.float32),
        (2, 1, PART, torch.bfloat16),
        (5, 8, 300, torch.float16),
        (11, 9, PART + 77, torch.float32),
        (33, 4, 64, torch.bfloat16),
    ],
    ids=str,
)
def test_every_row_gets_its_first_trough_and_what_stands_there(
    way: Callable[..., Picked], layers: int, rows: int, vocabulary: int, dtype: torch.dtype
) -> None:
    entropy, products = given(layers, rows, vocabulary, dtype)
    for allowed in (None, torch.arange(rows) % 2 == (rows - 1) % 2, torch.zeros(rows, dtype=torch.bool)):
        depth, chosen = way(entropy, products, allowed)
        may = [True] * rows if allowed is None else allowed.tolist()
        true = [true_depth(one, free) for one, free in zip(entropy.T.tolist(), may, strict=True)]
        assert depth.tolist() == true
        assert (depth.dtype, chosen.dtype) == (torch.int64, dtype)
        for row, back in enumerate(true):
            torch.testing.assert_close(chosen[row], products[back * rows + row], rtol=0, atol=0, equal_nan=True)
    assert true_depth(entropy[:, -1].tolist(), True) == layers - 1


@pytest.mark.parametrize("way", WAYS)
def test_no_rows_are_none(way: Callable[..., Picked]) -> None:
    depth, chosen = way(torch.zeros(4, 0), torch.zeros(0, 9), None)
    assert (depth.shape, chosen.shape) == ((0,), (0, 9))


def test_pytorch_takes_it_for_an_operator_like_its_own() -> None:
    entropy, products = torch.rand(4, 3), torch.rand(12, 20)
    for allowed in (None, torch.tensor([True, False, True])):
        torch.library.opcheck(pick_trough, (entropy, products, allowed))


def test_it_exports_and_compiles_whole_for_any_number_of_rows() -> None:
    class Pick(nn.Module):
        def forward(self, entropy: Tensor, products: Tensor) -> Picked:
            depth, chosen = pick_trough(entropy, products, entropy[0] > 0)
            return 9 - depth, chosen * 2

    rows = torch.export.Dim("rows", min=2)
    shapes = ({1: rows}, {0: 4 * rows})
    entropy, products = given(4, 3, 20, torch.float32)
    graph = torch.export.export(Pick(), (entropy, products), dynamic_shapes=shapes).module()
    compiled = torch.compile(Pick(), backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (3, 7):
        inputs = given(4, count, 20, torch.float32)
        for function in (graph, compiled):
            for found, true in zip(function(*inputs), Pick()(*inputs), strict=True):
                torch.testing.assert_close(found, true, rtol=0, atol=0, equal_nan=True)


MISFITS: dict[str, Any] = {
    "rows": (torch.zeros(4, 3), torch.zeros(11, 9), None),
    "axes": (torch.zeros(4, 3, 1), torch.zeros(12, 9), None),
    "float16": (torch.zeros(4, 3).half(), torch.zeros(12, 9), None),
    "strides": (torch.zeros(3, 4).T, torch.zeros(12, 9), None),
    "columns": (torch.zeros(4, 3), torch.zeros(9, 12).T, None),
    "numbers": (torch.zeros(4, 3), torch.zeros(12, 9), torch.ones(3)),
    "more rows": (torch.zeros(4, 3), torch.zeros(12, 9), torch.ones(4, dtype=torch.bool)),
    "no layers": (torch.zeros(0, 3), torch.zeros(0, 9), None),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS.keys())
def test_tensors_that_do_not_fit_are_refused(misfit: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"pick_trough got \[.* It takes entropies \[M, R\] in float32"):
        pick_trough(*misfit)
