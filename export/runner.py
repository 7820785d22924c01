"""An ONNX artifact -> a model that runs in ONNX Runtime: the same call, the same fields, `generate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.clients import GRAPH_FILE
from cdsurgery.export.manifest import Manifest, check_files, read_manifest
from cdsurgery.export.signature import cache_tensors, empty_past
from cdsurgery.output import ConfidentOutput


@dataclass
class RunnerOutput(ConfidentOutput, CausalLMOutputWithPast):
    """What one run returns: a `ConfidentOutput` with `past_key_values`."""


def load(folder: str | os.PathLike[str], providers: Sequence[str] | None = None) -> OnnxRunner:
    """Open an artifact, after comparing every file with its manifest.

    Args:
        folder: what `to_onnx` wrote.
        providers: ONNX Runtime execution providers in order of preference; None means CPU.

    Raises:
        ArtifactError: it is missing, incomplete, changed, or of a newer schema.
        InvalidInputError: a provider is not available.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return OnnxRunner(folder, manifest, providers)


class OnnxRunner(GenerationMixin):
    """A decoder in ONNX Runtime behind the interface of a transformers model.

    Attributes:
        config, generation_config: as the exported model had them.
        manifest: what the artifact says of itself.
        session: the ONNX Runtime session.
        device: where its tensors live; the CPU.
    """

    # What GenerationMixin asks of a model.
    main_input_name = "input_ids"
    base_model_prefix = ""
    input_modalities = ("text",)
    _is_stateful = False
    device = torch.device("cpu")

    def __init__(
        self, folder: str | os.PathLike[str], manifest: Manifest, providers: Sequence[str] | None = None
    ) -> None:
        providers = list(providers or ["CPUExecutionProvider"])
        available = onnxruntime.get_available_providers()
        if missing := [name for name in providers if name not in available]:
            raise InvalidInputError(
                f"ONNX Runtime has no {', '.join(missing)} here; it has {', '.join(available)}. Install the package "
                "that brings it (pip install 'cdsurgery[gpu]' for CUDA), or choose from these."
            )
        path = Path(folder)
        self.manifest = manifest
        self.config = AutoConfig.from_pretrained(path)
        self.generation_config = GenerationConfig.from_pretrained(path)
        self.dtype = getattr(torch, manifest.dtype)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        try:
            self.session = onnxruntime.InferenceSession(str(path / GRAPH_FILE), options, providers=providers)
        except Exception as error:  # ONNX Runtime raises its own kinds, none of them public
            raise ArtifactError(f"ONNX Runtime cannot open {path / GRAPH_FILE}: {error}") from error

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> RunnerOutput:
        """Run the graph on new tokens.

        Args:
            input_ids: `[B, S]` int64 in [0, V).
            attention_mask: `[B, P+S]`, 0 for padding on either side; None for all ones.
            position_ids: `[B, S]`; None counts the mask.
            past_key_values: what an earlier run returned; None or empty to begin.
            **options: `generate` passes its own (`use_cache`, `return_dict`, ...); they change nothing here.

        Returns:
            logits and final_logits `[B, T, V]`, selected_layer `[B, T]`, entropy `[B, T, M]`, past_key_values. T is 1,
            or S in an artifact made with positions="all".

        Raises:
            InvalidInputError: shapes do not fit each other, or a token or position is out of range.
        """
        past = _past_tensors(past_key_values)
        cached = past[0].shape[-2] if past else 0
        batch, length = self._check_tokens(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones(batch, cached + length, dtype=torch.int64)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        self._check_shapes(input_ids, attention_mask, position_ids, cached)
        specs, tokens = self.manifest.signature.past, self.manifest.signature.tokens
        past = past or empty_past(self.manifest.signature, self.dtype, batch)
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        arrays = {spec.name: feed[spec.name].contiguous().numpy().astype(spec.dtype) for spec in tokens}
        arrays |= {spec.name: tensor.contiguous().numpy() for spec, tensor in zip(specs, past, strict=True)}
        outputs: list[np.ndarray[Any, Any]] = self.session.run(None, arrays)
        tensors = [torch.from_numpy(array) for array in outputs]
        logits, final_logits, selected_layer, entropy, *present = tensors
        return RunnerOutput(
            logits=logits,
            past_key_values=DynamicCache(zip(present[::2], present[1::2], strict=True)),
            final_logits=final_logits,
            selected_layer=selected_layer,
            entropy=entropy,
        )

    forward = __call__  # where generate looks for the signature

    def can_generate(self) -> bool:
        """True: `GenerationMixin` asks."""
        return True

    def is_remote_code(self) -> bool:
        """False: `GenerationMixin` asks."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None to choose: `GenerationMixin` asks."""
        return {}

    def _check_tokens(self, input_ids: Tensor) -> tuple[int, int]:
        vocabulary = self.config.get_text_config().vocab_size
        if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.is_floating_point():
            raise InvalidInputError(
                f"input_ids has shape {list(input_ids.shape)} and dtype {input_ids.dtype}; it must hold integers, "
                "[batch, sequence], with at least one token."
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocabulary:
            raise InvalidInputError(f"input_ids holds ids from {low} to {high}; allowed are 0 to {vocabulary - 1}.")
        return input_ids.shape[0], input_ids.shape[1]

    def _check_shapes(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cached: int) -> None:
        batch, length = input_ids.shape
        if list(mask.shape) != [batch, cached + length]:
            raise InvalidInputError(
                f"attention_mask has shape {list(mask.shape)}; with {cached} cached and {length} new tokens it must be "
                f"[{batch}, {cached + length}]."
            )
        if list(positions.shape) != [batch, length]:
            raise InvalidInputError(
                f"position_ids has shape {list(positions.shape)}; it must be that of input_ids, [{batch}, {length}]."
            )
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and int(positions.max()) >= context:
            raise InvalidInputError(
                f"A token stands at position {int(positions.max())}; the model's context is {context} tokens. Shorten "
                "the prompt or generate fewer tokens."
            )


def _past_tensors(cache: Cache | None) -> list[Tensor]:
    """Keys and values of all layers in turn; empty for a cache that holds nothing yet."""
    if cache is None or cache.get_seq_length() == 0:
        return []
    return cache_tensors(cache)
