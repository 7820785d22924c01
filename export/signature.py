"""A wrapped model -> the names, dtypes and axes of its graph: the one place from which everything else takes them.

The names are those that onnxruntime-genai, optimum and transformers.js expect of a decoder; the selected logits are the
ones called `logits`, so that an unaware client decodes from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cdsurgery.errors import InvalidInputError, UnsupportedModelError
from cdsurgery.export.graph.cache import PARTS, cache_states
from cdsurgery.export.graph.linear_attention import check_linear_attention
from cdsurgery.export.options import GraphOptions
from cdsurgery.probe import at_rest, probe_inputs

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "targets")
RESULTS = ("logits", "final_logits", "logprobs", "final_logprobs", "selected_layer", "entropy")
AXES = BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: a name, a dtype as torch spells it, and axes that are names (dynamic) or lengths."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs of a decoder graph, in the order of the graph.

    Axes: `batch`, `sequence` (new tokens), `past` (tokens in the cache, 0 included), `total` (their sum).
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def tokens(self) -> tuple[TensorSpec, ...]:
        """The inputs that are not the cache; a grafted graph may count its positions itself and have none."""
        return tuple(spec for spec in self.inputs if spec.name in TOKEN_INPUTS)

    @property
    def counts_positions(self) -> bool:
        """Whether the graph counts its positions itself, from the cache's length on."""
        return all(spec.name != "position_ids" for spec in self.inputs)

    @property
    def past(self) -> tuple[TensorSpec, ...]:
        """The inputs that hold the cache, layer by layer."""
        return tuple(spec for spec in self.inputs if spec.name not in TOKEN_INPUTS)

    @property
    def present(self) -> tuple[TensorSpec, ...]:
        """The outputs that hold the cache, in the order of `past`."""
        return tuple(spec for spec in self.outputs if spec.name not in RESULTS)

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        """The outputs that are not the cache."""
        return tuple(spec for spec in self.outputs if spec.name in RESULTS)


def decoder_signature(model: Any, options: GraphOptions) -> Signature:
    """The signature of a wrapped model's graph.

    Args:
        model: a `ConfidentHead`, already upcast where the options say so.
        options: of the graph.

    Raises:
        InvalidInputError: the model is wrapped with probability=0.
        UnsupportedModelError: a layer keeps another state than what `export.graph.cache` knows.
    """
    if model.confident.probability == 0:
        raise InvalidInputError(
            "The model is wrapped with probability=0, which is ordinary decoding: there is no selection to export. "
            "Wrap it with a probability above 0, or export the plain model with transformers."
        )
    inputs = [
        TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec("attention_mask", "int64", (BATCH, TOTAL)),
        TensorSpec("position_ids", "int64", (BATCH, SEQUENCE)),
    ]
    if options.positions == "score":
        inputs.append(TensorSpec("targets", "int64", (BATCH, SEQUENCE)))
    outputs = list(_results(model, options))
    for index, part, state in _probe_states(model):
        past, present, growing = PARTS[part].past, PARTS[part].present, PARTS[part].growing
        dtype = str(state.dtype).removeprefix("torch.")
        axes: list[str | int] = [BATCH, *state.shape[1:]]
        for side, name, length in ((inputs, past, PAST), (outputs, present, TOTAL)):
            if growing is not None:
                axes[growing] = length
            side.append(TensorSpec(name.format(index), dtype, tuple(axes)))
    return Signature(tuple(inputs), tuple(outputs))


def _results(model: Any, options: GraphOptions) -> tuple[TensorSpec, ...]:
    rows: str | int = 1 if options.positions == "last" else SEQUENCE
    candidates = model.confident.lookback + 1
    vocabulary = model.config.get_text_config().vocab_size
    chosen = (
        TensorSpec("selected_layer", "int64", (BATCH, rows)),
        TensorSpec("entropy", "float32", (BATCH, rows, candidates)),
    )
    if options.positions == "score":
        names = ("logprobs", "final_logprobs")
        return (*(TensorSpec(name, "float32", (BATCH, rows)) for name in names), *chosen)
    # Clients that read numpy arrays, onnxruntime-genai among them, know no bfloat16.
    dtype = "float16" if model.dtype == torch.float16 else "float32"
    return (*(TensorSpec(name, dtype, (BATCH, rows, vocabulary)) for name in ("logits", "final_logits")), *chosen)


def _probe_states(model: Any) -> list[tuple[int, str, Tensor]]:
    """What a cache holds that the model filled."""
    cache = DynamicCache(config=model.config)
    with at_rest(model):
        model(**probe_inputs(model), past_key_values=cache, use_cache=True)
    states = list(cache_states(cache))
    if all(PARTS[part].growing is None for _, part, _ in states):
        raise UnsupportedModelError(
            f"No layer of this {type(model).__name__} keeps keys and values, so its cache does not know how many "
            "tokens it has seen. Models with some attention can be exported."
        )
    if any(part in ("conv", "recurrent") for _, part, _ in states):
        check_linear_attention(model)
    # Of a convolution's inputs transformers keeps one more than the next token reads; genai does not.
    return [(index, part, state[..., 1:] if part == "conv" else state) for index, part, state in states]


def empty_past(signature: Signature, batch: int, past: int = 0) -> list[Tensor]:
    """Zeros for every past input, `[batch, ...]` with `past` tokens, on the CPU."""
    lengths = {BATCH: batch, PAST: past}
    return [
        torch.zeros([axis if isinstance(axis, int) else lengths[axis] for axis in spec.axes], dtype=torch_dtype(spec))
        for spec in signature.past
    ]


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """The spec's dtype as torch has it."""
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
