"""The model's final norm -> the same, through which states of earlier layers go together with the model's own.

A norm is half a dozen small operations, each of which takes two microseconds or three of a decode step on a GPU however
few rows it has. So in a step the candidates' rows join those that the model norms anyway.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from cdsurgery.taps import go_last


class Company(Protocol):
    """Whose states go through a norm together with its own."""

    def join(self, own: Tensor) -> Tensor | None:
        """What the model gives its norm, `[B, T, D]` -> the same with more rows behind it; None where none join."""

    def part(self, normed: Tensor) -> Tensor | None:
        """What came of those -> the model's own rows of it, `[B, T, D]`; None where none have joined."""


class JointNorm:
    """Hooks of a norm that stay on it for good, as `Taps` do on layers; without company they do nothing.

    Attributes:
        company: whom the norm is to ask, or None.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.company: Company | None = None
        self._entering = norm.register_forward_pre_hook(self._enter)
        self._leaving = norm.register_forward_hook(self._leave)

    def remove(self) -> None:
        """Take the hooks off the norm."""
        self._entering.remove()
        self._leaving.remove()

    def keep(self, company: Company) -> None:
        """Have the norm ask them, behind hooks that came later: what those make of its output is parted too."""
        self.company = company
        go_last([self._leaving])

    def _enter(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = self.company.join(args[0]) if self.company is not None and args else None
        return None if rows is None else (rows, *args[1:])

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Tensor | None:
        return None if self.company is None else self.company.part(output)
