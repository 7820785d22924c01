"""What an artifact and a model are run on to compare them: shapes and paddings that the context and profiles allow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.runtime.runner import EngineRunner, Runner
from cdsurgery.export.signature import BATCH, PAST, SEQUENCE

# (batch, prompt, first continuation, second continuation)
SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 1, 1, 1),
    (1, 7, 1, 5),
    (2, 3, 1, 1),
    (2, 16, 4, 1),
    (3, 9, 2, 7),
    (4, 5, 1, 3),
    (1, 33, 1, 1),
)
PADDINGS = ("none", "left", "right")


def comparable_shapes(runner: Runner) -> list[tuple[int, ...]]:
    """Those of `SHAPES` that the artifact takes.

    Raises:
        InvalidInputError: the model's context, or an engine's profiles, allow none of them.
    """
    shapes = [shape for shape in SHAPES if takes(runner, shape[0], shape[1:])]
    if shapes:
        return shapes
    if _context(runner) < sum(SHAPES[0][1:]):
        raise InvalidInputError(
            f"The model's context is {_context(runner)} tokens, and the least that is compared is one and two more."
        )
    raise InvalidInputError(
        f"The profiles of the engine in {runner.folder} take no text of one token and two more, which is the least "
        "that is compared. Build it for 1 row, 1 new token and 0 to 2 tokens in the cache, and more."
    )


def takes(runner: Runner, batch: int, chunks: Sequence[int]) -> bool:
    """Whether a prompt and its continuations fit the model's context, its operators and an engine's profiles."""
    if sum(chunks) > _context(runner):
        return False
    if runner.manifest.group_query_attention and batch > 1 and max(chunks[1:], default=1) > 1:
        return False
    if not isinstance(runner, EngineRunner):
        return True
    runs = [{BATCH: batch, SEQUENCE: end - start, PAST: start} for start, end in spans(chunks)]
    profiles = runner.session.manifest.profiles
    return all(any(profile.misfit(run) is None for profile in profiles) for run in runs)


def paddings(runner: Runner) -> tuple[str, ...]:
    """On which sides of a prompt that goes on the artifact takes padding, as `runtime.inputs` checks."""
    if runner.manifest.group_query_attention:
        return ("none", "right")
    return ("none", "left") if runner.manifest.signature.counts_positions else PADDINGS


def spans(chunks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each chunk starts and ends in the text."""
    start = 0
    for chunk in chunks:
        yield start, start + chunk
        start += chunk


def padded_mask(batch: int, chunks: Sequence[int], padding: str) -> Tensor:
    """Ones `[batch, sum(chunks)]`, with row r padded by up to r tokens at one side of its prompt."""
    mask = torch.ones(batch, sum(chunks), dtype=torch.int64)
    for row in range(batch):
        padded = min(row, chunks[0] - 1)
        if padding == "left":
            mask[row, :padded] = 0
        elif padding == "right":
            mask[row, chunks[0] - padded : chunks[0]] = 0
    return mask


def _context(runner: Runner) -> float:
    return getattr(runner.config.get_text_config(), "max_position_embeddings", None) or math.inf
