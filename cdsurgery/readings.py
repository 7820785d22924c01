"""Rows of several layers -> what one reading of the unembedding tells of them, and how many readings a step takes.

Many rows cost more to multiply than the unembedding to read. So the first reading takes layer L and the layers behind
it that cost next to nothing there, and later readings the other layers, of the rows that go on. How many go on is a
tensor, which only `unembed_sums` looks at: everything here is static tensor operations, as in `cdsurgery.trough`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy, joined, logits_of_products, unembedded, unembedding_input
from cdsurgery.entropy import entropy_of_sums
from cdsurgery.fused import FusedUnembedding
from cdsurgery.lazy import ACCELERATOR_FREE_ROWS


def reading_plan(device: torch.device, rows: int, layers: int) -> list[int]:
    """How many of the K layers before the last each reading takes; the first one takes the last layer too.

    An accelerator multiplies `ACCELERATOR_FREE_ROWS` while it reads the unembedding, so its first reading takes as many
    layers as that allows, and a second one all others, of the rows that go on. Nearly all rows that move do so by one
    layer (arXiv 2606.21906, table 5), which the layer behind that one shows: taking both spares the second reading, and
    pays as long as it costs less.

    On a CPU every row costs. There the first reading takes one layer, and each later one as many as those before it
    together: few rows come to the second one and hardly any to a third, and a row that goes all the way has come to no
    more than log2 K + 2 of them.

    Args:
        device: of the unembedding.
        rows: B x T, those of one layer.
        layers: K, at least 1.
    """
    if device.type == "cpu":
        plan = [1]
        while (left := layers - sum(plan)) > 0:
            plan.append(min(left, sum(plan)))
        return plan
    free = ACCELERATOR_FREE_ROWS // max(rows, 1)
    first = min(layers, max(free - 1, 2 if free > 0 else 1))
    return [first, layers - first] if first < layers else [first]


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
        """Of N of its rows, `[N, V]`, anything where `counts` is false; a second product unless all were written.

        Args:
            rows: `[N]` int64, their places in the reading.
            counts: `[N]` bool.
        """
        model, anatomy = self._tail.model, self._tail.anatomy
        if len(self.products) == len(self.entropy):
            return logits_of_products(model, anatomy, self.products[rows])
        if torch.is_grad_enabled():
            return unembedded(model, anatomy, self._inputs[rows])
        some = Compaction.of(counts)
        *_, products = self._tail.unembedding.sums(self._inputs[rows[some.order]], len(rows), some.active)
        return logits_of_products(model, anatomy, products[some.place])
