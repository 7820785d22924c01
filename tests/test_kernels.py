"""`unembed_sums`, in PyTorch and as a kernel, against literal loops in float64 over all logits (`kernel_truth`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kernel_truth import (
    INF,
    NAN,
    RELATIVE,
    check,
    check_written,
    exact_inputs,
    has_gpu,
    kernel,
    launching,
    of_logits,
    product,
    truth,
    ways,
)
from torch import Tensor

from cdsurgery.kernels.unembed_sums import Sums

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 33, 300), (2, 64, 128), (11, 71, 257), (17, 128, 131), (70, 65, 200)]
)
def test_sums_of_awkward_sizes(
    way: Callable[..., Sums], rows: int, width: int, vocabulary: int, dtype: torch.dtype
) -> None:
    state, weight = exact_inputs(rows, width, vocabulary, dtype)
    found = way(state, weight)
    entropies = check(found, product(state, weight))
    assert rows == 1 or entropies.min() < 0.1 * entropies.max()
    for written in (rows, rows - rows // 3, 0):
        again = way(state, weight, written=written)
        assert again[-1].shape == (written, vocabulary)
        check_written(again, product(state, weight))
        for one, other in zip(found[:5], again[:5], strict=True):
            assert torch.equal(one, other)


@ways
@pytest.mark.parametrize("rows", [5, 70])  # one block of rows, and three of 32
@pytest.mark.parametrize("written", [True, False])
def test_rows_that_do_not_count_are_left_alone(way: Callable[..., Sums], rows: int, written: bool) -> None:
    state, weight = exact_inputs(rows, 24, 300, torch.float32)
    bias = torch.arange(300) / 4
    logits = product(state, weight) + bias
    for active in (0, 1, rows - 1, rows, rows // 2):
        entropy, maximum, index, s, t, products = way(state, weight, bias, written=written * rows, active=active)
        check((*(one[:active] for one in (entropy, maximum, index, s, t)), products), logits[:active])
        assert all(one.shape == (rows,) and one[active:].isnan().all() for one in (entropy, maximum, s, t))
        assert not index[active:].any()
        check_written((products[:active],), logits)


@ways
@pytest.mark.parametrize("counted", [1, 100, 127, 129, 256, 300])
def test_padding_of_the_vocabulary_is_written_and_not_measured(way: Callable[..., Sums], counted: int) -> None:
    state, weight = exact_inputs(3, 16, 300, torch.float32)
    weight[counted:] *= 16  # it would lead
    weight[-1:] *= NAN if counted < 300 else 1
    found = way(state, weight, counted=counted)
    check_written(found, product(state, weight))
    check(found, product(state, weight)[:, :counted])


def seen(way: Callable[..., Sums], products: Tensor, scale: float, softcap: float | None, widened: bool) -> Tensor:
    """The logits that are measured: each alone in a vocabulary of one entry is its row's maximum."""
    _, maximum, *_ = way(products.reshape(-1, 1), products.new_ones(1, 1), None, scale, softcap, widened)
    return maximum.view(products.shape)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_model_does_to_its_logits_is_rounded_where_it_rounds(
    way: Callable[..., Sums], dtype: torch.dtype
) -> None:
    state, weight = exact_inputs(3, 40, 40, dtype)
    bias = (torch.randint(-8, 9, (40,), generator=torch.Generator().manual_seed(1)) / 4).to(dtype)
    z = (state.double() @ weight.double().T + bias.double()).float().to(dtype)
    found = way(state, weight, bias)
    check_written(found, z)
    check(found, z)
    # A product with a float32 number and a rounding, as PyTorch does it in half precision.
    scaled = (z.float() * torch.tensor(0.7)).to(dtype)
    found = way(state, weight, bias, 0.7)
    check_written(found, z)
    check(found, scaled)
    capped = (torch.tanh((scaled.float() / 8).to(dtype).double()).to(dtype).float() * 8).to(dtype)
    assert (capped.abs() < 8).float().mean() > 0.2
    measured = seen(way, z, 0.7, 8.0, False)
    # tanh of float32 is a few units of 6e-8 off, times 8; in half precision that may round to a neighbour, once in
    # thousands.
    apart = (measured - capped.float()).abs()
    assert apart.max() <= (2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * 8)
    assert (apart > 2e-6).float().mean() < 0.02
    found = way(state, weight, bias, 0.7, 8.0)
    check_written(found, z)
    check(found, measured)
    # A model that widens its logits caps them in float32.
    measured = seen(way, z, 0.7, 8.0, True)
    torch.testing.assert_close(measured, (torch.tanh(0.7 * z.double() / 8) * 8).float(), rtol=0, atol=2e-6)
    found = way(state, weight, bias, 0.7, 8.0, True)
    check_written(found, z)
    check(found, measured)


@ways
def test_a_softcap_keeps_the_digits_of_small_and_of_large_logits(way: Callable[..., Sums]) -> None:
    rows = torch.stack([torch.logspace(-6, 3, 60), torch.linspace(-6, 6, 60)])
    true = torch.tanh(rows.double() / 8) * 8
    # Some units of 6e-8: of the quotient, of the polynomial or e^2x, and of the product.
    torch.testing.assert_close(seen(way, rows, 1.0, 8.0, False).double(), true, rtol=5e-7, atol=0)


@ways
def test_products_in_float32_have_all_its_digits(way: Callable[..., Sums]) -> None:
    generator = torch.Generator().manual_seed(3)
    state, weight = torch.randn(3, 70, generator=generator), torch.randn(200, 70, generator=generator)
    logits = state.double() @ weight.double().T
    *_, written = found = way(state, weight)
    # Sums of 70 products of size 1, and not of TensorFloat-32's ten bits, which would be off by 1e-2.
    torch.testing.assert_close(written.double(), logits, rtol=0, atol=1e-5)
    for row, measured in enumerate(found[0]):
        assert measured.item() == pytest.approx(truth(logits[row].tolist()).entropy, rel=2e-5)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_their_entropy_down_to_1e_7_nats(way: Callable[..., Sums], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(24, 300, generator=generator)
    place = torch.randint(300, (24, 1), generator=generator)
    rise = torch.linspace(0, math.log(300) + 21, 24)[:, None]
    rows = rows.scatter(-1, place, rows.amax(-1, keepdim=True) + rise).to(dtype)
    entropies = check(way(*of_logits(rows)), rows)
    assert entropies.min() < 1e-7
    assert entropies.max() > 1


@ways
@pytest.mark.parametrize("within_a_tile", [True, False])
def test_what_rounding_loses_below_the_maximum_is_given_back(way: Callable[..., Sums], within_a_tile: bool) -> None:
    # As in test_entropy.py: all entries but one are equal, so that what they lose does not average out. At u = -16 to
    # -24 half a unit in the last place is 1e-6.
    top, rest = torch.rand(2, 20, 1, generator=torch.Generator().manual_seed(2))
    vocabulary = 100 if within_a_tile else 300
    rows = torch.cat([top + torch.linspace(16, 23, 20)[:, None], -rest.expand(20, vocabulary - 1)], dim=-1)
    bias = torch.zeros(vocabulary)
    if not within_a_tile:
        bias[1:128] = -INF  # the maximum has a tile for itself, and the others have tiles without it
    *_, s, t, _ = found = way(*of_logits(rows), bias)
    check(found, rows + bias)
    for row, z in enumerate((rows + bias).double().tolist()):
        true = truth(z)
        # Some roundings of 6e-8: of e^u, of what is given back, and of sums.
        assert s[row].item() == pytest.approx(true.s, rel=RELATIVE / 4)
        assert t[row].item() == pytest.approx(true.t, rel=RELATIVE / 2)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_maxima_the_lowest_is_the_one(way: Callable[..., Sums], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(-5, 3, (8, 300), generator=generator).to(dtype)
    rows[1] = 2  # all of them
    rows[2], rows[3], rows[4], rows[5] = -4, -4, -4, -4
    rows[2, [0, 299]], rows[3, [127, 128]], rows[4, [130, 256]], rows[5, [250, 251]] = 9, 9, 9, 9
    found = way(*of_logits(rows))
    check_written(found, rows)
    check(found, rows)
    assert found[2][1:6].tolist() == [0, 0, 127, 130, 250]
    assert found[3][1].item() == 299


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_overflow_are_nan_and_leave_their_neighbours_alone(
    way: Callable[..., Sums], dtype: torch.dtype
) -> None:
    huge = 6e4 if dtype == torch.float16 else 3e38
    state, weight = exact_inputs(9, 33, 300, dtype)
    state[:, :4] = 0
    weight[:, 0] = -2  # excludes everything
    weight[:, 1] = 0  # +inf at one place
    weight[270, 1] = 2
    weight[:, 2] = 0  # excludes a third, the first tile's first and the last one's last among them
    weight[::3, 2] = -2
    weight[299, 2] = -2
    weight[:, 3] = -2  # leaves one
    weight[140, 3] = 0
    for column, row in enumerate((1, 3, 5, 7)):
        state[row, column] = huge
    state[8, 10] = NAN
    rows = product(state, weight)
    assert rows.isinf().sum(-1).tolist() == [0, 300, 0, 1, 0, 101, 0, 299, 0]
    found = way(state, weight)
    check_written(found, rows)
    entropies = check(found, rows)
    assert entropies.isnan().tolist() == [False, True, False, True, False, False, False, False, True]
    assert entropies[7] == 0
    assert found[0][7] == 0


@ways
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", [0, 127, 128, 299])
def test_a_bad_entry_is_seen_wherever_it_stands(way: Callable[..., Sums], place: int, bad: float) -> None:
    state, weight = exact_inputs(3, 8, 300, torch.float32)
    state[1] = 0  # all of its entries are equal but for the bad one
    bias = torch.zeros(300)
    bias[place] = bad
    found = way(state, weight, bias)
    check_written(found, product(state, weight) + bias)
    entropies = check(found, product(state, weight) + bias)
    assert entropies.isnan().all() == (bad != -INF)


@ways
def test_tiles_that_are_all_excluded_count_nothing(way: Callable[..., Sums]) -> None:
    state, weight = exact_inputs(3, 16, 400, torch.float32)
    for kept in (slice(0, 100), slice(130, 250), slice(390, 400)):
        bias = torch.full((400,), -INF)
        bias[kept] = 0
        check(way(state, weight, bias), product(state, weight) + bias)


@pytest.mark.skipif(has_gpu, reason="kernels are compiled here")
@pytest.mark.parametrize("group", [1, 2, 16])
def test_every_block_of_rows_meets_every_tile_in_any_order(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from interpreter import interpreted

    monkeypatch.setattr(launching, "GROUP", group)
    assert launching.block_of_rows(70, torch.float32)[0] == 32  # three blocks of rows, the last one alone in its group
    state, weight = exact_inputs(70, 16, 200, torch.float32)
    found = kernel(state, weight, written=40)
    check_written(found, product(state, weight))
    check(found, product(state, weight))
    products = torch.full((70, 200), NAN)
    with interpreted():
        launching.launch(state, weight, None, 1.0, None, False, 200, torch.tensor(33), products)
    assert products[:33].isfinite().all()
    assert products[64:].isnan().all(), "a block of rows that do not count was multiplied"


@pytest.mark.skipif(has_gpu, reason="kernels are compiled here")
def test_rows_of_a_larger_matrix_and_states_that_are_not_contiguous() -> None:
    state, weight = exact_inputs(4, 24, 300, torch.float32)
    wide = torch.full((300, 40), NAN)
    wide[:, :24] = weight
    check(kernel(state.T.contiguous().T, wide[:150, :24]), product(state, weight[:150]))


@ways
def test_no_rows_have_no_sums(way: Callable[..., Sums]) -> None:
    state, weight = exact_inputs(0, 8, 30, torch.float32)
    assert [tuple(tensor.shape) for tensor in way(state, weight)] == [(0,)] * 5 + [(0, 30)]
