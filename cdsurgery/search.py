"""One recorded forward -> the anatomy it shows: followed by value, from the layers' states to the logits.

1. Layers: the members of a container that run at most once each, in order, each on what the one before it returned.
2. Tail: from the last layer's output, the modules that are each given the state, until the state is the logits.
3. Gaps: where no module is given the state, some of the transforms that the model declares must close the gap, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, permutations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy
from cdsurgery.errors import UnsupportedModelError
from cdsurgery.probe import LENGTH, ROWS, Call
from cdsurgery.transforms import Transform, declared_transforms

# A gap closed so far takes two transforms (xlstm in half precision: a cast, then a softcap).
MOST_IN_A_GAP = 3

# Logits of a module made to return other ones: (path, `[B, T, V]`) -> the model's logits.
Replaced = Callable[[str, Tensor], Tensor]


def find_anatomy(model: PreTrainedModel, calls: list[Call], logits: Tensor, replaced: Replaced) -> Anatomy:
    """The outermost chain of layers whose end leads to the logits, and how it leads there.

    Args:
        calls: every module call of one forward, in order of beginning.
        logits: what that forward returned.
        replaced: runs the model again with one module's output replaced.

    Raises:
        UnsupportedModelError: with the containers looked at, and why each is not the model's decoder.
    """
    trail = _Trail(model, calls, logits, replaced)
    found: list[str] = []
    containers = [path for path, part in model.named_modules() if isinstance(part, _CONTAINERS)]
    for path in sorted(containers, key=lambda path: path.count(".")):
        layers = [call for call in calls if call.path.rpartition(".")[0] == path]
        flaw = trail.chain_flaw(layers)
        if flaw is None:
            last = layers[-1]
            assert last.returned is not None
            tail = trail.to_logits(last.returned, last.ended)
            axis = _batch_axis(last.returned)
            if tail is not None and axis is not None:
                return Anatomy(tuple(call.path for call in layers), tail, axis)
            flaw = trail.end(last) if tail is None else f"its states are {list(last.returned.shape)}"
        found.append(f"'{path}' ({flaw})")
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of decoder layers whose last output leads to its logits. Found: "
        f"{'; '.join(found[:4]) or 'no module list'}. Declared transforms: "
        f"{', '.join(sorted({row.option for row in trail.declared}))}. A model with one residual stream through layers "
        "that run once and in order can be wrapped; where its parts only stand elsewhere, pass them: "
        "wrap(model, anatomy=cdsurgery.Anatomy(layers, tail))."
    )


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class _Trail:
    """Where the state can be followed to.

    Attributes:
        declared: the transforms that may close a gap.
        farthest: of all attempts to follow the state of one chain of layers, the module that came last.
    """

    model: PreTrainedModel
    calls: list[Call]
    logits: Tensor
    replaced: Replaced
    declared: list[Transform] = field(init=False)
    farthest: Call | None = None

    def __post_init__(self) -> None:
        self.declared = declared_transforms(self.model)

    def chain_flaw(self, layers: list[Call]) -> str | None:
        """Why these calls are not one residual stream, or None where they are."""
        if not layers:
            return "its members never ran"
        order = [call.path.rpartition(".")[2] for call in layers]
        places = list(self.model.get_submodule(layers[0].path.rpartition(".")[0])._modules)
        if order != [name for name in places if name in order]:
            return f"its members ran in the order [{', '.join(order)}], not each once and in order"
        for before, after in pairwise(layers):
            if not any(same(state, after.given) for state, _ in self.states_after(before.returned, most=1)):
                return f"'{after.path}' does not start from what '{before.path}' returned"
        return None

    def to_logits(self, state: Tensor, clock: int, head: Call | None = None) -> tuple[str | Transform, ...] | None:
        """The steps from `state`, as it is at `clock`, to the logits; None where it cannot be followed there."""
        if head is None or self.farthest is None or head.ended > self.farthest.ended:
            self.farthest = head
        for changed, transforms in self.states_after(state):
            for call in self.calls:
                if clock < call.began and call.returned is not None and same(call.given, changed):
                    rest = self.to_logits(call.returned, call.ended, call)
                    if rest is not None:
                        return (*transforms, call.path, *rest)
        if head is None:
            return None
        ends = [transforms for changed, transforms in self.states_after(state) if same(changed, self.logits)]
        if len(ends) > 1:
            ends = self.told_apart(head, ends)
        return ends[0] if ends else None

    def told_apart(self, head: Call, ends: list[tuple[Transform, ...]]) -> list[tuple[Transform, ...]]:
        """Those ends that also hold for logits up to 100: below the cap, a softcap can be lost in rounding."""
        assert head.returned is not None
        large = head.returned * (100 / head.returned.abs().max())
        truth = self.replaced(head.path, large)
        return [end for end in ends if any(same(z, truth) for z, steps in self.states_after(large) if steps == end)]

    def states_after(
        self, state: Tensor | None, most: int = MOST_IN_A_GAP
    ) -> Iterator[tuple[Tensor, tuple[Transform, ...]]]:
        """The state, then what each sequence of up to `most` declared transforms makes of it, shortest first."""
        if state is None:
            return
        for size in range(most + 1):
            for rows in permutations(self.declared, size):
                changed = self.transformed(state, rows)
                if changed is not None:
                    yield changed, rows

    def transformed(self, state: Tensor, rows: tuple[Transform, ...]) -> Tensor | None:
        """The state after these rows; None where one of them does not fit it or does nothing to it."""
        for row in rows:
            try:
                changed = row.apply(state, row.value(self.model))
            except (TypeError, ValueError, RuntimeError, IndexError):
                return None
            if same(changed, state):
                return None
            state = changed
        return state

    def end(self, last: Call) -> str:
        """Where following the state ended."""
        reached = self.farthest or last
        if reached is not last and reached.returned is not None and reached.returned.shape == self.logits.shape:
            return (
                f"what '{reached.path}' returns is not what the model returns, and no combination of the transforms "
                "that it declares explains it"
            )
        for call in self.calls:
            if call.began > reached.ended and any(same(other, reached.returned) for other in call.beside):
                return f"after '{reached.path}' the state goes into '{call.path}' beside other states"
        return f"after '{reached.path}' the state is changed by something that is not a module"


def _batch_axis(state: Tensor) -> int | None:
    """The first axis that, with the next one, has the probe's rows and positions."""
    axes = (axis for axis in range(state.ndim) if tuple(state.shape[axis : axis + 2]) == (ROWS, LENGTH))
    return next(axes, None)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """The same dtype, shape and values."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a is b or torch.equal(a, b.to(a.device))
