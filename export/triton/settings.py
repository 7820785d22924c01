"""An artifact and options -> what the serving code is told in `serving.json`: names, axes, ends, limits, providers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.artifact.manifest import Manifest
from cdsurgery.export.runtime.providers import SHAPES, shape_options
from cdsurgery.export.signature import SEQUENCE, TensorSpec
from cdsurgery.export.tensorrt.profiles import Profile, Range, decoder_profiles
from cdsurgery.export.triton.options import ServingOptions
from cdsurgery.export.triton.serving.settings import Settings, Tensor


def serving_settings(
    source: Path,
    manifest: Manifest,
    options: ServingOptions,
    *,
    files: Mapping[str, Mapping[str, Any]],
    step_model: str | None,
) -> Settings:
    """The settings of a model.

    Args:
        source: the artifact.
        manifest: of the artifact.
        options: how to serve it.
        files: those of the version folder, with hash and size.
        step_model: name of the model that runs the graph; None for ONNX Runtime in the same process.

    Raises:
        InvalidInputError: the options do not fit the model.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    generation = GenerationConfig.from_pretrained(source)
    _warn_of_what_is_left_out(generation)
    context = options.context or getattr(config, "max_position_embeddings", None)
    if context is None:
        raise InvalidInputError("The model's config names no max_position_embeddings. Say how many tokens: context=.")
    if (most := getattr(config, "max_position_embeddings", None)) is not None and context > most:
        raise InvalidInputError(f"context is {context}; the model has {most} positions. Use no more than those.")
    signature = manifest.signature
    return Settings(
        layers=manifest.layers,
        vocabulary=next(int(spec.axes[-1]) for spec in signature.results if spec.name == "logits"),
        context=context,
        end_tokens=_end_tokens(generation, config),
        tokens=tensors(signature.tokens),
        past=tensors(signature.past),
        present=tensors(signature.present),
        temperature=float(_given(generation.temperature, 1.0)) if generation.do_sample else 0.0,
        top_p=float(_given(generation.top_p, 1.0)),
        top_k=int(_given(generation.top_k, 0)),
        min_p=float(_given(generation.min_p, 0.0)),
        repetition_penalty=float(_given(generation.repetition_penalty, 1.0)),
        default_max_tokens=min(options.max_tokens, context - 1),
        slots=options.slots,
        chunk=options.chunk,
        queue=options.queue,
        queue_timeout_seconds=options.queue_timeout_seconds,
        request_timeout_seconds=options.request_timeout_seconds,
        threads=options.threads,
        providers=_tensorrt(manifest, options, context) if options.providers == "tensorrt" else {},
        cache=None if options.cache is None else os.fspath(options.cache),
        step_model=step_model,
        files=files,
    )


def _tensorrt(manifest: Manifest, options: ServingOptions, context: int) -> dict[str, dict[str, Any]]:
    """The shapes of everything that the scheduler runs, for either of ONNX Runtime's TensorRT providers."""
    signature = manifest.signature
    # The last of `context` tokens is never run, so the one before it has the longest past.
    _, decode = decoder_profiles(signature, context, batch=options.slots, sequence=1, past=context - 2)
    axes = {**decode.axes, SEQUENCE: Range(1, 1, min(options.chunk, context - 1))}
    both = Profile("both", axes)  # one engine for prompts and steps, tuned for steps
    return {provider: shape_options(provider, signature, both) for provider in SHAPES}


# What of `generate` changes or ends a text and this server does not do -> the value that does nothing.
LEFT_OUT: dict[str, Any] = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "penalty_alpha": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "stop_strings": None,
}


def _warn_of_what_is_left_out(generation: GenerationConfig) -> None:
    asked = {name: getattr(generation, name, None) for name in LEFT_OUT}
    if left := [name for name, value in asked.items() if value not in (None, LEFT_OUT[name], [], {})]:
        warnings.warn(
            f"generation_config.json asks for {', '.join(f'{name}={asked[name]!r}' for name in left)}, which the "
            "server does not do: its texts differ from those of generate. It knows temperature, top_k, top_p, min_p "
            "and repetition_penalty.",
            stacklevel=4,
        )


def _given(value: Any, default: float) -> Any:
    return default if value is None else value


def _end_tokens(generation: GenerationConfig, config: Any) -> tuple[int, ...]:
    """The ids that end a text, as `generate` uses them: the generation config goes first."""
    found: Any = generation.eos_token_id
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def tensors(specs: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
    """Inputs or outputs of a graph as the serving code knows them."""
    return tuple(Tensor(spec.name, spec.dtype, spec.axes) for spec in specs)
