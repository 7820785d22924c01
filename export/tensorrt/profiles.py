"""The signature of a graph and the sizes wanted -> optimisation profiles: what an engine is built for, and takes.

An engine has two: *prefill* takes several new tokens on a cache of any length, an empty one included; *decode* takes
one. Both read the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.signature import BATCH, PAST, SEQUENCE, TOTAL, Signature, TensorSpec, torch_dtype

# A size that is given: the largest, or the smallest, the one to tune for, and the largest.
Size = int | tuple[int, int, int]

CACHE_MEMORY = 8 << 30  # bytes, if nobody says otherwise
CONTEXT = 4096  # tokens, for a model that names no context
PREFILL = 1024  # tokens a run: longer prompts go in chunks, and what attention needs grows with the square
TUNED_PREFILL = 128  # tokens
BATCHES = (8, 4, 2, 1)


@dataclass(frozen=True)
class Range:
    """The sizes of one axis: the smallest, the one that the engine is tuned for, the largest."""

    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class Profile:
    """One optimisation profile.

    Attributes:
        name: "prefill", "decode" or "head".
        axes: name of a dynamic axis -> its sizes. The axis `total` is `past` and `sequence` together.
    """

    name: str
    axes: Mapping[str, Range]

    def shapes(self, spec: TensorSpec) -> tuple[list[int], list[int], list[int]]:
        """The smallest, the tuned and the largest shape of an input."""
        of = {name: (size.minimum, size.optimum, size.maximum) for name, size in self.axes.items()}
        if PAST in of:
            of[TOTAL] = tuple(map(sum, zip(of[PAST], of[SEQUENCE], strict=True)))  # type: ignore[assignment]
        smallest, tuned, largest = (
            [axis if isinstance(axis, int) else of[axis][place] for axis in spec.axes] for place in range(3)
        )
        return smallest, tuned, largest

    def largest(self) -> dict[str, int]:
        """The largest size of every dynamic axis."""
        sizes = {axis: size.maximum for axis, size in self.axes.items()}
        return sizes | {TOTAL: sizes[PAST] + sizes[SEQUENCE]} if PAST in sizes else sizes

    def misfit(self, lengths: Mapping[str, int]) -> str | None:
        """Which axis of a run is outside of this profile, as words; None if the run fits."""
        for axis, size in self.axes.items():
            found = lengths.get(axis, size.minimum)
            if not size.minimum <= found <= size.maximum:
                return f"{axis} is {found} and may be {size}"
        return None


def decoder_profiles(
    signature: Signature,
    context: int | None,
    *,
    batch: Size | None = None,
    sequence: Size | None = None,
    past: Size | None = None,
    cache_memory: int = CACHE_MEMORY,
) -> tuple[Profile, Profile]:
    """The profiles of a decoder: prefill and decode.

    What is not given follows from the model's context and the memory for its cache: the largest batch of 8, 4, 2 or 1
    whose cache of the whole context fits twice, as a run reads one and writes the next; where not even one row fits, a
    shorter context.

    Args:
        signature: of the graph.
        context: tokens that the model was made for; None if it does not say.
        batch: rows; sequence: new tokens of a prefill; past: tokens in the cache. Each the largest, or (smallest,
            tuned, largest).
        cache_memory: bytes.

    Raises:
        InvalidInputError: a size is no such number, a minimum lies above its maximum, or nothing fits into the memory.
    """
    if not _is_count(cache_memory):
        raise InvalidInputError(f"cache_memory is {cache_memory!r}; it must be a number of bytes above 0.")
    whole = context or CONTEXT
    rows = None if batch is None else _range("batch", batch, 1, None).maximum
    tokens = whole if past is None else _range("past", past, 0, None).maximum + 1
    if batch is None or past is None:
        batch_fitting, tokens = _fit(signature, rows, tokens, cache_memory)
        batch = batch_fitting if batch is None else batch
        if past is None:
            past, whole = tokens - 1, tokens
    sequence = min(whole, PREFILL) if sequence is None else sequence
    cached = _range("past", past, 0, None).maximum
    longest = _range("sequence", sequence, 1, None).maximum
    return (
        Profile(
            "prefill",
            {
                BATCH: _range("batch", batch, 1, 1),
                SEQUENCE: _range("sequence", sequence, 1, min(TUNED_PREFILL, longest)),
                PAST: _range("past", past, 0, 0),
            },
        ),
        Profile(
            "decode",
            {
                BATCH: _range("batch", batch, 1, None),
                SEQUENCE: Range(1, 1, 1),
                PAST: _range("past", past, 0, cached // 2),
            },
        ),
    )


def head_profile(batch: Size, sequence: Size) -> Profile:
    """The profile of a head alone.

    Raises:
        InvalidInputError: a size is no such number, or a minimum lies above its maximum.
    """
    axes = {BATCH: _range("batch", batch, 1, None), SEQUENCE: _range("sequence", sequence, 1, None)}
    return Profile("head", axes)


def fitting_profile(profiles: Sequence[Profile], lengths: Mapping[str, int]) -> int:
    """The index of the profile that takes a run, the last that does: decode goes before prefill.

    Raises:
        InvalidInputError: none, with the axis that is out of range for each.
    """
    misfits = [profile.misfit(lengths) for profile in profiles]
    fitting = [index for index, misfit in enumerate(misfits) if misfit is None]
    if not fitting:
        whys = "; ".join(f"{one.name}: {why}" for one, why in zip(profiles, misfits, strict=True))
        raise InvalidInputError(
            f"No profile of the engine takes this run ({whys}). Build it with larger sizes; a long prompt can also go "
            "in chunks, with generate(..., prefill_chunk_size=...)."
        )
    return fitting[-1]


def cache_bytes(signature: Signature) -> tuple[int, int]:
    """What a cache takes: bytes a token and row, and bytes a row whatever its tokens (states of linear attention)."""
    grown, fixed = 0, 0
    for spec in signature.past:
        size = math.prod(axis for axis in spec.axes if isinstance(axis, int)) * torch_dtype(spec).itemsize
        if PAST in spec.axes:
            grown += size
        else:
            fixed += size
    return grown, fixed


def _fit(signature: Signature, rows: int | None, context: int, memory: int) -> tuple[int, int]:
    """Rows, and tokens of each, whose cache fits into the memory twice."""
    token, fixed = cache_bytes(signature)
    for count in BATCHES if rows is None else [rows]:
        tokens = (memory // (2 * count) - fixed) // token if token else context
        if tokens >= context or (tokens >= 1 and count in (1, rows)):
            return count, min(tokens, context)
    raise InvalidInputError(
        f"The cache of {rows or 1} rows takes {fixed} bytes a row and {token} a token and row, twice, as a run reads "
        f"one and writes the next; not one token fits into cache_memory={memory}. Give more, or a smaller batch."
    )


def _range(name: str, size: Size, smallest: int, tuned: int | None) -> Range:
    """The size as a range, checked; a single number is the largest, and tuned for unless `tuned` says otherwise."""
    if isinstance(size, Sequence) and len(size) == 3 and all(map(_is_count_or_zero, size)):
        low, best, high = size
    elif _is_count_or_zero(size):
        low, best, high = smallest, size if tuned is None else tuned, size  # type: ignore[assignment]
    else:
        raise InvalidInputError(
            f"{name} is {size!r}; it must be a whole number, the largest, or three: the smallest, the one to tune for "
            "and the largest."
        )
    if not smallest <= low <= best <= high:
        raise InvalidInputError(
            f"{name} is {size!r}: smallest {low}, tuned for {best}, largest {high}. They must not decrease, and the "
            f"smallest must be at least {smallest}."
        )
    return Range(low, best, high)


def _is_count_or_zero(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_count(value: object) -> bool:
    return _is_count_or_zero(value) and value != 0
