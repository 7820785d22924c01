"""An ONNX file -> a serialised engine, or what TensorRT said about it.

1. Parse: the ONNX file into a network that is strongly typed, its precision being that of the file.
2. Configure: flags, targets, profiles, the timing cache.
3. Build, with progress, into bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.signature import Signature
from cdsurgery.export.tensorrt.log import Progress, make_log, make_monitor
from cdsurgery.export.tensorrt.options import BuildOptions
from cdsurgery.export.tensorrt.package import builds_ahead_of_time
from cdsurgery.export.tensorrt.profiles import Profile


@dataclass(frozen=True)
class Built:
    """An engine in memory.

    Attributes:
        plan: the serialised engine, readable as a buffer.
        log: TensorRT's messages, a line each.
        seconds: parsing and building took.
        peak_memory_bytes: the most that this process has held on the host until then; None where no Unix tells it.
    """

    plan: Any
    log: list[str]
    seconds: float
    peak_memory_bytes: int | None


def build(
    trt: Any,
    graph: Path,
    signature: Signature,
    profiles: Sequence[Profile],
    options: BuildOptions,
    *,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build an engine.

    Args:
        trt: the module.
        graph: the ONNX file, its weights beside it.
        signature: of the graph.
        profiles: of the engine, in this order.
        options: flags and targets.
        timing_cache: a file that remembers what was measured of kernels, read if it exists and written afterwards.
        progress: told how far it is.

    Raises:
        ArtifactError: TensorRT cannot read or build the graph.
        InvalidInputError: the package has not what the options ask for, or cannot read the timing cache.
    """
    start = time.perf_counter()
    log = make_log(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what its binding makes of a null pointer, a machine without a driver for one
        raise ArtifactError(_failure(trt, "cannot start a builder for", graph, log.errors)) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, graph, log)
    config = builder.create_builder_config()
    options.configure(trt, config)
    cache = _timing_cache(trt, config, timing_cache)
    for profile in profiles:
        described = builder.create_optimization_profile()
        for spec in signature.inputs:
            described.set_shape(spec.name, *profile.shapes(spec))
        if config.add_optimization_profile(described) < 0:
            raise ArtifactError(
                _failure(trt, f"refuses the profile {profile.name} {dict(profile.axes)} of", graph, log.errors)
            )
    monitor = None
    if progress is not None:
        config.progress_monitor = monitor = make_monitor(trt, progress)
    plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.stopped_by is not None:
        raise monitor.stopped_by
    if plan is None:
        raise ArtifactError(_failure(trt, "cannot build an engine of", graph, log.errors))
    if timing_cache is not None and cache is not None:
        timing_cache.write_bytes(cache.serialize())
    return Built(plan, log.lines, time.perf_counter() - start, _peak_memory())


def _parse(trt: Any, network: Any, graph: Path, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in found]
        raise ArtifactError(_failure(trt, "cannot read", graph, nodes or log.errors))


def _timing_cache(trt: Any, config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    if builds_ahead_of_time(trt):
        raise InvalidInputError(
            f"{trt.__name__} measures nothing while it builds, so it has no timing cache. Leave it out; what it "
            "compiles where the engine runs is kept by export.load(folder, cache=...)."
        )
    path.parent.mkdir(parents=True, exist_ok=True)  # now, as it is written after what takes minutes
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise InvalidInputError(
            f"{path} is not a timing cache of this version of TensorRT and this GPU. Give a file that does not exist, "
            "and it will be made."
        )
    return cache


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows, where TensorRT-RTX is at home
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def _failure(trt: Any, what: str, graph: Path, messages: Sequence[str]) -> str:
    said = "\n".join(f"  {message.strip()}" for message in messages) or "  nothing"
    return f"{trt.__name__} {trt.__version__} {what} {graph}. It said:\n{said}"
