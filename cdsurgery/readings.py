"""Rows of several layers -> what one reading of the unembedding tells of them, and how many readings a step takes.

Many rows cost more to multiply than the unembedding to read. So the first reading takes layer L and the layers behind
it that cost next to nothing there, and later readings the other layers, of the rows that go on. How many go on is a
tensor, and everything here is static tensor operations, as in `cdsurgery.trough`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy, joined, logits_of_products, unembedded, unembedding_input
from cdsurgery.fused import FusedUnembedding
from cdsurgery.kernels.compact import compact
from cdsurgery.lazy import ACCELERATOR_FREE_ROWS

# Rows that a program of the kernel multiplies together, where there are many: fewer take as long (`kernels.launch`).
BLOCK = 128


def reading_plan(device: torch.device, rows: int, layers: int) -> list[int]:
    """How many of the K layers before the last each reading takes; the first one takes the last layer too.

    Nearly all rows that move do so by one layer (arXiv 2606.21906, table 5), which the layer behind that one shows. So
    on an accelerator the first reading takes three layers where that costs no more than two and a reading for the rows
    that went on, and as many more as its blocks of rows have room for; a second one takes all others.

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
    rows = max(rows, 1)
    taken = 3 if reading_cost(3 * rows) <= reading_cost(2 * rows) + 1 else 2
    first = min(layers, in_blocks(taken * rows) // rows - 1)
    return [first, layers - first] if first < layers else [first]


def reading_cost(rows: int) -> float:
    """How long an accelerator takes for that many rows, in readings of the unembedding."""
    return max(1, in_blocks(rows) / ACCELERATOR_FREE_ROWS)


def in_blocks(rows: int) -> int:
    """How many rows it multiplies for that many."""
    return math.ceil(rows / BLOCK) * BLOCK


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
        return cls(*compact(counts))


class Reading:
    """A x B rows, multiplied while the unembedding is read once.

    Args:
        inputs: `[A, B, D]`.
        written: of how many of the first rows the product is kept.
        active: `[]` int64, how many of the first rows count; None for all.

    Attributes:
        entropy: `[A, B]` float32 nats; NaN in rows that do not count.
        products: `[written, V]`.
    """

    def __init__(self, tail: Tail, inputs: Tensor, written: int, active: Tensor | None = None) -> None:
        self._tail, self._inputs = tail, inputs
        entropy, self.products = tail.unembedding.entropies(inputs.flatten(0, 1), written, active)
        self.entropy = entropy.view(inputs.shape[:2])

    @property
    def keeps_all(self) -> bool:
        """Whether the products of all rows were written."""
        return len(self.products) == self.entropy.numel()

    def again(self, at: tuple[Tensor, Tensor], moves: Tensor) -> Tensor:
        """The logits of N of its rows, `[N, V]`, by a second product.

        Args:
            at: `[N]` int64 each, their places on A and on B.
            moves: `[N]` int64; where it is not above 0, what is returned may be anything.
        """
        model, anatomy, inputs = self._tail.model, self._tail.anatomy, self._inputs[at]
        if torch.is_grad_enabled():
            return unembedded(model, anatomy, inputs)
        some = Compaction.of(moves > 0)
        _, products = self._tail.unembedding.entropies(inputs[some.order], len(inputs), some.active)
        return logits_of_products(model, anatomy, products[some.place])
