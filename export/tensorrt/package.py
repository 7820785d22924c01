"""`tensorrt` or `tensorrt_rtx`, whichever is there or is asked for -> the module, or what to install.

Both have the same API where this package uses it. TensorRT tunes an engine on the GPU that will run it; TensorRT-RTX
builds ahead of time, without a GPU, for a list of architectures, and compiles kernels where the engine runs.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from cdsurgery.errors import InvalidInputError, SurgeryError

# In order of preference: who has installed TensorRT itself wants it used.
PACKAGES = {"tensorrt": "pip install 'cdsurgery[tensorrt]'", "tensorrt_rtx": "pip install 'cdsurgery[tensorrt-rtx]'"}


def import_tensorrt(name: str | None = None) -> Any:
    """The module.

    Args:
        name: "tensorrt" or "tensorrt_rtx"; None for the first of them that is installed.

    Raises:
        InvalidInputError: no such package is known.
        SurgeryError: it is not installed, cannot be loaded, or is too old.
    """
    if name is not None and name not in PACKAGES:
        raise InvalidInputError(f"package is {name!r}; it must be None or one of {', '.join(map(repr, PACKAGES))}.")
    wanted = PACKAGES if name is None else [name]
    found = next((package for package in wanted if find_spec(package) is not None), None)
    if found is None:
        remedies = ", or ".join(f"{package} with: {PACKAGES[package]}" for package in wanted)
        raise SurgeryError(f"{' or '.join(wanted)} is needed for engines and is not installed. Install {remedies}.")
    try:
        trt: Any = import_module(found)
    except (ImportError, OSError) as error:  # its libraries are another package, or were built for another CUDA
        raise SurgeryError(f"{found} is installed but cannot be loaded: {error}. Try {PACKAGES[found]}.") from error
    if not hasattr(trt.BuilderFlag, "STRICT_NANS"):
        raise SurgeryError(
            f"{found} {trt.__version__} has no STRICT_NANS, without which the builder takes x - x for 0 and a layer "
            f"whose logits are broken could be selected. Install a newer one: {PACKAGES[found]}."
        )
    return trt


def builds_ahead_of_time(trt: Any) -> bool:
    """Whether it builds for a list of architectures, without a GPU and without measuring kernels: TensorRT-RTX."""
    return hasattr(trt, "ComputeCapability")
