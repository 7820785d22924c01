"""An ONNX artifact -> a TensorRT engine with the layer selection inside.

    export.to_tensorrt("artifact/", "engine/")

1. Check: the artifact's files against its manifest, and that its graph has standard operators only.
2. Package: `tensorrt` or `tensorrt_rtx`, whichever is there or is asked for (`package`).
3. Profiles: what batches and lengths the engine takes, from the signature (`profiles`).
4. Build: with the flags asked for (`options`), TensorRT's messages kept and its progress passed on (`build`, `log`).
5. Save: engine, log, configs, tokenizer, two manifests (`manifest`), in a folder that is moved into place at the end.

`session` runs an engine on a GPU. `head` makes one of the confident head alone, for who builds the body otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.artifact.clients import GRAPH_FILE
from cdsurgery.export.artifact.external_data import check_external_data
from cdsurgery.export.artifact.manifest import Manifest, check_files, describe_files, read_manifest
from cdsurgery.export.artifact.staging import copy_file, staged_folder
from cdsurgery.export.tensorrt.head import head_to_tensorrt as head_to_tensorrt
from cdsurgery.export.tensorrt.log import Progress
from cdsurgery.export.tensorrt.manifest import ENGINE_FILE
from cdsurgery.export.tensorrt.options import BuildOptions
from cdsurgery.export.tensorrt.package import import_tensorrt
from cdsurgery.export.tensorrt.profiles import CACHE_MEMORY, Size, decoder_profiles
from cdsurgery.export.tensorrt.session import EngineSession as EngineSession
from cdsurgery.export.tensorrt.writing import write_engine

__all__ = ["EngineSession", "head_to_tensorrt", "to_tensorrt"]

# What only ONNX clients of an artifact read.
_ONNX_ONLY = (GRAPH_FILE, f"{GRAPH_FILE}.data", "genai_config.json")


def to_tensorrt(
    artifact: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    package: str | None = None,
    batch: Size | None = None,
    sequence: Size | None = None,
    past: Size | None = None,
    cache_memory: int = CACHE_MEMORY,
    targets: Sequence[str] = (),
    hardware_compatible: bool = False,
    version_compatible: bool = False,
    weight_streaming: bool = False,
    refittable: bool = False,
    timing_cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build an engine of an artifact. Its precision is that of the artifact: float32, float16 or bfloat16.

    Args:
        artifact: what `to_onnx` wrote for target="portable", not quantised.
        folder: the folder to make; it must not exist.
        package: "tensorrt" or "tensorrt_rtx"; None for the first of them that is installed.
        batch: rows; sequence: new tokens of a run; past: tokens in the cache. Each the largest, or (smallest, the one
            to tune for, largest). What is None follows from the model's context and `cache_memory`.
        cache_memory: bytes on the GPU for the cache, which a run reads and writes anew.
        targets, hardware_compatible, version_compatible, weight_streaming, refittable: as in `BuildOptions`.
        timing_cache: a file that remembers how fast kernels were, made if it is not there: later builds are quicker.
            For TensorRT only, as TensorRT-RTX measures none.
        progress: called with the name of a phase and the share of it that is done. What it raises stops the build.

    Returns:
        The folder, for `export.load`. TensorRT's messages are in its build.log.

    Raises:
        InvalidInputError: a size or an option is not one of those above, or this artifact is for ONNX Runtime only.
        SurgeryError: the package is not installed.
        ArtifactError: the artifact is missing or changed, the folder exists, or TensorRT cannot build the graph; then
            its own messages are in the error.
    """
    source = Path(artifact)
    manifest = _checked(source)
    trt = import_tensorrt(package)
    context = getattr(_config(source).get_text_config(), "max_position_embeddings", None)
    sizes = {"batch": batch, "sequence": sequence, "past": past}
    profiles = decoder_profiles(manifest.signature, context, cache_memory=cache_memory, **sizes)
    options = BuildOptions(targets, hardware_compatible, version_compatible, weight_streaming, refittable)
    cache = None if timing_cache is None else Path(timing_cache)
    hashes = {name: manifest.files[name]["sha256"] for name in _ONNX_ONLY[:2] if name in manifest.files}
    with staged_folder(folder) as aside:
        write_engine(aside, trt, source / GRAPH_FILE, manifest.signature, profiles, options, hashes, cache, progress)
        for name in manifest.files:
            if name not in _ONNX_ONLY:
                copy_file(source, aside, name)
        changed = {"files": describe_files(aside), "parity": None, "not_for": {}}
        Manifest(**(vars(manifest) | changed)).write(aside)
    return Path(folder)


def _checked(source: Path) -> Manifest:
    """The manifest of an ONNX artifact that TensorRT may read."""
    manifest = read_manifest(source)
    if ENGINE_FILE in manifest.files:
        raise InvalidInputError(f"{source} is an engine already. Give the ONNX artifact that it was built from.")
    check_files(source, manifest)
    check_external_data(source / GRAPH_FILE)
    if manifest.options.target != "portable" or manifest.quantization is not None:
        made = {"target": manifest.options.target} if manifest.quantization is None else manifest.quantization
        raise InvalidInputError(
            f"{source} was made with {made}: its graph has operators that only ONNX Runtime has. Export the model with "
            "target='portable' and without quantization."
        )
    return manifest


def _config(source: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"The config in {source} cannot be read: {error} Make the artifact again.") from error
