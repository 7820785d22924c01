"""Logits of one row -> the next token: penalties, temperature, top-k, top-p, and a generator of the request's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUCLEUS = 256  # tokens among which a nucleus is first looked for; nearly all have fewer


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the largest.
        top_p: in [0, 1]; keeps the most probable tokens until they have this probability together, at least one
            (nucleus sampling, https://arxiv.org/abs/1904.09751).
        top_k: keeps this many of the largest; 0 keeps all (https://arxiv.org/abs/1805.04833).
        min_p: in [0, 1]; keeps tokens of at least this share of the most probable one's probability
            (https://arxiv.org/abs/2407.01082).
        repetition_penalty: above 0; divides the logit of every token of the prompt and the answer where it is above 0
            and multiplies it where it is below (https://arxiv.org/abs/1909.05858).
        frequency_penalty, presence_penalty: subtracted from the logit of every generated token, the first once for each
            time it was generated (https://platform.openai.com/docs/api-reference/completions).
        seed: of the draws; None for another one every time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None


class Sampler:
    """The choices of one request, which no other request in the batch has a part in."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int]) -> None:
        self.options = options
        self._random = np.random.default_rng(options.seed)
        self._counts: Counter[int] = Counter()
        self._said = set(prompt)

    @property
    def plain(self) -> bool:
        """Whether the largest logit is the choice, so that one argmax serves all rows of a batch."""
        return self.options.temperature == 0 and not self._penalised

    @property
    def _penalised(self) -> bool:
        options = self.options
        return options.frequency_penalty != 0 or options.presence_penalty != 0 or options.repetition_penalty != 1

    def choose(self, logits: NDArray[Any]) -> int:
        """The next token of logits `[V]`, all of them finite or -inf."""
        options = self.options
        scores = logits.astype(np.float64)
        if options.repetition_penalty != 1:
            said = np.fromiter(self._said, np.int64)
            scores[said] *= np.where(scores[said] < 0, options.repetition_penalty, 1 / options.repetition_penalty)
        if self._counts:
            seen = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float64)
            scores[seen] -= options.frequency_penalty * counts + options.presence_penalty
        token = int(scores.argmax()) if options.temperature == 0 else self._draw(scores)
        if self._penalised:
            self._counts[token] += 1
            self._said.add(token)
        return token

    def _draw(self, scores: NDArray[np.float64]) -> int:
        options = self.options
        kept = np.arange(len(scores))
        if 0 < options.top_k < len(scores):
            kept = np.sort(np.argpartition(scores, -options.top_k)[-options.top_k :])
        weights = np.exp((scores[kept] - scores.max()) / options.temperature)  # the largest is 1
        if options.top_p < 1:
            places = nucleus(weights, options.top_p)
            kept, weights = kept[places], weights[places]
        likely = (weights >= options.min_p) & (weights > 0)
        kept, sums = kept[likely], np.cumsum(weights[likely])
        place = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
        return int(kept[min(place, len(sums) - 1)])


def nucleus(weights: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """Where the fewest weights `[N]` are that have this share of all together, at least one.

    Returns:
        Their places, the largest first, equal ones as they stand. Sorting a whole vocabulary takes 18 ms for one token,
        so they are looked for among the largest.
    """
    wanted, size = share * weights.sum(), NUCLEUS
    while True:
        size = min(size, len(weights))
        least = np.partition(weights, -size)[-size]
        places = np.flatnonzero((weights >= least) & (weights > 0))
        places = places[np.argsort(-weights[places], kind="stable")]
        sums = np.cumsum(weights[places])
        if sums[-1] >= wanted or size == len(weights):
            return places[: 1 + int(np.searchsorted(sums, wanted, side="left"))]
        size *= 16
