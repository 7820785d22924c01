"""`interleaved`: ratios are of the same rounds, and count every run."""

from __future__ import annotations

import time

import pytest

from cdsurgery.timing import interleaved


def test_ratios_are_of_the_same_round_and_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(name: str, seconds: float) -> None:
        ran.append(name)
        slowness = [100.0, 1.0, 5.0, 1.0, 1.0][(len(ran) - 1) // 2]  # of the whole machine, in each round
        clock[0] += seconds * slowness

    first, second = interleaved({"a": lambda: work("a", 2.0), "b": lambda: work("b", 3.0)}, rounds=4)
    assert ran == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert (first.ratio, second.ratio, second.low, second.middle, second.high) == (1.0, 1.5, 1.5, 1.5, 1.5)
    assert (first.milliseconds, second.milliseconds) == (4000.0, 6000.0)


def test_a_ratio_counts_the_rare_steps_that_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    rare = iter([1.0] * 9 + [3.0] * 2)

    def work(seconds: float) -> None:
        clock[0] += seconds

    _, second = interleaved({"a": lambda: work(1.0), "b": lambda: work(next(rare))}, rounds=10)
    assert (second.middle, second.ratio) == (1.0, pytest.approx(1.4))
