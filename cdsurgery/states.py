"""What a module takes or returns -> the state in it; that state's kept rows; the output with another state in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor


def state_of(value: Any) -> Tensor | None:
    """The first tensor of a layer's output, which families hand around alone, or first in a tuple, a list or a dict."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return state_of(value[0]) if isinstance(value, (tuple, list)) and value else None


def with_state(value: Any, state: Tensor) -> Any:
    """The same output with `state` where `state_of` finds one."""
    if isinstance(value, Tensor):
        return state
    if isinstance(value, Mapping):
        name = next(iter(value))
        return cast(Any, type(value))(**(dict(value) | {name: with_state(value[name], state)}))
    changed = [with_state(value[0], state), *value[1:]]
    return changed if isinstance(value, list) else tuple(changed)


def state_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The state among a module's arguments: `hidden_states` where it is named so, else the first tensor."""
    if not args and isinstance(kwargs.get("hidden_states"), Tensor):
        return cast(Tensor, kwargs["hidden_states"])
    states = (state_of(value) for value in (*args, *kwargs.values()))
    return next((state for state in states if state is not None), None)


def kept_rows(state: Tensor, keep: int | Tensor, batch_axis: int = 0) -> Tensor:
    """The positions that `logits_to_keep` asks for, by the rules of transformers' `slice_logits_to_keep`.

    Args:
        state: `[.., B, T, ..]`; axes may stand before B and after T.
        keep: 0 for all, n for the last n, indices `[T']` or `[B, T']`, a boolean mask `[T]`, or one `[B, T]`, for which
            the result has B = 1 and T' rows, one for each that is true.
        batch_axis: that of B.

    Returns:
        `[.., B, T', ..]`, a view where `keep` is a number.
    """
    rows = state.movedim((batch_axis, batch_axis + 1), (0, 1))
    if not isinstance(keep, Tensor):
        rows = rows[:, slice(-keep, None)]
    elif keep.dtype == torch.bool and keep.ndim == 2:
        rows = rows[keep][None]
    elif keep.ndim == 2:
        rows = rows[torch.arange(len(keep), device=keep.device)[:, None], keep]
    else:
        rows = rows[:, keep]
    return rows.movedim((0, 1), (batch_axis, batch_axis + 1))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """The same dtype, shape and values."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a is b or torch.equal(a, b.to(a.device))
