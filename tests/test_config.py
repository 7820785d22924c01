"""`ConfidentConfig`: what is refused, in which words, and what the options mean for a model of a given depth."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cdsurgery.config import DEFAULT_LOOKBACK, ConfidentConfig
from cdsurgery.entropy import MEASURES
from cdsurgery.errors import InvalidInputError, SurgeryError

NAN, INF = float("nan"), float("inf")

BAD_OPTIONS: dict[str, tuple[str, list[Any]]] = {
    "lookback": ("(0, 1]", [0.0, -0.5, 1.0001, 2.0, 10.0, NAN, INF, -INF, "10", None, True, False, [10], 1 + 0j]),
    "probability": ("[0, 1]", [-1e-9, 1.0000001, 2, -1, NAN, INF, -INF, "1", None, True, False, [0.5]]),
    "seed": ("[0, 2**32)", [-1, 2**32, 10**30, 1.0, NAN, "1", True, False, [1]]),
    "measure": ("entropy, log_p_squared", ["Entropy", "", "log_p", None, 1, len]),
    "scan": ("auto, full, lazy", ["Lazy", "", "eager", None, True]),
}


@pytest.mark.parametrize(
    ("option", "allowed", "bad"),
    [(option, allowed, bad) for option, (allowed, values) in BAD_OPTIONS.items() for bad in values],
)
def test_a_bad_option_is_refused_with_what_was_found_and_what_is_allowed(option: str, allowed: str, bad: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ConfidentConfig(**{option: bad})
    message = str(caught.value)
    assert message.startswith(f"{option} is {bad!r};")
    assert allowed in message


@pytest.mark.parametrize("bad", [0, -1, -(10**30)])
def test_an_integer_lookback_below_1_is_refused_with_a_remedy(bad: int) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ConfidentConfig(lookback=bad)
    message = str(caught.value)
    assert message.startswith(f"lookback is {bad};")
    assert "at least 1" in message
    assert "probability=0" in message


def test_refusals_are_value_errors_and_errors_of_this_package() -> None:
    assert issubclass(InvalidInputError, ValueError)
    assert issubclass(InvalidInputError, SurgeryError)


def test_all_options_at_the_edge_of_what_is_allowed_are_accepted() -> None:
    for lookback in (1, 10**6, 1.0, 5e-324):
        assert ConfidentConfig(lookback=lookback).lookback == lookback
    for probability in (0, 1, 0.0, 1.0, 0.5):
        assert ConfidentConfig(probability=probability).probability == probability
    for seed in (None, 0, 2**32 - 1):
        assert ConfidentConfig(seed=seed).seed == seed
    for measure in MEASURES:
        assert ConfidentConfig(measure=measure).measure == measure


def test_the_defaults_are_ten_layers_always_by_entropy() -> None:
    assert dataclasses.asdict(ConfidentConfig()) == {
        "lookback": 10,
        "probability": 1.0,
        "seed": None,
        "measure": "entropy",
        "scan": "auto",
    }


def test_options_cannot_be_changed_behind_the_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConfidentConfig().lookback = 0  # type: ignore[misc]
    with pytest.raises(InvalidInputError):
        dataclasses.replace(ConfidentConfig(), probability=2)


@pytest.mark.parametrize("layers", [2, 3, 12, 28, 48])
def test_an_integer_lookback_within_the_depth_is_taken_as_it_is(layers: int) -> None:
    for lookback in {1, 2, layers // 2, layers - 1} & set(range(1, layers)):
        assert ConfidentConfig(lookback=lookback).resolve(layers).lookback == lookback


@pytest.mark.parametrize(
    ("share", "layers", "lookback"),
    [
        (0.25, 12, 3),
        (0.25, 13, 4),  # 3.25, rounded up
        (0.3, 12, 4),  # 3.6
        (0.5, 28, 14),
        (0.01, 28, 1),
        (5e-324, 28, 1),
        (0.14, 50, 7),  # as floats, a little more
        (0.56, 50, 28),
        (1.0, 28, 27),  # 28 clipped: the final layer is where the scan starts
        (0.99, 12, 11),
        (1.0, 2, 1),
        (0.5, 2, 1),
    ],
)
def test_a_share_of_the_depth_is_rounded_up_once_and_clipped(share: float, layers: int, lookback: int) -> None:
    resolved = ConfidentConfig(lookback=share).resolve(layers).lookback
    assert resolved == lookback
    assert type(resolved) is int
    assert ConfidentConfig(lookback=resolved).resolve(layers).lookback == resolved


@pytest.mark.parametrize(("layers", "lookback"), [(2, 1), (6, 5), (10, 9), (11, 10), (12, 10), (80, 10)])
def test_the_default_lookback_fits_itself_to_a_shallow_model(layers: int, lookback: int) -> None:
    assert ConfidentConfig().resolve(layers).lookback == lookback
    assert DEFAULT_LOOKBACK == 10


@pytest.mark.parametrize(("lookback", "layers"), [(2, 2), (9, 9), (11, 11), (12, 12), (11, 4), (1000, 28)])
def test_an_integer_lookback_beyond_the_depth_is_refused_with_both_numbers_and_a_remedy(
    lookback: int, layers: int
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ConfidentConfig(lookback=lookback).resolve(layers)
    message = str(caught.value)
    assert message.startswith(f"lookback is {lookback},")
    assert f"{layers} decoder layers" in message
    assert f"[1, {layers - 1}]" in message
    assert "(0, 1]" in message


def test_a_missing_seed_is_drawn_from_torchs_generator_and_so_repeats_with_it() -> None:
    config = ConfidentConfig(probability=0.5)
    torch.manual_seed(3)
    first = [config.resolve(12).seed for _ in range(8)]
    torch.manual_seed(3)
    assert [config.resolve(12).seed for _ in range(8)] == first
    torch.manual_seed(4)
    assert config.resolve(12).seed != first[0]
    assert len(set(first)) == 8
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in first)
    assert max(first) >= 2**31  # of all 32 bits, not 31: eight draws would all be low once in 256


@pytest.mark.parametrize("probability", [0, 0.0, 1, 1.0])
def test_where_no_row_is_drawn_no_seed_is_taken_from_torchs_generator(probability: float) -> None:
    before = torch.get_rng_state()
    assert ConfidentConfig(probability=probability).resolve(12).seed is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_given_seed_is_kept_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    for seed in (0, 7, 2**32 - 1):
        assert ConfidentConfig(probability=0.5, seed=seed).resolve(12).seed == seed
    assert torch.equal(torch.get_rng_state(), before)


def test_resolving_keeps_the_other_options_and_the_original() -> None:
    config = ConfidentConfig(lookback=0.5, probability=0.25, seed=9, measure="log_p_squared")
    assert config.resolve(12) == ConfidentConfig(lookback=6, probability=0.25, seed=9, measure="log_p_squared")
    assert config.lookback == 0.5
