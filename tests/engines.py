"""Engines of tiny artifacts, built once a test run, where TensorRT-RTX is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import artifact, shared

from cdsurgery import export
from cdsurgery.export.tensorrt.options import target_names
from cdsurgery.export.tensorrt.package import import_tensorrt

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install 'cdsurgery[tensorrt-rtx]'"
)
RTX = "tensorrt_rtx"
# One architecture is built faster than all of them; where there is a GPU, TensorRT-RTX builds for what it knows.
TARGETS = () if torch.cuda.is_available() else ("SM89",)


def runs_here() -> bool:
    """Whether there is a GPU, and one that TensorRT-RTX knows: it has no SM90, as an H100 is."""
    if not torch.cuda.is_available() or find_spec(RTX) is None:
        return False
    major, minor = torch.cuda.get_device_capability()
    return f"SM{major}{minor}" in target_names(import_tensorrt(RTX))


needs_gpu = pytest.mark.skipif(not runs_here(), reason="needs a GPU that TensorRT-RTX knows, and a PyTorch with CUDA")
needs_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt") is None or not torch.cuda.is_available(),
    reason="needs a GPU and TensorRT: pip install 'cdsurgery[tensorrt]'",
)


def engine(family: str, **options: Any) -> Path:
    """The folder of an engine for SM89, or for the GPU that is here; `options` are those of `to_tensorrt`."""
    name = "-".join([family, *(f"{k}-{v}" for k, v in options.items()), "engine"])
    wanted: dict[str, Any] = {"package": RTX, "batch": 4, "sequence": 32, "past": 95, "targets": TARGETS}
    source = artifact(family)
    return shared(name, lambda folder: export.to_tensorrt(source, folder, **(wanted | options)))
