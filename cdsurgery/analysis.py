"""A model and windows of a text -> what selecting layers does to it: how often, how far back, and how well it predicts.

The model is given the text and does not write it: at every position it is asked for the token that really follows.

    windows = [ids[begin : begin + 257] for begin in range(0, len(ids) - 1, 256)]
    analysis = analyze(model, windows)
    analysis.moved / analysis.positions, analysis.selected.nll - analysis.final.nll
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdsurgery.entropy import partial_sums
from cdsurgery.errors import InvalidInputError
from cdsurgery.probe import taken
from cdsurgery.wrap import layers_of

MOST_CHANGES = 8
CONTEXT_TOKENS = 8  # of a change: enough to see where it is


@dataclass(frozen=True)
class Prediction:
    """How one layer, or the selected one of each position, predicts a text. Means over all positions.

    Attributes:
        entropy: nats, in [0, ln V]; of another measure where the model was wrapped with one.
        nll: negative log-likelihood of the token that follows, nats per token.
        accuracy: in [0, 1]; how often the token that follows has the largest logit.
    """

    entropy: float
    nll: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """exp(nll), in [1, inf]."""
        return float(torch.tensor(self.nll, dtype=torch.float64).exp())  # math.exp raises where it is inf


@dataclass(frozen=True)
class Change:
    """A position at which the selected layer says another token than the final one.

    Attributes:
        context: the last tokens before it, at most `CONTEXT_TOKENS`.
        token: the id that follows in the text.
        final_token, selected_token: the ids to which the final and the selected layer give the largest logit.
        selected_layer: in [L-K, L-1]; layers are counted 1..L.
        final_entropy, selected_entropy: nats.
    """

    context: tuple[int, ...]
    token: int
    final_token: int
    selected_token: int
    selected_layer: int
    final_entropy: float
    selected_entropy: float


@dataclass(frozen=True)
class Analysis:
    """What selecting layers does to a text.

    Attributes:
        layers: L.
        depths: `[M]`, how many positions select layer L-k, for k = 0..K.
        changed: at how many the selected layer says another token than the final one.
        entropy: `[M]` means over all positions, nats; index k is layer L-k. NaN where a candidate was not measured at
            every position, as with a lazy scan, or is broken at one.
        final, selected: how the final layer and the selected ones predict the text.
        changes: some of the changed positions, those whose entropy falls most first.
    """

    layers: int
    depths: tuple[int, ...]
    changed: int
    entropy: tuple[float, ...]
    final: Prediction
    selected: Prediction
    changes: tuple[Change, ...]

    @property
    def positions(self) -> int:
        """How many tokens were predicted."""
        return sum(self.depths)

    @property
    def moved(self) -> int:
        """How many positions select a layer before the final one."""
        return self.positions - self.depths[0]

    @property
    def mean_depth(self) -> float:
        """The mean of L - selected_layer, in [0, K]."""
        return sum(depth * count for depth, count in enumerate(self.depths)) / self.positions

    @property
    def mean_fall(self) -> float:
        """By how many nats entropy is lower in the selected than in the final layer: mean of those moved, or NaN."""
        if self.moved == 0:
            return math.nan
        return (self.final.entropy - self.selected.entropy) * self.positions / self.moved


@torch.no_grad()
def analyze(model: Any, windows: Iterable[Tensor]) -> Analysis:
    """Have a model read a text, and count what its selection of layers does at every position.

    A window is one forward, and the logits of no other window are in memory then.

    Args:
        model: a wrapped model, or what `cdsurgery.export.load` returned of an artifact with positions="all".
        windows: `[n]` int64 token ids each, n at least 2. The first n-1 are read, and the last n-1 are what follows
            them; windows need not be equally long, and know nothing of each other.

    Raises:
        InvalidInputError: there is no window, or one is not of token ids that the model has; the model selects no
            layers, or does not return the logits of all positions.
    """
    layers = layers_of(model)
    sums: dict[str, Tensor] = {}
    changes: list[Change] = []
    for window in windows:
        rows, changed = _read(model, window, layers)
        for name, row in rows.items():
            sums[name] = sums.get(name, 0) + row.sum(dim=0, dtype=torch.float64)
        changes = sorted([*changes, *changed], key=_fall, reverse=True)[:MOST_CHANGES]
    if not sums:
        raise InvalidInputError("There is no window to read. Give at least one, of two tokens or more.")
    depths = tuple(int(count) for count in sums["depths"])
    means = {name: total / sum(depths) for name, total in sums.items()}
    final, selected = (
        Prediction(*(float(means[f"{of}_{each}"]) for each in ("entropy", "nll", "right")))
        for of in ("final", "selected")
    )
    entropy = tuple(means["entropy"].tolist())
    return Analysis(layers, depths, int(sums["changed"]), entropy, final, selected, tuple(changes))


def _read(model: Any, window: Tensor, layers: int) -> tuple[dict[str, Tensor], list[Change]]:
    """One forward: numbers of every position, `[T]` or `[T, M]`, on the CPU; and the positions that change."""
    if window.ndim != 1 or len(window) < 2 or window.dtype != torch.int64:
        raise InvalidInputError(
            f"A window has shape {list(window.shape)} and dtype {window.dtype}; it must be [n] token ids, int64, at "
            "least two: one to read and the one that follows."
        )
    vocabulary = model.config.get_text_config().vocab_size
    if not 0 <= window.min() <= window.max() < vocabulary:
        raise InvalidInputError(
            f"A window has token ids from {window.min()} to {window.max()}; the model has those from 0 to "
            f"{vocabulary - 1}. They come from another tokenizer."
        )
    ids = window[None, :-1].to(model.device)
    output = model(**taken(model.forward, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    if getattr(output, "entropy", None) is None:
        raise InvalidInputError(
            "The model is wrapped with probability=0, which is ordinary decoding: it selects no layers. Wrap it with a "
            "probability above 0."
        )
    if output.logits.shape[1] != ids.shape[1]:
        raise InvalidInputError(
            "The artifact returns the logits of the last position, and a text is read at every one. Export it with "
            "positions='all'."
        )
    entropy, depth = output.entropy[0].cpu(), layers - output.selected_layer[0].cpu()
    follows = window[1:].cpu()
    final_token, final_nll = _predicted(output.final_logits[0], follows)
    selected_token, selected_nll = _predicted(output.logits[0], follows)
    selected_entropy = entropy.gather(-1, depth[:, None]).squeeze(-1)
    changed = final_token != selected_token
    rows = {
        "depths": torch.nn.functional.one_hot(depth, entropy.shape[-1]),
        "changed": changed,
        "entropy": entropy,
        "final_entropy": entropy[:, 0],
        "selected_entropy": selected_entropy,
        "final_nll": final_nll,
        "selected_nll": selected_nll,
        "final_right": final_token == follows,
        "selected_right": selected_token == follows,
    }
    changes = [
        Change(
            context=tuple(window[max(0, t + 1 - CONTEXT_TOKENS) : t + 1].tolist()),
            token=int(follows[t]),
            final_token=int(final_token[t]),
            selected_token=int(selected_token[t]),
            selected_layer=layers - int(depth[t]),
            final_entropy=float(entropy[t, 0]),
            selected_entropy=float(selected_entropy[t]),
        )
        for t in changed.nonzero().flatten().tolist()
    ]
    return rows, changes


def _predicted(logits: Tensor, follows: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, V]` logits and `[T]` ids -> ids of the largest logits `[T]`, and -log p of the given ids `[T]` float64."""
    of_follows = logits.gather(-1, follows[:, None].to(logits.device)).squeeze(-1)
    maximum, s, _ = partial_sums(logits)
    maximum, s, of_follows = (each.cpu().double() for each in (maximum, s, of_follows))
    # log(1 + s) keeps the digits of a likelihood near 1, as in `cdsurgery.entropy`.
    return logits.float().argmax(dim=-1).cpu(), maximum - of_follows + s.log1p()


def _fall(change: Change) -> float:
    return change.final_entropy - change.selected_entropy
