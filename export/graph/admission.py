"""A wrapped model -> the causal LM in it that can be traced; what cannot is refused, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING

from cdsurgery.errors import InvalidInputError, SurgeryError, UnsupportedModelError
from cdsurgery.head import ConfidentHead
from cdsurgery.wrap import adapted_model


def traceable_model(model: Any) -> Any:
    """The causal LM that decodes: the model itself, or what a PEFT model adapts, its adapters included.

    Raises:
        InvalidInputError: the model is not wrapped.
        UnsupportedModelError: no graph can be made of it, or none that `load` could open.
    """
    host: Any = adapted_model(model)
    if not isinstance(host, ConfidentHead):
        raise InvalidInputError(f"This {type(model).__name__} is not wrapped. Export what cdsurgery.wrap returned.")
    prompts = [name for name, of in getattr(model, "peft_config", {}).items() if getattr(of, "is_prompt_learning", 0)]
    if prompts:
        raise UnsupportedModelError(
            f"The adapter {', '.join(map(repr, prompts))} puts embeddings before each text, and a graph takes tokens. "
            "Adapters that change weights (LoRA and its relatives) can be exported."
        )
    if (quantizer := getattr(host, "hf_quantizer", None)) is not None:
        raise UnsupportedModelError(
            f"This {type(host).__name__} was quantised when it was loaded ({type(quantizer).__name__}), into operators "
            "that ONNX does not have. Load it without quantization_config and quantise its graph: pass "
            "quantization='int4' or 'int8'."
        )
    config: Any = host.config
    if config.model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"The {type(config).__name__} of this {type(host).__name__} has model_type {config.model_type!r}, which "
            "transformers' AutoConfig does not know, so nothing could load the artifact. Register it first, here and "
            f"where the artifact is loaded: AutoConfig.register({config.model_type!r}, {type(config).__name__})."
        )
    return host


@contextmanager
def failures_named(model: Any) -> Iterator[None]:
    """Run the block; what torch's and transformers' exporters raise becomes an error that names it in one line.

    Raises:
        UnsupportedModelError: the model cannot be traced.
    """
    try:
        yield
    except (SurgeryError, OSError, MemoryError):
        raise
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise UnsupportedModelError(
            f"This {type(model).__name__} could not be traced into a graph ({type(error).__name__}: {said}). It must "
            "take past_key_values and do nothing that torch.export cannot follow; docs/onnx.md lists tested families."
        ) from error
