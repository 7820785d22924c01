"""`engine.json`: what an engine is, what built it from what, and the hash of its bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdsurgery.errors import ArtifactError
from cdsurgery.export.artifact.manifest import ENGINE_NAME, parsed_signature, read_versioned
from cdsurgery.export.signature import Signature
from cdsurgery.export.tensorrt.profiles import Profile, Range

NAME, ENGINE_FILE, LOG_FILE = ENGINE_NAME, "model.engine", "build.log"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EngineManifest:
    """The manifest of an engine.

    Attributes:
        schema_version: of this file; another one than this code knows is refused.
        package, version: of TensorRT: "tensorrt" or "tensorrt_rtx".
        gpu: name and compute capability of the GPU that it was built on; None if it was built without one.
        targets: the architectures that it was built for; empty for what the package does by itself.
        portable: whether an engine of TensorRT runs on other GPUs than the one it was built on.
        flags: builder flags that were on.
        profiles: in the order of the engine.
        signature: every input and output.
        onnx: file -> sha256 of the graph and weights that it was built from.
        build_seconds: parsing and building took.
        peak_memory_bytes: the most that the building process held on the host; None where it could not be asked.
        engine: {"sha256": hex, "size": bytes}.
    """

    schema_version: int
    package: str
    version: str
    gpu: str | None
    targets: tuple[str, ...]
    portable: bool
    flags: tuple[str, ...]
    profiles: tuple[Profile, ...]
    signature: Signature
    onnx: Mapping[str, str]
    build_seconds: float
    peak_memory_bytes: int | None
    engine: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_engine_manifest(folder: str | os.PathLike[str]) -> EngineManifest:
    """Read the manifest of an engine.

    Raises:
        ArtifactError: there is none, it cannot be read, or its schema is another.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no engine: it has no {NAME}. Make one with cdsurgery.export.to_tensorrt.")
    remedy = "Build the engine again."
    return read_versioned(path, SCHEMA_VERSION, _parsed, ("an engine's manifest", remedy), remedy)


def _parsed(fields: dict[str, Any]) -> EngineManifest:
    profiles = tuple(
        Profile(one["name"], {axis: Range(**size) for axis, size in one["axes"].items()}) for one in fields["profiles"]
    )
    parsed = {
        "signature": parsed_signature(fields["signature"]),
        "profiles": profiles,
        "targets": tuple(fields["targets"]),
        "flags": tuple(fields["flags"]),
    }
    return EngineManifest(**(fields | parsed))
