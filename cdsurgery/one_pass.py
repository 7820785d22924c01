"""States of all M layers -> their entropies and the selected logits, from one reading of the unembedding.

A decoding step takes the time in which it reads its weights, and the unembedding is a good part of those. A product of
the candidates' own would read it a second time. So their rows join that of the final layer when the model asks for its
product: an `OpenLinear` stands where its unembedding stood, and a `OnePass` answers in its place.

Many rows cost more to multiply than the unembedding to read. There the first reading takes layers L and L-1, and a
second one all others of the rows that go on. How many go on is a tensor, which only `unembed_sums` looks at: everything
here is static tensor operations, as in `cdsurgery.trough`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy, joined, logits_of_products, unembedded, unembedding_input
from cdsurgery.entropy import entropy_of_sums
from cdsurgery.errors import UnsupportedModelError
from cdsurgery.fused import FusedUnembedding, fused_unembedding
from cdsurgery.lazy import fewer_rows_pay
from cdsurgery.trough import allowed_depth
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


@dataclass(frozen=True)
class Tail:
    """A model's tail, and its end as `unembed_sums` takes it."""

    model: PreTrainedModel
    anatomy: Anatomy
    unembedding: FusedUnembedding

    def inputs(self, states: Sequence[Tensor]) -> Tensor:
        """m states of N rows -> what their unembedding multiplies, `[m, N, D]`."""
        inputs = unembedding_input(self.model, self.anatomy, joined(states, self.anatomy))
        return inputs.flatten(0, -2).unflatten(0, (len(states), -1))


@dataclass(frozen=True)
class Compaction:
    """N rows of which some count, and an order in which those come first.

    Attributes:
        order: `[N]` int64, the place of each row before.
        place: `[N]` int64, the place of each in that order.
        active: `[]` int64, how many count.
    """

    order: Tensor
    place: Tensor
    active: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> Compaction:
        """From whether each row counts, `[N]` bool."""
        order = counts.logical_not().argsort(stable=True)
        return cls(order, order.argsort(), counts.sum())


class Reading:
    """R rows, multiplied while the unembedding is read once.

    Args:
        inputs: `[R, D]`.
        written: of how many of the first rows the product is kept.
        active: `[]` int64, how many of the first rows count; None for all.

    Attributes:
        entropy: `[R]` float32 nats; NaN in rows that do not count.
        products: `[written, V]`.
    """

    def __init__(self, tail: Tail, inputs: Tensor, written: int, active: Tensor | None = None) -> None:
        self._tail, self._inputs = tail, inputs
        maximum, s, t, self.products = tail.unembedding.sums(inputs, written, active)
        self.entropy = entropy_of_sums(maximum, s, t)

    def logits(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Of N of its rows, `[N, V]`, anything where `counts` `[N]` is false; a second product if none was written."""
        model, anatomy = self._tail.model, self._tail.anatomy
        if len(self.products) == len(self.entropy):
            return logits_of_products(model, anatomy, self.products[rows])
        if torch.is_grad_enabled():
            return unembedded(model, anatomy, self._inputs[rows])
        some = Compaction.of(counts)
        *_, products = self._tail.unembedding.sums(self._inputs[rows[some.order]], len(rows), some.active)
        return logits_of_products(model, anatomy, products[some.place])


class OnePass:
    """What the unembedding is asked for, and what comes of it.

    Args:
        tail: the model's.
        states, sparing: as of `one_pass`.
    """

    def __init__(self, tail: Tail, states: Sequence[Tensor], sparing: bool) -> None:
        self._tail, self._states, self._sparing = tail, states, sparing

    def __call__(self, final: Tensor) -> Tensor | None:
        """What the model gives its unembedding, `[..., D]` -> its product `[..., V]`; None where gradients are kept."""
        own = final.flatten(0, -2)
        # Sums have no gradient, and products get theirs from the layer itself.
        differentiable = torch.is_grad_enabled()
        rows, layers = own.shape[0], len(self._states)
        spares = self._sparing and not differentiable and fewer_rows_pay(own.device, rows * (layers + 1))
        self._first = 1 if spares else layers
        earlier = self._tail.inputs(self._states[: self._first]).to(own.device)
        keeps_all = not differentiable and self._tail.unembedding.writes(rows * self._first)
        written = rows * (self._first + 1) if keeps_all else 0 if differentiable else rows
        self._reading = Reading(self._tail, torch.cat([own[None], earlier]).flatten(0, 1), written)
        # A copy, so that who keeps the final logits does not keep those of all candidates.
        return None if differentiable else self._reading.products[:rows].clone().unflatten(0, final.shape[:-1])

    def select(self, final: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `cdsurgery.trough.select` finds.

        Args:
            final: `[B, T, V]` logits of layer L, which the model made of the product.
            allowed: as for `select`.

        Returns:
            logits `[B, T, V]`, depth `[B, T]` int64 in [0, K], entropy `[B, T, M]` float32, NaN behind layer L-1 in
            rows that did not go on.
        """
        # The rows of the first reading are those of layer L, then those of layer L-1, and so on.
        entropy = self._reading.entropy.view(-1, *final.shape[:-1]).movedim(0, -1)
        depth = allowed_depth(entropy, allowed)
        back = depth.flatten()
        rows = back * len(back) + torch.arange(len(back), device=depth.device)
        logits = self._reading.logits(rows, back > 0).view(final.shape)
        if len(self._reading.products) < len(self._reading.entropy):  # a second product, of final rows too
            logits = torch.where((depth > 0)[..., None], logits, final)
        if self._first == len(self._states):
            return logits, depth, entropy
        return self._select_further(logits, depth, entropy)

    def _select_further(self, logits: Tensor, depth: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, of rows that went back as far as the first reading reached, with a second one."""
        first, later = self._first, self._states[self._first :]
        going = Compaction.of(depth.flatten() == first)
        # The rows of the second reading are all layers of one row, then those of the next one.
        inputs = self._tail.inputs(later).to(depth.device)[:, going.order].movedim(0, 1).flatten(0, 1)
        written = len(inputs) if self._tail.unembedding.writes(len(inputs)) else 0
        reading = Reading(self._tail, inputs, written, going.active * len(later))
        deeper = reading.entropy.view(-1, len(later))[going.place]
        entropy = torch.cat([entropy, deeper.view(*depth.shape, -1)], dim=-1)
        depth = torch.where(depth == first, allowed_depth(entropy, None), depth)
        further = depth.flatten() - first
        rows = going.place * len(later) + (further - 1).clamp(min=0)
        chosen = reading.logits(rows, further > 0).view(logits.shape)
        return torch.where((depth > first)[..., None], chosen, logits), depth, entropy
