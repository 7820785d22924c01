"""Settings and a device -> the execution providers that ONNX Runtime is asked for, and where TensorRT keeps engines.

https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import onnxruntime

from .errors import FolderError
from .settings import Settings

# TensorRT's provider -> its options that name a folder, and those without which it does not use that.
CACHES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "TensorrtExecutionProvider": (
        ("trt_engine_cache_path", "trt_timing_cache_path"),
        {"trt_engine_cache_enable": True, "trt_timing_cache_enable": True},
    ),
    "NvTensorRTRTXExecutionProvider": (("nv_runtime_cache_path",), {}),
}


def providers_for(settings: Settings, device: tuple[str, int]) -> list[tuple[str, dict[str, Any]]]:
    """The providers, each with its options: TensorRT's if it is asked for, then that of the device.

    Args:
        settings: with `providers`, what TensorRT's need, and `cache`.
        device: "cpu" or "cuda", and its index.

    Raises:
        FolderError: this ONNX Runtime has no TensorRT provider, or the cache is no folder to trust.
    """
    kind, index = device
    own = ("CUDAExecutionProvider", {"device_id": index}) if kind == "cuda" else ("CPUExecutionProvider", {})
    if not settings.providers:
        return [own]
    available = onnxruntime.get_available_providers()
    name = next((name for name in settings.providers if name in available), None)
    if name is None:
        raise FolderError(
            f"This model wants {' or '.join(settings.providers)}, and this ONNX Runtime has {', '.join(available)}. "
            "Install onnxruntime-gpu and TensorRT's libraries, or make the repository without providers='tensorrt'."
        )
    options: dict[str, Any] = {"device_id": index, **settings.providers[name]}
    if settings.cache is not None:
        paths, switches = CACHES[name]
        options |= switches | dict.fromkeys(paths, str(cache_folder(settings)))
    return [(name, options), own]


def cache_folder(settings: Settings) -> Path:
    """The folder for what TensorRT made of this very graph, below `cache`, both made if they are not there.

    ONNX Runtime names an engine after the graph's file and its inputs and outputs and not after its weights
    (`TRTGenerateId`), so that another model of the same shapes would be given this one's engine.

    Raises:
        FolderError: it cannot be made or written, or others can write it too: an engine is code that runs.
    """
    assert settings.cache is not None
    place = Path(settings.cache)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise FolderError(
                f"The cache {place} belongs to user {status.st_uid} with mode {status.st_mode & 0o777:o}. TensorRT's "
                f"engines are code, so it must be user {os.getuid()}'s and nobody else may write there: mode 700."
            )
        contents = hashlib.sha256(json.dumps(settings.files, sort_keys=True).encode()).hexdigest()
        folder = place / contents[:16]
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FolderError(f"The cache {place} cannot be used: {error}. Name another folder with cache=.") from error
    if not os.access(folder, os.W_OK):
        raise FolderError(f"The cache {folder} cannot be written. Name another folder with cache=.")
    return folder
