"""A graph -> the files of its engine in a folder: the engine, TensorRT's log, the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cdsurgery.export.artifact.manifest import describe_files
from cdsurgery.export.signature import Signature
from cdsurgery.export.tensorrt.build import build
from cdsurgery.export.tensorrt.log import Progress
from cdsurgery.export.tensorrt.manifest import ENGINE_FILE, LOG_FILE, SCHEMA_VERSION, EngineManifest
from cdsurgery.export.tensorrt.options import BuildOptions
from cdsurgery.export.tensorrt.profiles import Profile


def write_engine(
    folder: Path,
    trt: Any,
    graph: Path,
    signature: Signature,
    profiles: Sequence[Profile],
    options: BuildOptions,
    onnx: Mapping[str, str],
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Build a graph and write the engine, the log and the engine's manifest into a folder."""
    built = build(trt, graph, signature, profiles, options, timing_cache=timing_cache, progress=progress)
    (folder / LOG_FILE).write_text("\n".join(built.log) + "\n", encoding="utf-8")
    with (folder / ENGINE_FILE).open("wb") as file:
        file.write(built.plan)
    EngineManifest(
        schema_version=SCHEMA_VERSION,
        package=trt.__name__,
        version=trt.__version__,
        gpu=this_gpu(),
        targets=tuple(options.targets),
        portable=options.hardware_compatible,
        flags=tuple(options.flags()),
        profiles=tuple(profiles),
        signature=signature,
        onnx=onnx,
        build_seconds=round(built.seconds, 2),
        peak_memory_bytes=built.peak_memory_bytes,
        engine=describe_files(folder)[ENGINE_FILE],
    ).write(folder)


def this_gpu() -> str | None:
    """The GPU that torch uses, with its compute capability: "NVIDIA H100 80GB HBM3 (9.0)"; None if it sees none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"
