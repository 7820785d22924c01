"""States of all M layers -> their entropies and the selected logits, from one reading of the unembedding.

A decoding step takes the time in which it reads its weights, and the unembedding is a good part of those. A product of
the candidates' own would read it a second time. So their rows join that of the final layer when the model asks for its
product: an `OpenLinear` stands where its unembedding stood, and a `OnePass` answers in its place.

Where nobody asks for all entropies, that pass takes a few of the layers, and rows that descend past those come back in
later ones (`cdsurgery.readings`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy
from cdsurgery.errors import UnsupportedModelError
from cdsurgery.fused import fused_unembedding
from cdsurgery.lazy import can_look
from cdsurgery.readings import Compaction, Reading, Tail, reading_plan
from cdsurgery.trough import allowed_depth, trough_depth
from cdsurgery.unembedding import OpenLinear


def open_(model: Any, anatomy: Anatomy) -> None:
    """Make the unembedding an `OpenLinear`, in place.

    Raises:
        UnsupportedModelError: it is not one that `unembed_sums` can take.
    """
    fused_unembedding(model, anatomy)
    model.get_submodule(anatomy.unembedding).__class__ = OpenLinear


def close_(model: Any, anatomy: Anatomy) -> None:
    """Undo `open_`, in place."""
    head: Any = model.get_submodule(anatomy.unembedding)
    if isinstance(head, OpenLinear):
        head.__class__ = nn.Linear  # type: ignore[assignment]  # what it was


@contextmanager
def one_pass(
    model: PreTrainedModel, anatomy: Anatomy, states: Sequence[Tensor], sparing: bool = False
) -> Iterator[OnePass]:
    """Answer in place of the unembedding while the model runs.

    Args:
        states: K of them, index k of layer L-k-1, each as `tail_logits` takes it; a list that is complete when the
            model comes to its unembedding.
        sparing: whether rows that do not go on may do without the entropies of the layers that they do not reach.

    Raises:
        UnsupportedModelError: the model's unembedding has become one that this cannot take.
    """
    tail = Tail(model, anatomy, fused_unembedding(model, anatomy))
    head: Any = model.get_submodule(anatomy.unembedding)
    if type(head) is not OpenLinear:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its unembedding '{anatomy.unembedding}' has been replaced since the model was "
            "wrapped with scan='fused'. Wrap it again: cdsurgery.wrap(cdsurgery.unwrap(model), scan='fused')."
        )
    head.instead = passed = OnePass(tail, states, sparing)
    try:
        yield passed
    finally:
        head.instead = None


class OnePass:
    """What the unembedding is asked for, and what comes of it.

    Args:
        tail: the model's.
        states, sparing: as of `one_pass`.
    """

    def __init__(self, tail: Tail, states: Sequence[Tensor], sparing: bool) -> None:
        self._tail, self._states, self._sparing = tail, states, sparing

    def __call__(self, final: Tensor) -> Tensor | None:
        """What the model gives its unembedding, `[..., D]` -> its product `[..., V]`.

        None where gradients are kept, or where a layer did not run and nothing will be selected.
        """
        if any(state is None for state in self._states):
            return None
        own = final.flatten(0, -2)
        # Sums have no gradient, and products get theirs from the layer itself.
        differentiable = torch.is_grad_enabled()
        rows, layers = own.shape[0], len(self._states)
        spares = self._sparing and not differentiable
        first, *self._later = reading_plan(own.device, rows, layers) if spares else [layers]
        earlier = self._tail.inputs(self._states[:first]).to(own.device)
        keeps_all = not differentiable and self._tail.unembedding.writes(rows * first)
        written = rows * (first + 1) if keeps_all else 0 if differentiable else rows
        # Its rows are those of layer L, then those of layer L-1, and so on.
        self._reading = Reading(self._tail, torch.cat([own[None], earlier]), written)
        if differentiable:
            return None
        product = self._reading.products[:rows].unflatten(0, final.shape[:-1])
        # A copy, so that who keeps the final logits does not keep those of all candidates; a step's are soon let go.
        return product if self._sparing else product.clone()

    def select(self, final: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `cdsurgery.trough.select` finds.

        Args:
            final: `[B, T, V]` logits of layer L, which the model made of the product.
            allowed: as for `select`.

        Returns:
            logits `[B, T, V]`, depth `[B, T]` int64 in [0, K], entropy `[B, T, M]` float32, NaN in the layers of
            readings that the row did not come to.
        """
        entropy = self._reading.entropy.unflatten(1, final.shape[:-1]).movedim(0, -1)
        depth = allowed_depth(entropy, allowed)
        back = depth.flatten()
        logits = self._reading.logits((back, torch.arange(len(back), device=back.device)), back).view(final.shape)
        if not self._reading.keeps_all:  # final rows among them
            logits = torch.where((depth > 0)[..., None], logits, final)
        for layers in self._later:
            going = Compaction.of(depth.flatten() == entropy.shape[-1] - 1)
            if depth.is_cpu and can_look(depth.device) and not going.active:  # on a CPU nobody waits for a look
                break
            logits, depth, entropy = self._select_further(logits, depth, entropy, going, layers)
        unread = len(self._states) + 1 - entropy.shape[-1]
        return logits, depth, pad(entropy, (0, unread), value=float("nan")) if unread else entropy

    def _select_further(
        self, logits: Tensor, depth: Tensor, entropy: Tensor, going: Compaction, layers: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, of rows that went as far back as has been read, with a reading of so many layers more."""
        reached = entropy.shape[-1] - 1
        # Its rows are all layers of one row, then those of the next one.
        inputs = self._tail.inputs(self._states[reached : reached + layers]).to(depth.device)[:, going.order]
        rows = layers * len(going.order)
        written = rows if self._tail.unembedding.writes(rows) else 0
        reading = Reading(self._tail, inputs.movedim(0, 1), written, going.active * layers)
        deeper = reading.entropy[going.place]
        entropy = torch.cat([entropy, deeper.view(*depth.shape, -1)], dim=-1)
        depth = torch.where(depth == reached, trough_depth(entropy), depth)
        moves = depth.flatten() - reached
        chosen = reading.logits((going.place, (moves - 1).clamp(min=0)), moves).view(logits.shape)
        return torch.where((depth > reached)[..., None], chosen, logits), depth, entropy
