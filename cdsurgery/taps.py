"""Decoder layers -> their last K states, cut to the rows that will be projected, while the model runs as always."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cdsurgery.errors import SurgeryError
from cdsurgery.states import kept_rows, state_of


class Taps:
    """Forward hooks that note what the given layers return, only while a `reading` is open.

    The hooks stay on the layers for good: adding and removing them at every step would cost time and break compiled
    and captured graphs. Outside of a reading they do nothing. They go behind hooks that came after them, so that what
    somebody's hook makes of a layer's output is the state that is noted, as it is the one that flows on.

    Args:
        layers: in the order in which their states are wanted.
        batch_axis: as in the model's `Anatomy`.
    """

    def __init__(self, layers: list[nn.Module], batch_axis: int = 0) -> None:
        self.states: list[Tensor | None] = [None] * len(layers)
        self.keep: int | Tensor | None = None
        self.batch_axis = batch_axis
        self._handles = [layer.register_forward_hook(_Tap(self, index)) for index, layer in enumerate(layers)]

    @contextmanager
    def reading(self, keep: int | Tensor = 0) -> Iterator[list[Tensor]]:
        """Collect states `[B, T, D]` into the list it yields, which is complete once the model has run.

        Args:
            keep: the model's own `logits_to_keep`; rows are cut when they are captured, so that nothing holds on to
                the states of a long prompt.
        """
        if self.keep is not None:
            raise SurgeryError(
                "This wrapped model is already running, in another thread or inside itself. Run one forward at a time, "
                "or give each thread its own wrapped copy of the model."
            )
        self.keep = keep
        go_last(self._handles)
        try:
            yield self.states  # type: ignore[misc]
        finally:
            self.states = [None] * len(self.states)
            self.keep = None

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()


def go_last(handles: Iterable[RemovableHandle]) -> None:
    """Put hooks behind those that came after them; while something is compiled, the order stays as it was."""
    if torch.compiler.is_compiling():
        return
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:  # the module may be another one by now
            hooks.move_to_end(handle.id)


class _Tap:
    """One layer's hook: a class and not a closure, so that a deep copy of the model taps the copy."""

    def __init__(self, taps: Taps, index: int) -> None:
        self.taps, self.index = taps, index

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        keep = self.taps.keep
        if keep is None:
            return
        state = state_of(output)
        assert state is not None
        if isinstance(keep, Tensor) or keep > 0:
            rows = kept_rows(state, keep, self.taps.batch_axis)
            # A slice is a view that keeps the whole prompt's state alive; a copy of the kept rows does not.
            state = rows.clone() if isinstance(keep, int) and rows.numel() < state.numel() else rows
        self.taps.states[self.index] = state
