"""This machine -> what it can do at best: bytes and products a second, and what it is made of."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch


def best(work: Callable[[], object], runs: int = 7) -> float:
    """The shortest of several runs, in seconds, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth() -> float:
    """Gigabytes a second that come in when 600 MB are added up."""
    numbers = torch.ones(150_000_000)
    return numbers.nbytes / best(numbers.sum) / 1e9


def matmul_rate() -> float:
    """Billions of float32 operations a second in a product of two `[2048, 2048]`."""
    matrix = torch.randn(2048, 2048)
    return 2 * 2048**3 / best(lambda: matrix @ matrix) / 1e9


def description() -> dict[str, str]:
    """Processor, memory, versions and date, and the two limits."""
    processor = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{processor}, {torch.get_num_threads()} threads",
        "reads": f"{read_bandwidth():.0f} GB/s",
        "multiplies": f"{matmul_rate():.0f} GFLOP/s in float32",
        **{name: version(name) for name in ("torch", "transformers", "onnxruntime")},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
