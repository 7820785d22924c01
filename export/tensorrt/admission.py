"""An engine's folder -> whether it may be opened here: its bytes, its TensorRT, its GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.tensorrt.manifest import ENGINE_FILE, EngineManifest


def read_plan(folder: Path, manifest: EngineManifest) -> bytes:
    """The engine's bytes, after comparing them with the manifest.

    Raises:
        ArtifactError: they are missing, cut short or changed.
    """
    path, expected = folder / ENGINE_FILE, manifest.engine
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{path} is missing or not a plain file. Build the engine again.")
    plan = path.read_bytes()
    if len(plan) != expected["size"] or hashlib.sha256(plan).hexdigest() != expected["sha256"]:
        raise ArtifactError(
            f"{path} was changed after it was built: it has {len(plan)} bytes and should have {expected['size']}, or "
            f"its sha256 is not {expected['sha256']}. An engine can hold any code, so it was not opened. "
            "Build it again."
        )
    return plan


def check_version(manifest: EngineManifest, version: str, lean_runtime: Path | None = None) -> None:
    """Refuse an engine of another TensorRT.

    Args:
        manifest: of the engine.
        version: of the TensorRT that is installed.
        lean_runtime: the library of the version that built the engine.

    Raises:
        ArtifactError: the versions differ, and the engine was not built for later ones too.
        InvalidInputError: the library is missing, or is not needed.
    """
    lasts = "VERSION_COMPATIBLE" in manifest.flags
    if lean_runtime is not None and (not lasts or not lean_runtime.is_file()):
        found = "is no file" if lasts else "is of no use: the engine was not built with version_compatible"
        raise InvalidInputError(f"lean_runtime is {lean_runtime}, which {found}.")
    if version == manifest.version:
        return
    if not (lasts and _numbers(version) > _numbers(manifest.version)):
        raise ArtifactError(
            f"The engine was built by {manifest.package} {manifest.version}, and {version} is installed. Build it "
            f"again, or install {manifest.package} {manifest.version}."
        )
    if lean_runtime is None:
        raise InvalidInputError(
            f"The engine was built by {manifest.package} {manifest.version} for later ones too, and {version} runs it "
            f"in that version's lean runtime. Pass its library, libnvinfer_lean.so.{_library(manifest.version)}, as "
            "lean_runtime=; it is loaded as code."
        )


def checked_gpu(manifest: EngineManifest) -> torch.device:
    """torch's current CUDA device; refuse a machine without a GPU, or with another one than the engine is for.

    Raises:
        InvalidInputError: torch sees no GPU.
        ArtifactError: its GPU is another.
    """
    if not torch.cuda.is_available():
        raise InvalidInputError(
            f"An engine runs on an NVIDIA GPU, and this PyTorch ({torch.__version__}) sees none. Install a PyTorch "
            "with CUDA and a driver, or run the ONNX artifact, which needs no GPU."
        )
    major, minor = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()} ({major}.{minor})"
    if manifest.targets and f"SM{major}{minor}" not in manifest.targets:
        raise ArtifactError(
            f"The engine was built for {', '.join(manifest.targets)}, and this GPU is a {found}. Build it for "
            f"targets=['SM{major}{minor}']."
        )
    if (
        not manifest.targets
        and manifest.package == "tensorrt"
        and manifest.gpu not in (None, found)  # None where it was built beside a PyTorch without CUDA
        and not manifest.portable
    ):
        raise ArtifactError(
            f"The engine was tuned for a {manifest.gpu}, and this GPU is a {found}. Build it here, or with "
            "hardware_compatible=True for every GPU from Ampere on."
        )
    return torch.device("cuda", torch.cuda.current_device())


def _library(version: str) -> str:
    """The numbers behind a library's name: three of the four that the Python package has."""
    return ".".join(version.split(".")[:3])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
