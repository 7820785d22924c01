"""A cache and a model's files -> the folder where TensorRT's providers keep what they made of that very graph.

https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import FolderError

# TensorRT's provider -> its options that name a folder, and those without which it does not use that.
CACHES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "TensorrtExecutionProvider": (
        ("trt_engine_cache_path", "trt_timing_cache_path"),
        {"trt_engine_cache_enable": True, "trt_timing_cache_enable": True},
    ),
    "NvTensorRTRTXExecutionProvider": (("nv_runtime_cache_path",), {}),
}


def cache_options(provider: str, cache: Path, files: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a provider with which it keeps what it made, and finds it again.

    Args:
        provider: a name of `CACHES`.
        cache, files: see `cache_folder`.

    Raises:
        FolderError: see `cache_folder`.
    """
    paths, switches = CACHES[provider]
    return switches | dict.fromkeys(paths, str(cache_folder(cache, files)))


def cache_folder(cache: Path, files: Mapping[str, Any]) -> Path:
    """A folder of these files' own below the cache, both made if they are not there.

    ONNX Runtime names an engine after the graph's file and its inputs and outputs and not after its weights
    (`TRTGenerateId`), so that another model of the same shapes would be given this one's engine.

    Args:
        cache: whoever can write there can make this process run code, as an engine is code.
        files: of the model, with what tells them from another's: hash and size.

    Raises:
        FolderError: it cannot be made or written, or others can write it too.
    """
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise FolderError(
                f"The cache {cache} belongs to user {status.st_uid} with mode {status.st_mode & 0o777:o}. TensorRT's "
                f"engines are code, so it must be user {os.getuid()}'s and nobody else may write there: mode 700."
            )
        contents = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        folder = cache / contents[:16]
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FolderError(f"The cache {cache} cannot be used: {error}. Name another folder with cache=.") from error
    if not os.access(folder, os.W_OK):
        raise FolderError(f"The cache {folder} cannot be written. Name another folder with cache=.")
    return folder
