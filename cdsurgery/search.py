"""One recorded forward -> the anatomy it shows: followed by value, from the layers' states to the logits.

1. Layers: the members of a container that run at most once each, in order, each on what the one before it returned.
2. Tail: from the last layer's output, the modules that are each given the state, until the state is the logits.
3. Gaps: where no module is given the state, some of the transforms that the model declares must close the gap, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy
from cdsurgery.errors import UnsupportedModelError
from cdsurgery.probe import LENGTH, ROWS, Call
from cdsurgery.states import same
from cdsurgery.transforms import Transform, declared_transforms, sequences, transformed

# Logits of a module made to return other ones: (path, `[B, T, V]`) -> the model's logits.
Replaced = Callable[[str, Tensor], Tensor]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_anatomy(model: PreTrainedModel, calls: list[Call], logits: Tensor, replaced: Replaced) -> Anatomy:
    """The longest chain of layers whose end leads to the logits, and how it leads there.

    Args:
        calls: every module call of one forward, in order of beginning.
        logits: `[B, T, V]`, what that forward returned.
        replaced: runs the model again with one module's output replaced.

    Raises:
        UnsupportedModelError: with the containers looked at, and why each is not the model's decoder.
    """
    declared = declared_transforms(model)
    members: dict[str, list[Call]] = {
        path: [] for path, part in model.named_modules() if isinstance(part, CONTAINERS) and len(part)
    }
    for call in calls:
        members.get(call.path.rpartition(".")[0], []).append(call)
    found: list[str] = []
    for path, layers in sorted(members.items(), key=lambda item: -len(item[1])):
        places = [f"{path}.{name}" for name in model.get_submodule(path)._modules]
        flaw = chain_flaw(model, layers, places, declared)
        if flaw is None:
            trail = _Trail(model, calls, logits, replaced, declared, farthest=layers[-1])
            tail = trail.to_logits(layers[-1])
            axis = _batch_axis(layers[-1])
            if tail is not None and axis is not None:
                return Anatomy(tuple(call.path for call in layers), tail, axis)
            flaw = trail.end() if tail is None else "its states have no axes of batch and position"
        found.append(f"'{path}' ({flaw})")
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of decoder layers whose last output leads to its logits. Found: "
        f"{'; '.join(found[:4]) or 'no module list'}. Declared transforms: "
        f"{', '.join(sorted({row.option for row in declared}))}. A model with one residual stream through layers that "
        "run once and in order can be wrapped; where its parts only stand elsewhere, pass them: "
        "wrap(model, anatomy=cdsurgery.Anatomy(layers, tail))."
    )


def chain_flaw(
    model: PreTrainedModel, layers: list[Call], places: Iterable[str], declared: list[Transform]
) -> str | None:
    """Why these calls are not one residual stream, or None where they are.

    Args:
        layers: as they ran.
        places: the paths in the order in which each may run once.
        declared: transforms of which one may stand between two layers.
    """
    if not layers:
        return "its members never ran"
    order = [call.path for call in layers]
    if order != [path for path in places if path in order]:
        return f"its members ran in the order [{', '.join(_shortened(order))}], not each once and in order"
    for before, after in pairwise(layers):
        if not any(
            same(transformed(model, rows, before.returned), after.given) for rows in sequences(declared, most=1)
        ):
            return f"'{after.path}' does not start from what '{before.path}' returned"
    return None


def _shortened(order: list[str]) -> list[str]:
    """The names of members alone, where all are of one container."""
    containers = {path.rpartition(".")[0] for path in order}
    return [path.rpartition(".")[2] for path in order] if len(containers) == 1 else order


@dataclass
class _Trail:
    """Where the state can be followed to.

    Attributes:
        declared: the transforms that may close a gap.
        farthest: of all attempts, the call that came last.
    """

    model: PreTrainedModel
    calls: list[Call]
    logits: Tensor
    replaced: Replaced
    declared: list[Transform]
    farthest: Call

    def to_logits(self, reached: Call, head: Call | None = None) -> tuple[str | Transform, ...] | None:
        """The steps from what a call returned to the logits; None where it cannot be followed there.

        Args:
            head: the same call, where it is one of the tail's and may end it.
        """
        self.farthest = max(self.farthest, reached, key=lambda call: call.ended)
        for rows in sequences(self.declared):
            state = self.after(rows, reached.returned)
            for call in self.calls if state is not None else ():
                if reached.ended < call.began and call.returned is not None and same(call.given, state):
                    rest = self.to_logits(call, head=call)
                    if rest is not None:
                        return (*rows, call.path, *rest)
        return None if head is None else self.ending(head)

    def ending(self, head: Call) -> tuple[Transform, ...] | None:
        """The shortest sequence of transforms that makes the logits of what the unembedding returned."""
        assert head.returned is not None
        fit = [rows for rows in sequences(self.declared) if same(self.after(rows, head.returned), self.logits)]
        if all(row.option == "dtype" for rows in fit for row in rows):
            return fit[0] if fit else None
        # Far below the cap, a softcap can be lost in rounding: what fits has to hold for logits up to 100 too.
        large = head.returned * (100 / head.returned.abs().max())
        fit = self.explaining(fit, head, large)
        # Of float32 ones, an autocast's bfloat16 products show which widen those first.
        return next(iter(self.explaining(fit, head, large.bfloat16()) or fit), None)

    def explaining(self, fit: list[tuple[Transform, ...]], head: Call, products: Tensor) -> list[tuple[Transform, ...]]:
        """Those of the sequences that give the model's logits where the unembedding returns `products`, `[B, T, V]`."""
        try:
            truth = self.replaced(head.path, products)
        except UnsupportedModelError:  # the model cannot go on from these
            return []
        return [rows for rows in fit if same(self.after(rows, products), truth)]

    def after(self, rows: tuple[Transform, ...], state: Tensor | None) -> Tensor | None:
        """The state after these transforms, or None where they do not fit it."""
        return transformed(self.model, rows, state)

    def end(self) -> str:
        """Where following the state ended."""
        path, state = self.farthest.path, self.farthest.returned
        if state is not None and state.shape == self.logits.shape:
            return (
                f"what '{path}' returns is not what the model returns, and no combination of the transforms that it "
                "declares explains it"
            )
        for call in self.calls:
            if call.began > self.farthest.ended and any(same(other, state) for other in call.beside):
                return f"after '{path}' the state goes into '{call.path}' beside other states"
        return f"after '{path}' the state is changed by something that is not a module"


def _batch_axis(layer: Call) -> int | None:
    """Of the state it returned, the first axis that, with the next one, has the probe's rows and positions."""
    shape = layer.returned.shape if layer.returned is not None else ()
    return next((axis for axis in range(len(shape)) if tuple(shape[axis : axis + 2]) == (ROWS, LENGTH)), None)
