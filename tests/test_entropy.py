"""`cdsurgery.entropy` against float64, at both ends of its range and on broken rows."""

from __future__ import annotations

import math

import pytest
import torch
from support import static_graph
from torch import Tensor

from cdsurgery.entropy import (
    MEASURES,
    Measure,
    entropy,
    entropy_of_sums,
    log_p_squared,
    merged_sums,
    partial_sums,
)

VOCABULARIES = (2, 251, 32768, 151936, 262144)
NAN, INF = float("nan"), float("inf")

# What the specification asks for. Measured: 1e-7 to 5e-7, a few roundings of float32 (6e-8 each); the largest where all
# entries but one are equal, so that the errors of their exponentials are equal too and do not average out.
RELATIVE = 1e-6

# H may exceed ln V by six roundings of half a unit in the last place: of s, of the logarithm, quotient and product that
# make log1p(s), of t / (1 + s), and of the difference.
ABOVE_LN_V = 1 + 6 * 2**-24


def true_entropy(logits: Tensor) -> Tensor:
    """-sum p ln p in float64 over all of V.

    Not with `softmax`, which adds its terms one by one: 1 + 2e-14 + 2e-14 + ... is off by 7e-6 of H at 1e-7 nats, even
    in float64. `sum` adds in a tree, and is within 2e-8 of `math.fsum`.
    """
    z = logits.double()
    e = (z - z.amax(dim=-1, keepdim=True)).exp()
    return torch.special.entr(e / e.sum(dim=-1, keepdim=True)).sum(dim=-1)


def relative_error(logits: Tensor) -> Tensor:
    truth = true_entropy(logits)
    return (entropy(logits).double() - truth).abs() / truth


def peaked_rows(vocabulary: int, noise: float, generator: torch.Generator) -> Tensor:
    """`[24, V]` float32: one entry rises over normal noise, from not at all to far beyond all others together."""
    rise = torch.linspace(0, math.log(vocabulary) + 21, 24)
    rows = torch.randn(24, vocabulary, generator=generator) * noise
    place = torch.randint(vocabulary, (24, 1), generator=generator)
    return rows.scatter(-1, place, rows.amax(dim=-1, keepdim=True) + rise[:, None])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_relative_error_is_below_1e_6_from_1e_7_nats_to_ln_v(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    truths = []
    for noise in (0.0, 1.0):
        rows = peaked_rows(vocabulary, noise, generator)
        truth = true_entropy(rows)
        inside = truth >= 1e-7
        assert relative_error(rows)[inside].max() <= RELATIVE
        truths.append(truth)
    covered = torch.cat(truths)
    assert covered.min() < 1e-7
    assert covered.max() > 0.999 * math.log(vocabulary)


@pytest.mark.parametrize("offset", [0.0, 1.0, -17.3, 1e3, -1e5])
def test_two_entries_keep_their_entropy_up_to_a_gap_of_20_and_at_any_offset(offset: float) -> None:
    gaps = torch.linspace(0, 20, 4001)
    rows = torch.stack([gaps * 0 + offset, offset - gaps], dim=-1)
    rows = torch.cat([rows, rows.flip(-1)])
    assert relative_error(rows).max() <= RELATIVE


@pytest.mark.parametrize("vocabulary", [251, 32768])
def test_what_rounding_loses_below_the_maximum_is_given_back(vocabulary: int) -> None:
    # z and max z have more digits than their difference can hold, and all entries but one lose the same, so that
    # nothing averages out: without what was lost, e^u is off by more than 1e-6 in some of these rows.
    top, rest = torch.rand(2, 100, 1, generator=torch.Generator().manual_seed(2))
    rise = torch.linspace(12, math.log(vocabulary) + 20, 100)[:, None]
    rows = torch.cat([top + rise, -rest.expand(100, vocabulary - 1)], dim=-1)
    inside = true_entropy(rows) >= 1e-8
    assert relative_error(rows)[inside].max() <= RELATIVE


@pytest.mark.parametrize("offset", [300.0, -1e4])
def test_a_common_offset_of_all_logits_costs_no_precision(offset: float) -> None:
    rows = peaked_rows(251, 3.0, torch.Generator().manual_seed(1)) + offset
    inside = true_entropy(rows) >= 1e-7
    assert relative_error(rows)[inside].max() <= RELATIVE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 251, 32768, 151936])
def test_half_logits_are_measured_as_exactly_as_float32_ones(dtype: torch.dtype, vocabulary: int) -> None:
    rows = peaked_rows(vocabulary, 2.0, torch.Generator().manual_seed(vocabulary)).to(dtype)
    inside = true_entropy(rows) >= 1e-7
    assert entropy(rows).dtype == torch.float32
    assert relative_error(rows)[inside].max() <= RELATIVE


@pytest.mark.parametrize("size", [1000, 200_000, 300_000])
def test_a_row_of_many_is_measured_as_if_it_were_alone(size: int) -> None:
    rows = torch.randn(3, 400_000 // size + 1, size, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    rows[-1, 1, size // 2] = NAN
    found = entropy(rows)
    assert found.isnan().sum() == 1 and found[-1, 1].isnan()
    for alone, together in zip(rows.flatten(0, 1), found.flatten(), strict=True):
        # The order in which a row is summed up may hang on how many rows there are: a rounding or two of float32.
        torch.testing.assert_close(together, entropy(alone), rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_entropy_stays_between_0_and_ln_v(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    nearly_uniform = torch.randn(8, vocabulary, generator=generator) * torch.logspace(-8, -2, 8)[:, None]
    tied = torch.randint(2, (8, vocabulary), generator=generator) * 40.0
    certain = torch.zeros(1, vocabulary).index_fill(-1, torch.tensor(0), 3e38)
    uniform = torch.full((2, vocabulary), 7.25)
    values = entropy(torch.cat([nearly_uniform, tied, certain, uniform]))
    assert values.min() == 0
    assert values.max() <= math.log(vocabulary) * ABOVE_LN_V


def test_the_truth_agrees_with_exact_summation() -> None:
    row = peaked_rows(262144, 0.0, torch.Generator().manual_seed(0))[16]
    e = (row.double() - row.max()).exp()
    p = e / math.fsum(e.tolist())
    exact = math.fsum(torch.special.entr(p).tolist())
    assert 1e-7 < exact < 1e-2
    assert abs(true_entropy(row).item() - exact) / exact < 0.1 * RELATIVE


def test_any_leading_shape_is_measured_row_by_row() -> None:
    rows = torch.randn(3, 2, 4, 251, generator=torch.Generator().manual_seed(0))
    values = entropy(rows)
    assert values.shape == (3, 2, 4)
    assert torch.equal(values[2, 1, 3], entropy(rows[2, 1, 3]))
    assert torch.equal(entropy(rows.movedim(0, 2).movedim(2, 0)), values)


@pytest.mark.parametrize("excluded", [-INF, torch.finfo(torch.float32).min])
def test_excluded_logits_contribute_nothing(excluded: float) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = peaked_rows(251, 2.0, generator)
    padded = torch.cat([torch.full((24, 3), excluded), rows[:, :100], torch.full((24, 5), excluded), rows[:, 100:]], -1)
    inside = true_entropy(rows) >= 1e-7
    error = (entropy(padded).double() - true_entropy(rows)).abs() / true_entropy(rows)
    assert error[inside].max() <= RELATIVE


@pytest.mark.parametrize("excluded", [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("place", [0, 1, 250])
def test_a_row_with_one_allowed_token_is_certain(excluded: float, place: int) -> None:
    row = torch.full((251,), excluded)
    row[place] = -3.5
    assert entropy(row) == 0


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("place", ["first", "middle", "last", "argmax"])
@pytest.mark.parametrize("rest", ["ordinary", "certain", "excluded"])
def test_a_nan_or_inf_logit_makes_the_row_nan_wherever_it_stands(bad: float, place: str, rest: str) -> None:
    row = torch.randn(251, generator=torch.Generator().manual_seed(3))
    if rest == "certain":  # but for the bad entry this row would win every comparison
        row[77] = 200.0
    if rest == "excluded":
        row[:] = -INF
    row[{"first": 0, "middle": 100, "last": 250, "argmax": int(row.argmax())}[place]] = bad
    assert entropy(row).isnan()


@pytest.mark.parametrize("place", [0, 100, 250])
def test_a_nan_is_seen_even_where_argmax_skips_it_as_some_runtimes_do(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skipping(z: Tensor, dim: int, keepdim: bool) -> Tensor:
        return torch.argmax(z.nan_to_num(nan=-INF, posinf=INF, neginf=-INF), dim=dim, keepdim=keepdim)

    row = torch.randn(251, generator=torch.Generator().manual_seed(3))
    row[place] = NAN
    monkeypatch.setattr(Tensor, "argmax", skipping)
    assert entropy(row).isnan()


@pytest.mark.parametrize(
    "row",
    [[-INF, -INF, -INF], [NAN, NAN, NAN], [INF, INF, INF], [INF, NAN, 0.0], [NAN, INF, 0.0], [INF, -INF, 0.0]],
    ids=str,
)
def test_rows_without_a_distribution_are_nan_and_leave_their_neighbours_alone(row: list[float]) -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], row, [3.0, 2.0, 1.0]])
    values = entropy(rows)
    assert values.isnan().tolist() == [False, True, False]
    assert torch.equal(values[0], entropy(rows[0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_log_p_squared_is_what_the_in_place_logarithm_of_the_overlay_computes(
    dtype: torch.dtype, tolerance: float
) -> None:
    rows = torch.randn(16, 32768, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.1, 6, 16)[:, None]
    q = rows.to(dtype).softmax(dim=-1)
    overlay = -(q * q.log_()).sum(dim=-1)
    # 32768 squares of one sign: their errors do not cancel away digits. In float32 each factor log q carries the
    # rounding of the softmax and of the logarithm too, a few times 6e-8 of values near 10, hence the wider bound.
    found = log_p_squared(rows.unflatten(0, (2, 8))).flatten()
    assert ((found - overlay).abs() / overlay.abs()).max() <= tolerance
    assert overlay.max() < 0


def test_log_p_squared_is_nan_for_broken_rows_and_not_the_default() -> None:
    values = log_p_squared(torch.tensor([[0.0, NAN], [0.0, INF], [0.0, -INF], [0.0, 0.0]]))
    assert values.isnan().tolist() == [True, True, False, False]
    assert values[2] == -INF
    assert {name: MEASURES[name] for name in MEASURES} == {"entropy": entropy, "log_p_squared": log_p_squared}


@pytest.mark.parametrize("measure", [entropy, log_p_squared])
def test_measures_export_without_data_dependent_operations_and_fit_any_batch(measure: Measure) -> None:
    generator = torch.Generator().manual_seed(5)
    graph = static_graph(measure, [torch.randn(2, 3, 251, generator=generator)], {0: torch.export.Dim("batch")})
    for batch in (1, 2, 7):
        rows = torch.randn(batch, 3, 251, generator=generator) * 5
        rows[0, 1, 17] = NAN
        rows[0, 2, 0] = -INF
        assert torch.equal(graph(rows).nan_to_num(-1), measure(rows).nan_to_num(-1))


def entropy_in_parts(logits: Tensor, sizes: list[int]) -> Tensor:
    """The entropy of rows that are measured piece by piece."""
    sums = zip(*(partial_sums(part) for part in logits.split(sizes, dim=-1)), strict=True)
    return entropy_of_sums(*merged_sums(*(torch.stack(pieces) for pieces in sums)))


@pytest.mark.parametrize("sizes", [[251], [126, 125], [1, 1, 248, 1], [32] * 7 + [27]], ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0, 8.0])
def test_parts_of_a_row_merge_into_its_entropy(sizes: list[int], noise: float) -> None:
    rows = peaked_rows(251, noise, torch.Generator().manual_seed(len(sizes)))
    rows = torch.cat([rows, rows.sort(dim=-1).values, rows.sort(dim=-1, descending=True).values])
    truth = true_entropy(rows)
    inside = truth >= 1e-7
    # Twice the roundings: those of a part, and those of merging it.
    assert ((entropy_in_parts(rows, sizes) - truth).abs() / truth)[inside].max() <= 2 * RELATIVE


def test_what_rounding_loses_between_the_maxima_of_parts_is_given_back() -> None:
    # One part is the maximum alone, the other all that is 32 or more below it, where half a unit in the last place is
    # 2e-6; equal, so that no error averages out.
    top, rest = torch.rand(2, 40, 1, generator=torch.Generator().manual_seed(2))
    rise = torch.linspace(31, 34, 40)[:, None]
    rows = torch.cat([top + rise, -rest.expand(40, 262143)], dim=-1)
    truth = true_entropy(rows)
    inside = truth >= 1e-8
    assert ((entropy_in_parts(rows, [1, 262143]) - truth).abs() / truth)[inside].max() <= RELATIVE


def test_a_part_that_is_excluded_counts_nothing_and_a_broken_one_breaks_the_row() -> None:
    row = torch.randn(250, generator=torch.Generator().manual_seed(3))
    excluded = row.clone()
    excluded[50:100] = -INF
    assert entropy_in_parts(excluded, [50] * 5) == pytest.approx(true_entropy(excluded).item(), rel=RELATIVE)
    for place in (0, 75, 249):
        for bad in (NAN, INF):
            broken = excluded.clone()
            broken[place] = bad
            assert entropy_in_parts(broken, [50] * 5).isnan()
    assert entropy_in_parts(torch.full((250,), -INF), [50] * 5).isnan()
