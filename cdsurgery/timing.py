"""Several ways to do one thing -> how much longer each takes than the first, from interleaved runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """What was measured of one way.

    Attributes:
        name: of the way.
        milliseconds: the mean of all runs, of this machine in this hour.
        ratio: of all its runs together to all runs of the first way together. Not a median: a step in which a row
            moves takes longer, and is rare.
        low, middle, high: quartiles of its time over that of the first way in the same round.
    """

    name: str
    milliseconds: float
    ratio: float
    low: float
    middle: float
    high: float


def interleaved(
    ways: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[str], object] | None = None
) -> list[Timing]:
    """Time every way once a round, in an order that rotates, so that what slows the machine slows all of them.

    Args:
        ways: name -> what to run; the first is what the others are compared with.
        rounds: at least 2; one more is run before and not counted.
        before: is told a way's name before each of its runs, and is not timed.
    """
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if before is not None:
                before(name)
            finish()
            start = time.perf_counter()
            ways[name]()
            finish()
            seconds[name].append(time.perf_counter() - start)
    counted = {name: times[1:] for name, times in seconds.items()}
    timings = []
    for name in names:
        ratios = [own / first for own, first in zip(counted[name], counted[names[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        mean, base = statistics.fmean(counted[name]), statistics.fmean(counted[names[0]])
        timings.append(Timing(name, 1e3 * mean, mean / base, low, middle, high))
    return timings


def finish() -> None:
    """Wait until the GPU has done what it was given; without one there is nothing to wait for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
