"""The tensors of a run and a signature -> the length of every named axis, or an error that says what is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.signature import PAST, SEQUENCE, TOTAL, Signature, torch_dtype


def axis_lengths(signature: Signature, feed: Mapping[str, Tensor]) -> dict[str, int]:
    """The length of every named axis of a run.

    Raises:
        InvalidInputError: an input is missing or unknown, or its dtype, rank or size does not fit.
    """
    specs = signature.inputs
    names = [spec.name for spec in specs]
    if wrong := [*(name for name in names if name not in feed), *(name for name in feed if name not in names)]:
        raise InvalidInputError(f"Missing or unknown inputs: {', '.join(wrong)}. The graph takes {', '.join(names)}.")
    lengths: dict[str, int] = {}
    for spec in specs:
        for axis, size in zip(spec.axes, feed[spec.name].shape, strict=False):  # a wrong rank is said below
            if isinstance(axis, str):
                lengths.setdefault(axis, size)
    if PAST in lengths:  # else no state grows, and the mask alone knows how long the text is
        lengths[TOTAL] = lengths[PAST] + lengths[SEQUENCE]
    for spec in specs:
        tensor, shape = feed[spec.name], shape_of(spec.axes, lengths)
        if list(tensor.shape) != shape or tensor.dtype != torch_dtype(spec):
            raise InvalidInputError(
                f"{spec.name} has shape {list(tensor.shape)} and dtype {tensor.dtype}; with the other inputs as "
                f"they are it must be {shape}, [{', '.join(map(str, spec.axes))}], and torch.{spec.dtype}."
            )
    return lengths


def shape_of(axes: Sequence[str | int], lengths: Mapping[str, int]) -> list[int]:
    """Axes as numbers."""
    return [axis if isinstance(axis, int) else lengths[axis] for axis in axes]
