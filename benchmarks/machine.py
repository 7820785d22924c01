"""This machine -> what it can do at best: bytes and products a second, and what it is made of."""

from __future__ import annotations

import datetime
import functools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from cdsurgery.timing import finish

GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Limits:
    """What `benchmarks.roofline` computes with.

    Attributes:
        bandwidth: bytes a second that come in from memory.
        flops: floating-point operations a second in a product of matrices, in the dtype that is measured.
    """

    bandwidth: float
    flops: float


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """On a GPU the same as a CUDA graph, without what Python takes to start its kernels; elsewhere the same.

    Args:
        work: goes by no value of a tensor, and finds its inputs where they were; they live as long as what is returned.
    """
    if not GPU:
        return work
    finish()  # its inputs may still be on their way, on a stream that the next one does not wait for
    aside = torch.cuda.Stream()  # what compiles kernels or takes memory for good is not captured
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    finish()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return functools.partial(_replay, graph, work)


def _replay(graph: Any, _work: Callable[[], object]) -> None:
    graph.replay()


def best(work: Callable[[], object], runs: int = 7) -> float:
    """The shortest of several runs, in seconds, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        finish()
        start = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def limits(dtype: torch.dtype) -> Limits:
    """Measure both: 600 MB added up, 6 GB on a GPU, where its start counts; and two square matrices multiplied."""
    device, size, count = ("cuda", 8192, 1_500_000_000) if GPU else ("cpu", 2048, 150_000_000)
    numbers = torch.ones(count, device=device)
    matrix = torch.randn(size, size, device=device).to(dtype)
    return Limits(numbers.nbytes / best(numbers.sum), 2 * size**3 / best(lambda: matrix @ matrix))


def description(found: Limits, dtype: str) -> dict[str, str]:
    """Processor, versions and date, and the two limits."""
    named = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    processor = named.partition(":")[2].strip() or platform.processor()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{processor}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        **({"device": torch.cuda.get_device_name()} if GPU else {}),
        "reads": f"{found.bandwidth / 1e9:.0f} GB/s",
        "multiplies": f"{round(found.flops / 1e9, 1):g} GFLOP/s in {dtype}",
        **{name: version(name) for name in ("torch", "transformers")},
        "onnxruntime": onnxruntime.__version__,  # whose distribution may be onnxruntime-gpu
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
