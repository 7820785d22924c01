"""`pick_trough` and `pick_further`, in PyTorch and as kernels, against a literal loop over one row's entropies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdsurgery import InvalidInputError
from cdsurgery.kernels.pick_trough import pick_further, pick_trough

pytest.importorskip("triton", reason="Triton is for Linux only")
from cdsurgery.kernels.launch import PART, launch_pick, launch_pick_further

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


def further_kernel(depth: Tensor, chosen: Tensor, entropy: Tensor, *rest: Tensor) -> Picked:
    """The kernel of `pick_further` in the interpreter."""
    from interpreter import interpreted

    new_depth = torch.full_like(depth, 99)
    new_entropy = torch.full((len(entropy) + rest[1].shape[1], len(depth)), 99.0)
    with interpreted():
        launch_pick_further(depth, chosen, entropy, *rest, new_depth, new_entropy)
    return new_depth, new_entropy


def further_on_gpu(depth: Tensor, chosen: Tensor, *rest: Tensor) -> Picked:
    """`pick_further` on a GPU."""
    there = chosen.cuda()
    found = pick_further(depth.cuda(), there, *(one.cuda() for one in rest))
    chosen.copy_(there)
    return found[0].cpu(), found[1].cpu()


def ways(in_interpreter: Any, in_pytorch: Any, there: Any) -> list[Any]:
    no_gpu = pytest.mark.skipif(not has_gpu, reason="needs a CUDA device")
    return [
        pytest.param(in_interpreter, id="interpreter", marks=pytest.mark.skipif(has_gpu, reason="it is compiled here")),
        pytest.param(in_pytorch, id="pytorch"),
        pytest.param(there, id="gpu", marks=[pytest.mark.gpu, no_gpu]),
    ]


WAYS = ways(kernel, pick_trough, on_gpu)


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


@pytest.mark.parametrize("way", ways(further_kernel, pick_further, further_on_gpu))
@pytest.mark.parametrize(
    ("read", "layers", "rows", "vocabulary", "dtype"),
    [
        (2, 1, 1, 5, torch.float32),
        (2, 9, 8, 300, torch.bfloat16),
        (4, 3, 9, PART + 77, torch.float16),
        (3, 30, 4, 64, torch.float32),
    ],
    ids=str,
)
def test_rows_that_went_as_far_as_was_read_go_on_and_no_other(
    way: Callable[..., Picked], read: int, layers: int, rows: int, vocabulary: int, dtype: torch.dtype
) -> None:
    entropy, products = given(read + layers, rows, vocabulary, dtype)
    may = (torch.arange(rows) % 4 != 2) | (torch.arange(rows) == rows - 1)
    depth, chosen = pick_trough(entropy[:read].contiguous(), products[: read * rows].contiguous(), may)
    before = chosen.clone()
    place = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    deeper, theirs = torch.empty(rows, layers), torch.empty(rows, layers, vocabulary, dtype=dtype)
    deeper[place] = entropy[read:].T
    theirs[place] = products[read * rows :].unflatten(0, (layers, rows)).movedim(0, 1)
    new_depth, new_entropy = way(depth, chosen, entropy[:read].contiguous(), place, deeper, theirs.flatten(0, 1))
    free = zip(entropy.T.tolist(), may.tolist(), strict=True)
    true = [true_depth(one, allowed) for one, allowed in free]
    assert new_depth.tolist() == true
    assert true[-1] == read + layers - 1
    assert rows < 8 or min(true) < read - 1
    expected = entropy.clone()
    expected[read:, depth < read - 1] = NAN
    torch.testing.assert_close(new_entropy, expected, rtol=0, atol=0, equal_nan=True)
    for row, back in enumerate(true):
        stands = products[back * rows + row] if back >= read else before[row]
        torch.testing.assert_close(chosen[row], stands, rtol=0, atol=0, equal_nan=True)


def test_pytorch_takes_them_for_operators_like_its_own() -> None:
    entropy, products = torch.rand(4, 3), torch.rand(12, 20)
    for allowed in (None, torch.tensor([True, False, True])):
        torch.library.opcheck(pick_trough, (entropy, products, allowed))
    # All rows go on, as the check takes no NaN for another.
    rows = (torch.full((3,), 3), torch.rand(3, 20), entropy, torch.tensor([2, 0, 1]), torch.rand(3, 2), products[:6])
    torch.library.opcheck(pick_further, rows)


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
    with pytest.raises(
        InvalidInputError, match=r"pick_trough got \[.* It takes \[A, R\] in float32, .* all contiguous"
    ):
        pick_trough(*misfit)


FURTHER: dict[str, Any] = {
    "place": 3,
    "deeper": 4,
    "products": 5,
    "chosen": 1,
}


@pytest.mark.parametrize("at", FURTHER.values(), ids=FURTHER.keys())
def test_tensors_that_do_not_fit_a_later_reading_are_refused(at: int) -> None:
    numbers = torch.zeros(3, dtype=torch.int64)
    fitting = [numbers, torch.zeros(3, 9), torch.zeros(2, 3), numbers, torch.zeros(3, 4), torch.zeros(12, 9)]
    pick_further(*fitting)
    fitting[at] = fitting[at][1:].contiguous()
    with pytest.raises(InvalidInputError, match=r"pick_further got \[.* It takes int64 \[R\], .* all contiguous"):
        pick_further(*fitting)
