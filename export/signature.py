"""A wrapped model -> the names, dtypes and axes of its graph: the one place from which everything else takes them.

The names are those that onnxruntime-genai, optimum and transformers.js expect of a decoder; the selected logits are the
ones called `logits`, so that an unaware client decodes from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from cdsurgery.errors import InvalidInputError, UnsupportedModelError
from cdsurgery.probe import at_rest, probe_inputs

Positions = Literal["last", "all"]

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"
DTYPES = {torch.float32: "float32", torch.float16: "float16"}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: a name, a dtype as numpy spells it, and axes that are names (dynamic) or lengths."""

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
    def past(self) -> tuple[TensorSpec, ...]:
        """The inputs that hold the cache: layer by layer, key before value."""
        return tuple(spec for spec in self.inputs if spec.name not in TOKEN_INPUTS)


def decoder_signature(model: Any, positions: Positions) -> Signature:
    """The signature of a wrapped model's graph.

    Args:
        model: a `ConfidentHead` in float32 or float16.
        positions: "last" for the logits of each row's last real token, "all" for those of every new token.

    Raises:
        InvalidInputError: the model is wrapped with probability=0.
        UnsupportedModelError: the dtype has no kernels, or a layer keeps another state than keys and values.
    """
    dtype = DTYPES.get(model.dtype)
    if dtype is None:
        raise UnsupportedModelError(
            f"The model is in {model.dtype}; an ONNX artifact can be float32 or float16. ONNX Runtime has no bfloat16 "
            "kernels on CPU. Convert the model first, for example with model.float()."
        )
    if model.confident.probability == 0:
        raise InvalidInputError(
            "The model is wrapped with probability=0, which is ordinary decoding: there is no selection to export. "
            "Wrap it with a probability above 0, or export the plain model with transformers."
        )
    rows: str | int = SEQUENCE if positions == "all" else 1
    candidates = model.confident.lookback + 1
    vocabulary = model.config.get_text_config().vocab_size
    inputs = [
        TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec("attention_mask", "int64", (BATCH, TOTAL)),
        TensorSpec("position_ids", "int64", (BATCH, SEQUENCE)),
    ]
    outputs = [
        TensorSpec("logits", dtype, (BATCH, rows, vocabulary)),
        TensorSpec("final_logits", dtype, (BATCH, rows, vocabulary)),
        TensorSpec("selected_layer", "int64", (BATCH, rows)),
        TensorSpec("entropy", "float32", (BATCH, rows, candidates)),
    ]
    for index, shapes in enumerate(_cache_shapes(model)):
        for part, (heads, size) in zip(("key", "value"), shapes, strict=True):
            inputs.append(TensorSpec(f"past_key_values.{index}.{part}", dtype, (BATCH, heads, PAST, size)))
            outputs.append(TensorSpec(f"present.{index}.{part}", dtype, (BATCH, heads, TOTAL, size)))
    return Signature(tuple(inputs), tuple(outputs))


def _cache_shapes(model: Any) -> list[list[tuple[int, int]]]:
    """(heads, head size) of the keys and the values of every cache layer, read off a cache that the model filled."""
    cache = DynamicCache(config=model.config)
    with at_rest(model):
        model(**probe_inputs(model), past_key_values=cache, use_cache=True)
    for index, layer in enumerate(cache.layers):
        if not (torch.is_tensor(getattr(layer, "keys", None)) and torch.is_tensor(getattr(layer, "values", None))):
            raise UnsupportedModelError(
                f"Layer {index} of this {type(model).__name__} keeps a state of type {type(layer).__name__}, not keys "
                "and values. Only attention caches can be exported so far."
            )
    tensors = cache_tensors(cache)
    shapes = [(tensor.shape[1], tensor.shape[3]) for tensor in tensors]
    return [list(pair) for pair in zip(shapes[::2], shapes[1::2], strict=True)]


def cache_tensors(cache: Any) -> list[Tensor]:
    """The keys and values of all layers of a transformers cache in turn, in the order of the signature."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def empty_past(signature: Signature, dtype: torch.dtype, batch: int, past: int = 0) -> list[Tensor]:
    """Zeros for every past input, `[batch, heads, past, size]`, on the CPU."""
    lengths = {BATCH: batch, PAST: past}
    return [
        torch.zeros([axis if isinstance(axis, int) else lengths[axis] for axis in spec.axes], dtype=dtype)
        for spec in signature.past
    ]
