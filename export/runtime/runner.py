"""An artifact or an engine -> a model that runs it: the same call, the same fields, `generate`.

An artifact runs in ONNX Runtime, an engine in TensorRT; all but the session behind it is the same `Runner`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.artifact.clients import GRAPH_FILE
from cdsurgery.export.artifact.manifest import Manifest, check_files, check_runner, read_manifest
from cdsurgery.export.runtime.generation import RunnerGeneration
from cdsurgery.export.runtime.inputs import (
    INTEGERS,
    check_counted,
    check_group_query,
    check_kind,
    check_mask,
    check_options,
    check_targets,
    decoder_inputs,
)
from cdsurgery.export.runtime.past import past_tensors, updated_cache
from cdsurgery.export.runtime.providers import tensorrt_providers
from cdsurgery.export.runtime.session import Provider, Session
from cdsurgery.export.signature import PAST, empty_past, torch_dtype
from cdsurgery.export.tensorrt.manifest import ENGINE_FILE
from cdsurgery.export.tensorrt.session import EngineSession
from cdsurgery.output import ConfidentOutput


@dataclass
class RunnerOutput(ConfidentOutput, CausalLMOutputWithPast):
    """What one run returns: a `ConfidentOutput` with `past_key_values`.

    Attributes:
        logprobs, final_logprobs: `[B, S]` float32 nats, from an artifact that scores: of the targets, by the selected
            and by the final layer; 0 where a target is negative. It has no logits.
    """

    logprobs: Tensor | None = None
    final_logprobs: Tensor | None = None


class AnySession(Protocol):
    """What a runner needs of a session."""

    device: torch.device

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once: a tensor for every input of the signature -> one for every output."""


def load(
    folder: str | os.PathLike[str],
    providers: Sequence[Provider] | Literal["tensorrt"] | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    cuda_graphs: bool = False,
    lean_runtime: str | os.PathLike[str] | None = None,
) -> Runner:
    """Open an artifact or an engine, after comparing every file with its manifest.

    Args:
        folder: what `to_onnx`, `graft` or `to_tensorrt` wrote.
        providers: for an artifact, ONNX Runtime execution providers in order of preference, each a name such as
            "CUDAExecutionProvider" or a pair of a name and options; "tensorrt" for ONNX Runtime's TensorRT provider
            with what it needs; None means CPU. An engine takes none.
        cache: a folder where TensorRT keeps what it made for this machine, so that the next load is quick: engines and
            timings with providers="tensorrt", the kernels that TensorRT-RTX compiled for an engine.
        cuda_graphs: for an engine of TensorRT, replay decode steps as CUDA graphs. The cache then alternates between
            two memories: a run overwrites what the run before the last one returned.
        lean_runtime: for an engine that another TensorRT built with `version_compatible`: the file of that version's
            lean runtime. It is loaded as code.

    Raises:
        ArtifactError: it is missing, incomplete, changed, or of another schema; an engine is of another TensorRT or for
            another GPU.
        InvalidInputError: a provider is not available, an option is for the other kind, or there is no GPU for an
            engine.
        UnsupportedModelError: it was grafted from a file that only other clients can run.
        SurgeryError: the TensorRT package of an engine is not installed.
    """
    manifest = read_manifest(folder)
    check_runner(folder, manifest)
    is_engine = ENGINE_FILE in manifest.files
    check_files(folder, manifest, needed=(ENGINE_FILE if is_engine else GRAPH_FILE, "config.json"))
    kept = None if cache is None else Path(cache)
    if is_engine:
        if providers is not None:
            raise InvalidInputError(f"{folder} is an engine, which takes no providers. Leave them out.")
        library = None if lean_runtime is None else Path(lean_runtime)
        return EngineRunner(folder, manifest, cache=kept, cuda_graphs=cuda_graphs, lean_runtime=library)
    if cuda_graphs or lean_runtime is not None or (kept is not None and providers != "tensorrt"):
        raise InvalidInputError(
            f"{folder} is an ONNX artifact: cuda_graphs and lean_runtime are for engines, and cache for engines or "
            "providers='tensorrt'."
        )
    if providers == "tensorrt":
        providers = tensorrt_providers(Path(folder), manifest, kept)
    return OnnxRunner(folder, manifest, providers)


class Runner(RunnerGeneration):
    """A decoder outside of PyTorch behind the interface of a transformers model.

    Attributes:
        runtime: "onnxruntime" or "tensorrt".
        config, generation_config: as the exported model had them.
        folder: of the artifact.
        manifest: what the artifact says of itself.
        session: the graph or engine, open for running.
        device: where the session computes and the cache stays.
    """

    runtime: str

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest, session: AnySession) -> None:
        path = Path(folder)
        self.folder, self.manifest, self.session, self.device = path, manifest, session, session.device
        self.dtype = torch.float32 if manifest.options.upcast else getattr(torch, manifest.dtype)
        # A state that does not grow cannot give tokens back, as assisted decoding asks.
        self._is_stateful = any(PAST not in spec.axes for spec in manifest.signature.past)
        try:
            self.config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            self.generation_config = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"The configs in {path} cannot be read: {error} Make the artifact again.") from error

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        targets: Tensor | None = None,
        **options: Any,
    ) -> RunnerOutput:
        """Run the graph on new tokens.

        Args:
            input_ids: `[B, S]` int64 in [0, V).
            attention_mask: `[B, P+S]`, 1 for tokens and 0 for padding on either side; None for all ones. A hybrid needs
                padding on the left, a grafted GroupQueryAttention on the right; where a grafted graph counts positions
                itself, none may stand between tokens.
            position_ids: `[B, S]` int64 in [0, the model's context); None counts the mask.
            past_key_values: what an earlier run returned; None or empty to begin. This run updates it.
            targets: `[B, S]` int64 in [0, V), the token wanted after each, negative for none; for an artifact made
                with positions="score", and for no other.
            **options: `use_cache=False` returns no cache; `return_dict` and `tokenizer` change nothing here. Others
                may be None or False.

        Returns:
            logits and final_logits `[B, T, V]`, selected_layer `[B, T]` and entropy `[B, T, M]` on the device of
            `input_ids`, and past_key_values, the object that was passed if one was, on that of the session. T is 1, or
            S in an artifact made with positions="all". With positions="score" log-probabilities instead of logits.

        Raises:
            InvalidInputError: a tensor is of another kind, shapes do not fit each other, a token, mask or position is
                out of range, or an option asks for what the graph does not return.
        """
        check_options(options)
        signature = self.manifest.signature
        past = past_tensors(past_key_values, len(signature.past))
        cached = past_key_values.get_seq_length() if past and past_key_values is not None else 0
        given = decoder_inputs(self.config, input_ids, attention_mask, position_ids, cached)
        given |= check_targets(self.config, self.manifest.options.positions, targets, input_ids)
        if self.manifest.group_query_attention:
            check_group_query(given["attention_mask"], cached)
        elif signature.counts_positions:
            check_counted(given["attention_mask"], position_ids, cached)
        # A grafted graph may count its positions itself, and take integers of 32 bits.
        feed = {spec.name: given[spec.name].to(torch_dtype(spec)) for spec in signature.tokens}
        past = past or empty_past(signature, len(input_ids))
        feed |= {spec.name: tensor for spec, tensor in zip(signature.past, past, strict=True)}
        outputs = self.session.run(feed)
        results: dict[str, Any] = {spec.name: outputs[spec.name].to(input_ids.device) for spec in signature.results}
        written = [outputs[spec.name] for spec in signature.present]
        cache = updated_cache(past_key_values, [spec.name for spec in signature.past], written)
        # Without `use_cache`, `generate` sends the whole text again, with any cache that it was given.
        return RunnerOutput(past_key_values=None if options.get("use_cache") is False else cache, **results)

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, chunk: int = 128) -> RunnerOutput:
        """How likely the model finds a text: the log-probability of every token but the first, given those before.

        Args:
            input_ids: `[B, S]` int64 in [0, V), S at least 2.
            attention_mask: `[B, S]`, 0 for padding on either side; None for all ones.
            chunk: tokens a run, each continuing the cache of the one before; what is held is `B x chunk x V`.

        Returns:
            logprobs and final_logprobs `[B, S-1]`, 0 where the token or the one before it is padding; selected_layer
            `[B, S-1]`, entropy `[B, S-1, M]`.

        Raises:
            InvalidInputError: the artifact was not made with positions="score", the text has no second token, or its
                mask does not fit it.
        """
        check_kind("input_ids", input_ids, INTEGERS)
        if input_ids.ndim != 2 or input_ids.shape[1] < 2:
            raise InvalidInputError(
                f"input_ids has shape {list(input_ids.shape)}; to score a text it must be [batch, sequence] with at "
                "least two tokens."
            )
        if chunk < 1:
            raise InvalidInputError(f"chunk is {chunk}; it must be at least 1 token.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_mask(mask, list(input_ids.shape), cached=0)
        targets = input_ids[:, 1:].masked_fill((mask[:, 1:] * mask[:, :-1]) == 0, -1)
        past, runs = None, []
        for start in range(0, targets.shape[1], chunk):
            end = min(start + chunk, targets.shape[1])
            run = self(input_ids[:, start:end], mask[:, :end], past_key_values=past, targets=targets[:, start:end])
            past = run.past_key_values
            runs.append(run)
        fields = [spec.name for spec in self.manifest.signature.results]
        whole: dict[str, Any] = {name: torch.cat([run[name] for run in runs], dim=1) for name in fields}
        return RunnerOutput(**whole)

    forward = __call__  # where generate looks for the signature


class OnnxRunner(Runner):
    """An artifact in ONNX Runtime."""

    runtime = "onnxruntime"
    session: Session

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        providers: Sequence[Provider] | None = None,
        *,
        weights_in_place: bool = False,
    ) -> None:
        graph = Path(folder) / GRAPH_FILE
        super().__init__(
            folder, manifest, Session(graph, manifest.signature, providers, weights_in_place=weights_in_place)
        )


class EngineRunner(Runner):
    """An engine in TensorRT."""

    runtime = "tensorrt"
    session: EngineSession

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        *,
        cache: Path | None = None,
        cuda_graphs: bool = False,
        lean_runtime: Path | None = None,
    ) -> None:
        session = EngineSession(folder, cache=cache, cuda_graphs=cuda_graphs, lean_runtime=lean_runtime)
        super().__init__(folder, manifest, session)
