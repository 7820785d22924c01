"""Where a model keeps what surgery needs: its decoder layers, and the tail from their end to the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdsurgery.transforms import Transform


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model, by the paths that `model.get_submodule` takes.

    `wrap` finds them. For a model in which it cannot, pass them: `wrap(model, anatomy=Anatomy(layers, tail))`; they are
    proven all the same.

    Attributes:
        layers: the L decoder layers in order; `layers[l-1]` is layer l of the paper.
        tail: what stands between the last layer and the logits, in order: paths of modules that take the state alone
            (final norm, projections, unembedding), and the transforms before, between and after them.
        batch_axis: of a layer's state `[B, T, D]`, the axis of B, which that of T follows; further axes may stand
            before it (gemma3n, `[S, B, T, D]`) or after T (deepseek_v4, `[B, T, S, D]`).
    """

    layers: tuple[str, ...]
    tail: tuple[str | Transform, ...]
    batch_axis: int = 0

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the tail's modules, in order."""
        return tuple(step for step in self.tail if isinstance(step, str))

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The tail's transforms, in order."""
        return tuple(step for step in self.tail if not isinstance(step, str))

    @property
    def unembedding(self) -> str:
        """The path of the module whose rows are the vocabulary."""
        return self.modules[-1]

    @property
    def before_unembedding(self) -> tuple[str | Transform, ...]:
        """The steps of the tail up to the unembedding, in order."""
        return self.tail[: self._unembedding_index]

    @property
    def after_unembedding(self) -> tuple[Transform, ...]:
        """What the tail does to the unembedding's output, in order."""
        return tuple(step for step in self.tail[self._unembedding_index :] if not isinstance(step, str))

    @property
    def _unembedding_index(self) -> int:
        return max(index for index, step in enumerate(self.tail) if isinstance(step, str))

    def __str__(self) -> str:
        return " -> ".join(step if isinstance(step, str) else f"({step.name})" for step in self.tail)


def tail_logits(
    model: PreTrainedModel, anatomy: Anatomy, state: Tensor, unembed: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """z = tail(x): everything the model does from its residual stream to its logits.

    Paths are looked up at every call, so that a head replaced later (resized, quantised, adapted) is the one used.

    Args:
        state: the residual stream after a decoder layer, before the final norm, as the layer returns it: `[B, T, D]` in
            most families, which take any leading axes then.
        unembed: in place of the unembedding; None means the model's own.

    Returns:
        `[B, T, V]` in the dtype of the model's logits.
    """
    return unembedded(model, anatomy, unembedding_input(model, anatomy, state), unembed)


def unembedding_input(model: PreTrainedModel, anatomy: Anatomy, state: Tensor) -> Tensor:
    """The tail up to the unembedding: a state as `tail_logits` takes it -> `[B, T, D]`."""
    for step in anatomy.before_unembedding:
        state = model.get_submodule(step)(state) if isinstance(step, str) else step.of(model, state)
    return state


def unembedded(
    model: PreTrainedModel, anatomy: Anatomy, state: Tensor, unembed: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The tail from the unembedding on: what `unembedding_input` returns -> `[B, T, V]`, `unembed` as above."""
    return logits_of_products(model, anatomy, (unembed or model.get_submodule(anatomy.unembedding))(state))


def logits_of_products(model: PreTrainedModel, anatomy: Anatomy, logits: Tensor) -> Tensor:
    """The tail behind the unembedding: what that returns, `[..., V]` -> the same as the model's logits."""
    for step in anatomy.after_unembedding:
        logits = step.of(model, logits)
    return logits


def candidate_logits(
    model: PreTrainedModel,
    anatomy: Anatomy,
    states: Sequence[Tensor],
    unembed: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The logits of several layers' states, in one pass through the tail, so that the unembedding is read once.

    Args:
        states: K tensors, each as `tail_logits` takes it. They go through as one batch of K x B rows.
        unembed: as for `tail_logits`.

    Returns:
        `[K, B, T, V]`.
    """
    return tail_logits(model, anatomy, joined(states, anatomy), unembed).unflatten(0, (len(states), -1))


def joined(states: Sequence[Tensor], anatomy: Anatomy) -> Tensor:
    """K states `[.., B, T, ..]` as one of K x B rows, on the device of the first: a device_map may spread them."""
    return torch.cat([state.to(states[0].device) for state in states], dim=anatomy.batch_axis)


def layer_types(model: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    """What kind each of the L layers is: as the config says, or its class's name where that says nothing of each."""
    declared = getattr(model.config.get_text_config(), "layer_types", None)
    if declared and len(declared) == len(anatomy.layers):
        return list(declared)
    return [type(model.get_submodule(path)).__name__ for path in anatomy.layers]
