"""Settings and a device -> the execution providers that ONNX Runtime is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from .engines import cache_options
from .errors import FolderError
from .settings import Settings


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
        options |= cache_options(name, Path(settings.cache), settings.files)
    return [(name, options), own]
