"""An artifact -> the options of ONNX Runtime's TensorRT providers for it: shapes, and where they keep what they made.

Without shapes, TensorRT builds a new engine whenever a text is longer than any before it. With them one engine serves
prefill and decode alike. https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
from transformers import AutoConfig

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.artifact.manifest import Manifest
from cdsurgery.export.runtime.session import Provider
from cdsurgery.export.signature import SEQUENCE, Signature
from cdsurgery.export.tensorrt.profiles import Profile, Range, decoder_profiles
from cdsurgery.export.triton.serving.engines import cache_options
from cdsurgery.export.triton.serving.errors import FolderError

TENSORRT, TENSORRT_RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
# Provider -> its options for shapes, the one to ask for first.
SHAPES = {TENSORRT: "trt_profile_{}_shapes", TENSORRT_RTX: "nv_profile_{}_shapes"}


def tensorrt_providers(folder: Path, manifest: Manifest, cache: Path | None) -> list[Provider]:
    """Providers for `load(..., providers="tensorrt")`: TensorRT, and CUDA and CPU for what it does not take.

    Args:
        folder: of the artifact.
        manifest: of the artifact.
        cache: a folder for engines and timings of any artifact, made if it is not there; None keeps nothing.

    Raises:
        InvalidInputError: this ONNX Runtime has no TensorRT provider, or the cache is no folder to trust.
        ArtifactError: the artifact's config cannot be read.
    """
    available = onnxruntime.get_available_providers()
    name = next((name for name in SHAPES if name in available), None)
    if name is None:
        raise InvalidInputError(
            f"providers is 'tensorrt', and this ONNX Runtime has {', '.join(available)}. Install "
            "TensorRT's libraries and onnxruntime-gpu (pip uninstall onnxruntime, then pip install 'cdsurgery[gpu]'), "
            "or build an engine with export.to_tensorrt."
        )
    try:
        context = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"The config in {folder} cannot be read: {error} Make the artifact again.") from error
    prefill, decode = decoder_profiles(manifest.signature, context)
    # One profile for both, tuned for decoding.
    both = Profile("both", {**decode.axes, SEQUENCE: Range(1, 1, prefill.axes[SEQUENCE].maximum)})
    options = shape_options(name, manifest.signature, both)
    if cache is not None:
        try:
            options |= cache_options(name, cache, manifest.files)
        except FolderError as error:
            raise InvalidInputError(str(error)) from error
    others = [other for other in ("CUDAExecutionProvider", "CPUExecutionProvider") if other in available]
    return [(name, options), *others]


def shape_options(provider: str, signature: Signature, profile: Profile) -> dict[str, Any]:
    """ "input_ids:1x1,attention_mask:1x1,..." for the smallest, the tuned and the largest shapes."""
    option = SHAPES[provider]
    shapes = {spec.name: profile.shapes(spec) for spec in signature.inputs}
    return {
        option.format(size): ",".join(f"{name}:{'x'.join(map(str, of[place]))}" for name, of in shapes.items())
        for place, size in enumerate(("min", "opt", "max"))
    }
