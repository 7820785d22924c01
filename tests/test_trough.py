"""`cdsurgery.trough` against Algorithm 1 of the paper, written as the loops it is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import static_graph
from torch import Tensor

from cdsurgery.entropy import MEASURES, Measure, entropy
from cdsurgery.trough import pick, select, select_beside, trough_depth

NAN, INF = float("nan"), float("inf")


def algorithm_1(entropies: list[float], lookback: int) -> int:
    """Algorithm 1, lines 3 to 11: `entropies[l]` is H^(l) for l in 1..L (index 0 unused); returns the layer chosen."""
    final = len(entropies) - 1
    chosen, reference, frozen = final, entropies[final], False
    for layer in range(final - 1, max(1, final - lookback) - 1, -1):
        if not frozen and entropies[layer] < reference:
            chosen = layer
        else:
            frozen = True
        reference = entropies[layer]
    return chosen


def candidates_of(entropies: list[float], lookback: int) -> Tensor:
    """`[M]` float32: H^(L), H^(L-1), ... down to the last layer that Algorithm 1 visits."""
    final = len(entropies) - 1
    return torch.tensor([entropies[layer] for layer in range(final, max(1, final - lookback) - 1, -1)])


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
few = st.sampled_from([0.0, -0.0, 1e-7, 0.5, math.nextafter(0.5, 1), 1.0, NAN, INF, -INF]).map(
    lambda value: torch.tensor(value).item()  # to float32, which turns the neighbours of 0.5 into a tie
)
random_walks = st.lists(floats, min_size=2, max_size=16)
tied_walks = st.lists(few, min_size=2, max_size=16)
slopes = st.lists(floats.filter(math.isfinite), min_size=2, max_size=16).flatmap(
    lambda values: st.sampled_from([sorted(values), sorted(values, reverse=True)])
)
zigzags = st.tuples(slopes, st.integers(1, 4)).map(
    lambda pair: [value if i // pair[1] % 2 else -value for i, value in enumerate(pair[0])]
)


@settings(deadline=None, max_examples=400)
@given(st.one_of(random_walks, tied_walks, slopes, zigzags), st.integers(1, 20))
@example([1.0, 2.0], 1)
@example([1.0, 1.0, 2.0], 2)  # a tie is no improvement
@example([0.0, 3.0, 1.0, 2.0], 3)  # a deeper, lower trough lies behind a hill
@example([0.0, NAN, 2.0], 2)
@example([0.0, 1.0, NAN], 2)
def test_depth_is_that_of_algorithm_1(walk: list[float], lookback: int) -> None:
    entropies = [NAN, *walk]
    layers = len(walk)
    depth = trough_depth(candidates_of(entropies, lookback))
    assert depth.dtype == torch.int64
    assert layers - depth.item() == algorithm_1(entropies, lookback)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(few, min_size=7, max_size=7), min_size=1, max_size=12))
def test_depth_of_a_batch_is_that_of_each_row(rows: list[list[float]]) -> None:
    entropies = torch.tensor(rows)[None]
    assert trough_depth(entropies).tolist() == [[trough_depth(row).item() for row in entropies[0]]]


@pytest.mark.parametrize("moves", [1, 2, 9, 10])
def test_a_falling_entropy_is_followed_for_k_moves_and_no_further(moves: int) -> None:
    falling = torch.arange(moves + 1, 0, -1.0)
    assert trough_depth(falling) == moves
    assert trough_depth(falling.flip(0)) == 0
    assert trough_depth(torch.zeros(moves + 1)) == 0


def test_without_layers_to_look_back_to_the_final_one_speaks() -> None:
    assert trough_depth(torch.tensor([[0.3], [NAN]])).tolist() == [0, 0]


def ever_surer(vocabulary: int = 61, layers: int = 6, batch: int = 2, length: int = 3) -> Tensor:
    """Candidates `[M, B, T, V]` of which each is more certain than the one before: the scan goes to the last."""
    rows = torch.randn(batch, length, vocabulary, generator=torch.Generator().manual_seed(batch))
    return rows * torch.arange(1.0, layers + 1)[:, None, None, None]


def wandering(batch: int, length: int, seed: int = 0) -> Tensor:
    """Candidates `[7, B, T, 61]` of random sharpness, so that all depths occur."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(7, batch, length, 1, generator=generator).cumsum(dim=0) + 0.5
    noise = 1 + 0.2 * torch.randn(7, batch, length, 1, generator=generator)
    return torch.randn(1, batch, length, 61, generator=generator) * sharpness * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pick_copies_the_row_at_each_depth_bit_for_bit(dtype: torch.dtype) -> None:
    candidates = wandering(3, 5).to(dtype)
    depth = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    picked = pick(candidates, depth)
    assert picked.dtype == dtype
    for b in range(3):
        for t in range(5):
            assert torch.equal(picked[b, t], candidates[int(depth[b, t]), b, t])


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_unchosen_candidates_leave_no_trace_in_values_or_gradients(poison: float) -> None:
    depth = torch.tensor([[0, 3, 6]])
    chosen = torch.nn.functional.one_hot(depth, 7).bool().movedim(-1, 0)[..., None]
    candidates = torch.where(chosen, wandering(1, 3), poison).requires_grad_()
    picked = pick(candidates, depth)
    assert picked.isfinite().all()
    (gradient,) = torch.autograd.grad(picked.sum(), candidates)
    assert torch.equal(gradient, chosen.expand_as(candidates).float())


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
def test_select_returns_the_logits_of_the_layer_that_algorithm_1_chooses(measure: Measure) -> None:
    candidates = wandering(8, 16)
    logits, depth, entropies = select(candidates, measure)
    assert torch.equal(entropies, torch.stack([measure(candidate) for candidate in candidates], dim=-1))
    assert entropies.dtype == torch.float32
    assert depth.unique().numel() >= 3  # or the test below would say little
    for b in range(8):
        for t in range(16):
            row = [NAN, *reversed(entropies[b, t].tolist())]
            assert 7 - depth[b, t] == algorithm_1(row, lookback=6)
            assert torch.equal(logits[b, t], candidates[depth[b, t], b, t])


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("place", [0, 30, 60, "argmax"])
@pytest.mark.parametrize("broken", range(6))
def test_a_candidate_with_a_nan_or_inf_logit_never_wins_and_stops_the_scan(
    bad: float, place: int | str, broken: int
) -> None:
    candidates = ever_surer()
    assert (select(candidates, entropy)[1] == 5).all()
    hurt = candidates.clone()
    hurt[broken, 1, 2, int(candidates[broken, 1, 2].argmax()) if place == "argmax" else int(place)] = bad
    logits, depth, entropies = select(hurt, entropy)
    assert entropies.isnan().nonzero().tolist() == [[1, 2, broken]]
    # It stops in front of the broken candidate. Where that is the final layer itself, there is nothing else to return.
    expected = max(broken - 1, 0)
    assert depth.tolist() == [[5, 5, 5], [5, 5, expected]]
    assert torch.equal(logits[1, 2].nan_to_num(), hurt[expected, 1, 2].nan_to_num())
    assert torch.equal(logits[0], candidates[5, 0])


def test_a_row_that_is_not_allowed_keeps_the_final_layer_and_its_entropies() -> None:
    candidates = ever_surer()
    allowed = torch.tensor([[True, False, True], [False, False, True]])
    logits, depth, entropies = select(candidates, entropy, allowed)
    assert depth.tolist() == [[5, 0, 5], [0, 0, 5]]
    assert depth.dtype == torch.int64
    assert torch.equal(logits[~allowed], candidates[0][~allowed])
    assert torch.equal(logits[allowed], candidates[5][allowed])
    assert torch.equal(entropies, select(candidates, entropy)[2])


def test_a_row_chooses_the_same_alone_as_among_others_even_broken_ones() -> None:
    candidates = wandering(4, 5)
    candidates[2, 1, 1, 7] = NAN
    candidates[:, 3, 2] = INF
    allowed = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    together = select(candidates, entropy, allowed)
    for b in range(4):
        for t in range(5):
            alone = select(candidates[:, b : b + 1, t : t + 1], entropy, allowed[b : b + 1, t : t + 1])
            for one, all_rows in zip(alone, together, strict=True):
                assert torch.equal(one[0, 0].nan_to_num(), all_rows[b, t].nan_to_num())


def test_final_logits_that_lie_elsewhere_make_no_difference() -> None:
    candidates = wandering(4, 5)
    candidates[2, 1, 1, 7], candidates[0, 2, 2, 3], candidates[1, 0, 0] = NAN, NAN, INF
    for allowed in (None, torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.7):
        apart = select_beside(candidates[0], candidates[1:], entropy, allowed)
        for one, other in zip(apart, select(candidates, entropy, allowed), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    final, earlier = (part.clone().requires_grad_() for part in (candidates[3], candidates[4:]))
    logits, depth, _ = select_beside(final, earlier, entropy)
    gradients = torch.autograd.grad(logits.sum(), (final, earlier))
    assert depth.min() == 0 < depth.max()
    for back in range(4):
        expected = (depth == back)[..., None].expand_as(final).float()
        assert torch.equal(torch.cat([gradients[0][None], gradients[1]])[back], expected)


def test_gradients_reach_the_selected_logits_only_and_entropies_carry_none() -> None:
    candidates = wandering(2, 3).requires_grad_()
    logits, depth, entropies = select(candidates, entropy)
    assert not entropies.requires_grad
    (gradient,) = torch.autograd.grad(logits.square().sum() / 2, candidates)
    rows = torch.nn.functional.one_hot(depth, 7).bool().movedim(-1, 0)
    assert torch.equal(gradient[rows], candidates.detach()[rows])
    assert not gradient[~rows].any()


@pytest.mark.parametrize("with_allowed", [False, True])
def test_selection_exports_statically_and_agrees_at_every_batch_and_length(with_allowed: bool) -> None:
    def run(candidates: Tensor, *allowed: Tensor) -> tuple[Tensor, ...]:
        return select(candidates, entropy, *allowed)

    def samples(batch: int, length: int) -> list[Tensor]:
        allowed = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.7
        return [wandering(batch, length), allowed][: 1 + with_allowed]

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    dynamic = [{1: batch, 2: length}, {0: batch, 1: length}][: 1 + with_allowed]
    graph = static_graph(run, samples(2, 3), *dynamic)
    for sizes in [(1, 1), (1, 9), (5, 1), (2, 3), (4, 7)]:
        inputs = samples(*sizes)
        inputs[0][3, 0, 0, 5] = NAN
        for exported, eager in zip(graph(*inputs), run(*inputs), strict=True):
            assert torch.equal(exported.nan_to_num(), eager.nan_to_num())
