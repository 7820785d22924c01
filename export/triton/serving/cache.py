"""Rows of several caches -> one cache, padded on the left: requests join and leave a batch.

Row r of a batch of width W has its `lengths[r]` tokens in the last columns; the columns before them are zeros under a
mask of zeros. Recurrent and convolution states have no axis of tokens and are stacked as they are; what precedes a row
in columns has never been part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Some rows of a cache.

    Attributes:
        states: one array `[B, ...]` for each input of the cache.
        kept: indices of the rows to take, in [0, B).
        lengths: tokens of each kept row.
    """

    states: Sequence[Array]
    kept: Sequence[int]
    lengths: Sequence[int]


def regroup(groups: Sequence[Rows], growing: Sequence[int | None]) -> list[Array]:
    """Put the kept rows of all groups into one batch, as wide as its longest row: each number is copied once.

    Args:
        groups: in the order of the new rows.
        growing: for each state the axis of tokens, or None.

    Returns:
        One array `[sum of kept, ...]` for each state.
    """
    width = max(length for group in groups for length in group.lengths)
    batch = sum(len(group.kept) for group in groups)
    joined = []
    for index, axis in enumerate(growing):
        first = groups[0].states[index]
        shape = [batch, *first.shape[1:]]
        if axis is not None:
            shape[axis] = width
        whole = np.zeros(shape, first.dtype)
        row = 0
        for group in groups:
            state, rows = group.states[index], slice(row, row + len(group.kept))
            row = rows.stop
            kept: Any = np.asarray(group.kept)
            if axis is None:
                whole[rows] = state[kept]
            else:
                columns = _last(axis, min(width, state.shape[axis]))
                into: Any = (rows, *columns)
                out: Any = (kept, *columns)
                whole[into] = state[out]
        joined.append(whole)
    return joined


def _last(axis: int, count: int) -> tuple[slice, ...]:
    """An index, after that of the rows, of the last `count` columns along an axis; of none if there are none."""
    columns = slice(-count, None) if count else slice(0, 0)
    return (*[slice(None)] * (axis - 1), columns)


def mask_and_positions(lengths: Sequence[int], width: int, new: int) -> tuple[Array, Array]:
    """For `new` tokens in every row: the mask `[B, width + new]` and the positions `[B, new]`, int64."""
    past = np.asarray(lengths, np.int64)[:, None]
    columns = np.arange(width + new, dtype=np.int64)
    return (columns >= width - past).astype(np.int64), past + np.arange(new, dtype=np.int64)
