"""How the server chooses tokens: the probabilities of what is kept, and penalties by their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from cdsurgery.export.triton.serving.sampling import NUCLEUS, Sampler, SamplingOptions, nucleus

LOGITS = np.array([0.0, 3.0, 1.0, 2.0, -np.inf], np.float32)


def shares(count: int = 20_000, **options: Any) -> np.ndarray:
    sampler = Sampler(SamplingOptions(seed=1, **options), [])
    return np.bincount([sampler.choose(LOGITS) for _ in range(count)], minlength=5) / count


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 0.7}, [0, 1, 2, 3]),
        ({"temperature": 1.0, "top_k": 2}, [1, 3]),
        ({"temperature": 1.0, "top_p": 0.8}, [1, 3]),  # 0.64 and 0.24
        ({"temperature": 1.0, "top_p": 0.6}, [1]),
        ({"temperature": 1.0, "top_p": 0.0}, [1]),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.99}, [1, 2, 3]),
        ({"temperature": 1.0, "min_p": 0.3}, [1, 3]),  # 0.37 of the largest, and 0.14
        ({"temperature": 2.0, "min_p": 0.3}, [1, 2, 3]),  # 0.61, 0.37 and 0.22
        ({"temperature": 1.0, "min_p": 1.0}, [1]),
    ],
)
def test_samples_have_the_probabilities_of_what_is_kept(options: dict[str, Any], kept: list[int]) -> None:
    wanted = np.zeros(5)
    wanted[kept] = torch.softmax(torch.tensor(LOGITS[kept]).double() / options["temperature"], -1).numpy()
    # Five standard deviations of a share of 20,000 draws are at most 0.018.
    assert np.abs(shares(**options) - wanted).max() < 0.018


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999999])
@pytest.mark.parametrize("kind", ["few", "peaked", "flat", "equal", "mostly nothing"])
def test_a_nucleus_is_what_sorting_everything_gives(kind: str, share: float) -> None:
    random = np.random.default_rng(0)
    weights = {
        "few": random.random(5),
        "peaked": np.exp(-random.permutation(5000) / 20.0),
        "flat": 1 + random.random(5000),  # more than are looked at first
        "equal": np.repeat([1.0, 0.5], 2 * NUCLEUS),
        "mostly nothing": np.where(np.arange(5000) % 100 == 0, 1.0, 0.0),
    }[kind]
    order = sorted(range(len(weights)), key=lambda place: (-weights[place], place))
    taken, wanted = [order[0]], share * weights.sum()
    while sum(weights[taken]) < wanted - 1e-9 * weights.sum():  # less than any weight that is left
        taken.append(order[len(taken)])
    assert nucleus(weights, share).tolist() == taken


def test_penalties_are_those_of_the_formula() -> None:
    sampler = Sampler(SamplingOptions(frequency_penalty=0.5, presence_penalty=0.6), [1])
    assert not sampler.plain
    # Token 1: 3, 1.9, 1.4, 0.9; token 3: 2, 0.9; token 2: 1, -0.1.
    assert [sampler.choose(LOGITS) for _ in range(5)] == [1, 3, 1, 1, 2]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_a_repetition_penalty_is_that_of_generate(penalty: float) -> None:
    """Of the prompt and of what has been said, above 0 and below."""
    generator = np.random.default_rng(0)
    said = [3, 3, 17]
    sampler = Sampler(SamplingOptions(repetition_penalty=penalty), list(said))
    assert not sampler.plain
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(40):
        logits = generator.normal(size=20).astype(np.float32)
        wanted = int(theirs(torch.tensor([said]), torch.from_numpy(logits)[None]).argmax())
        assert sampler.choose(logits) == wanted
        said.append(wanted)
    assert len(set(said)) > 5
