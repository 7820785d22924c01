"""`cdsurgery.draw`: one coin per row, decided by seed, position and token alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import static_graph
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from cdsurgery.draw import allowed_rows, text_positions

# The draws are fixed by their seeds, so these tests cannot flicker. A fair coin leaves this band in one of two million
# such shares.
SIGMAS = 5

CUTS = [[12], [1] * 12, [5, 7], [4, 1, 1, 6], [11, 1]]


def text(batch: int, length: int, seed: int = 0) -> Tensor:
    """`[B, T]` token ids of a small vocabulary, so that tokens repeat as they do in text."""
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def counted(batch: int, length: int) -> Tensor:
    """`[B, T]`: 0, 1, 2, ... in every row."""
    return torch.arange(length).expand(batch, length)


def every_pair(tokens: int, positions: int) -> tuple[Tensor, Tensor]:
    """`[tokens, positions]` twice: each token at each position once, so that no draw is counted double."""
    pairs = torch.cartesian_prod(torch.arange(tokens), torch.arange(positions))
    return pairs[:, 0].view(tokens, positions), pairs[:, 1].view(tokens, positions)


def is_near(draws: Tensor, probability: float) -> bool:
    """The share of True is p, to the standard deviation of a binomial share, sqrt(p (1 - p) / n), times SIGMAS."""
    bound = SIGMAS * math.sqrt(probability * (1 - probability) / draws.numel())
    return abs(draws.float().mean().item() - probability) <= bound


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_the_share_of_allowed_rows_is_the_probability(probability: float, seed: int) -> None:
    tokens, positions = every_pair(64, 4096)
    assert is_near(allowed_rows(probability, seed, tokens, positions), probability)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_share_holds_along_tokens_along_positions_and_along_seeds(probability: float) -> None:
    running, fixed = torch.arange(1 << 16)[None], torch.full((1, 1 << 16), 7)
    assert is_near(allowed_rows(probability, 3, running, fixed), probability)
    assert is_near(allowed_rows(probability, 3, fixed, running), probability)
    assert is_near(allowed_rows(probability, 3, running, running), probability)
    seeds = [allowed_rows(probability, seed, fixed[:, :1], fixed[:, :1]) for seed in range(4096)]
    assert is_near(torch.cat(seeds), probability)


@pytest.mark.parametrize(("token", "position", "seed"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (1, 1, 1)])
def test_neighbouring_draws_agree_no_more_often_than_chance(token: int, position: int, seed: int) -> None:
    tokens, positions = every_pair(64, 4096)
    positions = positions + 1  # none becomes negative
    one = allowed_rows(0.5, 9, tokens, positions)
    other = allowed_rows(0.5, 9 + seed, tokens + token, positions + position)
    assert is_near(one == other, 0.5)


def test_probability_0_allows_no_row_and_1_allows_all() -> None:
    tokens, positions = text(64, 4096), counted(64, 4096)
    assert not allowed_rows(0.0, 5, tokens, positions).any()
    assert not allowed_rows(0.0, 0, tokens[:1, :1] * 0, positions[:1, :1]).any()  # the one whose hash is exactly 0
    assert allowed_rows(1.0, 5, tokens, positions).all()


def test_a_higher_probability_only_adds_rows() -> None:
    tokens, positions = text(8, 512), counted(8, 512)
    shares = [allowed_rows(p, 5, tokens, positions) for p in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert all((less <= more).all() for less, more in pairwise(shares))


def test_draws_repeat_for_a_seed_and_differ_for_another() -> None:
    tokens, positions = text(4, 256), counted(4, 256)
    draw = allowed_rows(0.5, 21, tokens, positions)
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(draw, allowed_rows(0.5, 21, tokens.clone(), positions.clone()))
    assert not torch.equal(draw, allowed_rows(0.5, 22, tokens, positions))
    assert draw.dtype == torch.bool
    assert draw.shape == tokens.shape


def test_draws_are_those_of_the_published_hash_in_whole_numbers() -> None:
    def lowbias32(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    def allowed(seed: int, token: int, position: int) -> bool:
        inner = lowbias32((lowbias32(seed) + position) % 2**32)
        return lowbias32((inner + token) % 2**32) < 0.3 * 2**32

    tokens, positions = text(2, 64) * 5003, counted(2, 64) * 2047
    for seed in (0, 77, 2**32 - 1):
        expected = [
            [allowed(seed, *pair) for pair in zip(*rows, strict=True)]
            for rows in zip(tokens.tolist(), positions.tolist(), strict=True)
        ]
        assert allowed_rows(0.3, seed, tokens, positions).tolist() == expected


def draws(tokens: Tensor, **inputs: Any) -> Tensor:
    return allowed_rows(0.5, 4, tokens, text_positions(inputs, tokens))


def test_a_row_draws_the_same_alone_as_in_a_batch_and_padded_on_either_side() -> None:
    rows = [text(1, length, seed=length) for length in (12, 9, 5)]
    width = 12
    for side in ("left", "right"):
        places = [slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1]) for row in rows]
        tokens, mask = torch.full((3, width), 49), torch.zeros(3, width, dtype=torch.int64)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            tokens[i, place], mask[i, place] = row[0], 1
        together = draws(tokens, attention_mask=mask)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            assert torch.equal(together[i : i + 1, place], draws(row))


@pytest.mark.parametrize("steps", CUTS, ids=str)
@pytest.mark.parametrize("source", ["position_ids", "attention_mask", "past_key_values"])
def test_cutting_a_text_into_steps_changes_no_draw(steps: list[int], source: str) -> None:
    tokens = text(2, 12)
    mask = torch.ones_like(tokens)
    if source == "attention_mask":
        mask[1, :3] = 0  # padded on the left
    pieces, cache, begin = [], DynamicCache(), 0
    for step in steps:
        end = begin + step
        inputs = {
            "position_ids": {"position_ids": torch.arange(begin, end)[None]},
            "attention_mask": {"attention_mask": mask[:, :end], "past_key_values": cache},
            "past_key_values": {"past_key_values": cache},
        }[source]
        pieces.append(draws(tokens[:, begin:end], **inputs))
        cache.update(torch.zeros(2, 1, step, 4), torch.zeros(2, 1, step, 4), 0)
        begin = end
    assert torch.equal(torch.cat(pieces, dim=-1), draws(tokens, attention_mask=mask))


def test_positions_come_from_position_ids_first_and_every_row_gets_its_own() -> None:
    tokens, mask = text(2, 3), torch.tensor([[0, 1, 1], [1, 1, 1]])
    given = torch.tensor([[4, 5, 6], [40, 50, 60]])
    assert torch.equal(text_positions({"position_ids": given, "attention_mask": mask}, tokens), given)
    shared = text_positions({"position_ids": given[:1]}, tokens)
    assert shared.tolist() == [[4, 5, 6], [4, 5, 6]]


def test_multimodal_position_ids_give_the_row_of_the_text() -> None:
    axes = torch.stack([counted(2, 3) + 7, counted(2, 3) * 0, counted(2, 3) * 9])
    assert text_positions({"position_ids": axes}, text(2, 3)).tolist() == [[7, 8, 9], [7, 8, 9]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_positions_from_a_mask_do_not_count_padding_and_cover_only_this_call(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=dtype)
    positions = text_positions({"attention_mask": mask}, text(3, 5))
    assert positions.dtype == torch.int64
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 2, 2]]
    assert text_positions({"attention_mask": mask}, text(3, 1)).tolist() == [[2], [4], [2]]


def test_positions_without_a_flat_mask_continue_the_cache() -> None:
    tokens = text(2, 3)
    square = torch.ones(2, 1, 3, 8)  # a prepared attention mask says nothing about padding that can be counted
    assert text_positions({}, tokens).tolist() == [[0, 1, 2]] * 2
    assert text_positions({"attention_mask": square, "past_key_values": None}, tokens).tolist() == [[0, 1, 2]] * 2
    config = LlamaConfig(num_hidden_layers=1, hidden_size=4, num_attention_heads=1)
    for cache in (DynamicCache(), StaticCache(config=config, max_cache_len=16)):
        cache.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4), 0)
        positions = text_positions({"attention_mask": square, "past_key_values": cache}, tokens)
        assert positions.tolist() == [[5, 6, 7]] * 2


def test_draws_export_without_data_dependent_operations_and_fit_any_batch_and_length() -> None:
    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        return allowed_rows(0.5, 11, tokens, positions)

    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    graph = static_graph(run, [text(2, 3), counted(2, 3)], axes, axes)
    for sizes in [(1, 1), (4, 9)]:
        assert torch.equal(graph(text(*sizes), counted(*sizes)), run(text(*sizes), counted(*sizes)))
