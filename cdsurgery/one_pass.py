"""States of all M layers -> their entropies and the selected logits, from one reading of the unembedding.

A decoding step takes the time in which it reads its weights, and the unembedding is a good part of those. A product of
the candidates' own would read it a second time. So their rows join that of the final layer when the model asks for its
product: an `OpenLinear` stands where its unembedding stood, and a `OnePass` answers in its place.

Where nobody asks for all entropies, that pass takes a few of the layers, and rows that descend past those come back in
later ones (`cdsurgery.readings`).

In a decode step they have gone through the final norm together with the final layer's (`cdsurgery.joint_norm`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy, joined, logits_of_products
from cdsurgery.errors import UnsupportedModelError
from cdsurgery.fused import fused_unembedding
from cdsurgery.joint_norm import JointNorm
from cdsurgery.kernels.pick_trough import pick_further, pick_trough
from cdsurgery.lazy import can_look
from cdsurgery.readings import Compaction, Reading, Tail, reading_plan
from cdsurgery.trough import allowed_depth, trough_depth
from cdsurgery.unembedding import OpenLinear


def open_(model: Any, anatomy: Anatomy) -> JointNorm | None:
    """Make the unembedding an `OpenLinear` and the final norm a joint one, in place.

    Returns:
        The norm's hooks; None where something else than a norm stands before the unembedding.

    Raises:
        UnsupportedModelError: the unembedding is not one that `unembed_sums` can take.
    """
    fused_unembedding(model, anatomy)
    model.get_submodule(anatomy.unembedding).__class__ = OpenLinear
    norm = _lone_norm(anatomy)
    return None if norm is None else JointNorm(model.get_submodule(norm))


def close_(model: Any, norm: JointNorm | None) -> None:
    """Undo `open_`, in place."""
    for part in model.modules():  # an adapter may stand around it by now
        if isinstance(part, OpenLinear):
            part.__dict__.pop("instead", None)
            part.__class__ = nn.Linear  # type: ignore[assignment]  # what it was
    if norm is not None:
        norm.remove()


@contextmanager
def one_pass(
    model: PreTrainedModel,
    anatomy: Anatomy,
    norm: JointNorm | None,
    states: Sequence[Tensor],
    sparing: bool = False,
) -> Iterator[OnePass]:
    """Answer in place of the unembedding while the model runs.

    Args:
        norm: what `open_` returned.
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
    if norm is not None:
        norm.keep(passed)
    try:
        yield passed
    finally:
        head.instead = None
        if norm is not None:
            norm.company = None


class OnePass:
    """What the norm and the unembedding are asked for, and what comes of it.

    Args:
        tail: the model's.
        states, sparing: as of `one_pass`.
    """

    def __init__(self, tail: Tail, states: Sequence[Tensor], sparing: bool) -> None:
        self._tail, self._states, self._sparing = tail, states, sparing
        self._joined = 0  # layers
        self._normed: Tensor | None = None  # of those layers, `[m, B T, D]`

    def join(self, own: Tensor) -> Tensor | None:
        """What the model gives its final norm, `[B, T, D]` -> `[(m + 1) B, T, D]`, with the states of m layers behind.

        None where gradients are kept, where of a prompt's rows few go on to the unembedding, where a layer did not run,
        and where a cast of the model has shown that the norm is not alone before the unembedding.
        """
        first, self._joined = self._states[0], 0
        if torch.is_grad_enabled() or self._incomplete() or _lone_norm(self._tail.anatomy) is None:
            return None
        if (own.shape, own.dtype) != (first.shape, first.dtype):
            return None
        # A CPU hardly ever comes to later readings.
        self._joined = self._plan(own.device, own.shape[:-1].numel())[0] if _looks(own) else len(self._states)
        return joined([own, *self._states[: self._joined]], self._tail.anatomy)

    def part(self, normed: Tensor) -> Tensor | None:
        """What the norm made of `join`'s rows, `[(m + 1) B, T, D]` -> the model's own, `[B, T, D]`; None of others."""
        if self._joined == 0:
            return None
        batch = len(self._states[0])
        self._normed = normed[batch:].flatten(0, -2).unflatten(0, (self._joined, -1))
        return normed[:batch]

    def __call__(self, final: Tensor) -> Tensor | None:
        """What the model gives its unembedding, `[..., D]` -> its product `[..., V]`.

        None where gradients are kept, or where a layer did not run and nothing will be selected.
        """
        if self._incomplete():
            return None
        own = final.flatten(0, -2)
        # Sums have no gradient, and products get theirs from the layer itself.
        differentiable, rows = torch.is_grad_enabled(), own.shape[0]
        first, *self._later = plan = self._plan(own.device, rows)
        keeps_all = not differentiable and self._tail.unembedding.writes(rows * max(plan))
        written = rows * (first + 1) if keeps_all else 0 if differentiable else rows
        # Its rows are those of layer L, then those of layer L-1, and so on.
        self._reading = Reading(self._tail, torch.cat([own[None], self._inputs(0, first).to(own.device)]), written)
        if differentiable:
            return None
        product = self._reading.products[:rows].unflatten(0, final.shape[:-1])
        # A copy, so that who keeps the final logits does not keep those of all candidates; a step's are soon let go.
        return product if self._sparing else product.clone()

    def _inputs(self, begin: int, end: int) -> Tensor:
        """What the unembedding multiplies of layers L-begin-1 to L-end, `[end - begin, B T, D]`."""
        if self._normed is not None and end <= len(self._normed):
            return self._normed[begin:end]
        return self._tail.inputs(self._states[begin:end])

    def _incomplete(self) -> bool:
        return any(state is None for state in self._states)

    def _plan(self, device: torch.device, rows: int) -> list[int]:
        spares = self._sparing and not torch.is_grad_enabled()
        return reading_plan(device, rows, len(self._states)) if spares else [len(self._states)]

    def select(self, final: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `cdsurgery.trough.select` finds.

        Args:
            final: `[B, T, V]` logits of layer L, which the model made of the product.
            allowed: as for `select`.

        Returns:
            logits `[B, T, V]`, depth `[B, T]` int64 in [0, K], entropy `[B, T, M]` float32, NaN in the layers of
            readings that the row did not come to.
        """
        may_move = None if allowed is None else allowed.flatten()
        find = self._picked if self._reading.keeps_all else self._projected_again
        logits, depth, entropy = find(final.flatten(0, -2), may_move)
        unread = len(self._states) + 1 - len(entropy)
        entropy = entropy.unflatten(1, final.shape[:-1]).movedim(0, -1)
        entropy = pad(entropy, (0, unread), value=float("nan")) if unread else entropy
        return logits.view(final.shape), depth.view(final.shape[:-1]), entropy

    def _picked(self, final: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[N, V]`, depth `[N]` and entropy `[.., N]`, where the products of all candidates were written."""
        entropy = self._reading.entropy
        depth, products = pick_trough(entropy, self._reading.products, allowed)
        for layers in self._later:
            going = Compaction.of(depth == len(entropy) - 1)
            if _looks(depth) and not going.active:
                break
            further = self._read_further(going, len(entropy) - 1, layers)
            depth, entropy = pick_further(depth, products, entropy, going.place, further.entropy, further.products)
        return logits_of_products(self._tail.model, self._tail.anatomy, products), depth, entropy

    def _projected_again(self, final: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same where they were not, so that those of the chosen ones are made again; `final` is `[N, V]`."""
        entropy = self._reading.entropy
        depth = allowed_depth(entropy.T, allowed)
        chosen = self._reading.again((depth, torch.arange(len(depth), device=depth.device)), depth)
        logits = torch.where((depth > 0)[:, None], chosen, final)
        for layers in self._later:
            reached = len(entropy) - 1
            going = Compaction.of(depth == reached)
            if _looks(depth) and not going.active:
                break
            further = self._read_further(going, reached, layers)
            entropy = torch.cat([entropy, further.entropy[going.place].T])
            depth = torch.where(depth == reached, trough_depth(entropy.T), depth)
            moves = depth - reached
            chosen = further.again((going.place, (moves - 1).clamp(min=0)), moves)
            logits = torch.where((moves > 0)[:, None], chosen, logits)
        return logits, depth, entropy

    def _read_further(self, going: Compaction, reached: int, layers: int) -> Reading:
        """The next layers of the rows that go on: all of one row, then those of the next one."""
        inputs = self._inputs(reached, reached + layers).to(going.order.device)[:, going.order].movedim(0, 1)
        written = layers * len(going.order) if self._reading.keeps_all else 0
        return Reading(self._tail, inputs, written, going.active * layers)


def _lone_norm(anatomy: Anatomy) -> str | None:
    """The path of the final norm where that alone stands before the unembedding, and takes rows by their first axis."""
    before = anatomy.before_unembedding
    alone = len(before) == 1 and isinstance(before[0], str) and anatomy.batch_axis == 0
    return cast(str, before[0]) if alone else None


def _looks(tensor: Tensor) -> bool:
    """Whether code goes by values: on a CPU nobody waits for a look."""
    return tensor.is_cpu and can_look(tensor.device)
