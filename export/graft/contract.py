"""The inputs and outputs of a foreign decoder -> the signature of its artifact, under the names they have.

Tokens, mask and positions are known by name, everything else must be the cache: every past input has its present
output, and with the numbers in their names they pair up layer by layer, key before value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir

from cdsurgery.export.graft.companions import Facts
from cdsurgery.export.graft.flow import describe, refuse
from cdsurgery.export.graft.head import OUTPUTS
from cdsurgery.export.graph.cache import parsed_name
from cdsurgery.export.options import Positions
from cdsurgery.export.signature import BATCH, PAST, SEQUENCE, TOTAL, Signature, TensorSpec

LOGITS = "logits"
_AXES: dict[str, tuple[str, str]] = {
    "input_ids": (BATCH, SEQUENCE),
    "attention_mask": (BATCH, TOTAL),
    "position_ids": (BATCH, SEQUENCE),
}
_NUMPY = {
    onnx_ir.DataType.INT64: "int64",
    onnx_ir.DataType.INT32: "int32",
    onnx_ir.DataType.FLOAT: "float32",
    onnx_ir.DataType.FLOAT16: "float16",
}


@dataclass(frozen=True)
class Contract:
    """What a decoder takes and returns.

    Attributes:
        tokens: `input_ids`, `attention_mask` and `position_ids` by name; None for positions that it counts itself.
        past, present: the cache, layer by layer, key before value.
        logits: `[B, S, V]`, or `[B, 1, V]` where the exporter kept the last row only.
        vocabulary: V.
    """

    tokens: dict[str, onnx_ir.Value | None]
    past: tuple[onnx_ir.Value, ...]
    present: tuple[onnx_ir.Value, ...]
    logits: onnx_ir.Value
    vocabulary: int

    def signature(self, facts: Facts, lookback: int, positions: Positions) -> Signature:
        """The signature of the artifact.

        Args:
            facts: fill in what the graph leaves open: the number of heads and their size.
            lookback: K.
            positions: "last" or "all".
        """
        rows: str | int = SEQUENCE if positions == "all" else 1
        dtype = _dtype(self.logits)
        logits = (BATCH, rows, self.vocabulary)
        specs = (dtype, logits), (dtype, logits), ("int64", (BATCH, rows)), ("float32", (BATCH, rows, lookback + 1))
        outputs = [TensorSpec(name, *spec) for name, spec in zip(OUTPUTS, specs, strict=True)]
        inputs = [TensorSpec(n, _dtype(value), _AXES[n]) for n, value in self.tokens.items() if value is not None]
        for past, present in zip(self.past, self.present, strict=True):
            inputs.append(TensorSpec(str(past.name), _dtype(past), _cache_axes(past, facts, PAST)))
            outputs.append(TensorSpec(str(present.name), _dtype(past), _cache_axes(past, facts, TOTAL)))
        return Signature(tuple(inputs), tuple(outputs))


def read_contract(graph: onnx_ir.Graph) -> Contract:
    """Tell what each input and output of the graph is.

    Raises:
        UnsupportedModelError: it is not a decoder with a cache, it is grafted already, or a part is unknown.
    """
    inputs = {str(value.name): value for value in graph.inputs if value not in graph.initializers.values()}
    outputs = {str(value.name): value for value in graph.outputs}
    if "selected_layer" in outputs:
        raise refuse("it has an output 'selected_layer', so it selects layers already. Graft the original file.")
    if LOGITS not in outputs:
        raise refuse(
            f"it has no output named 'logits', so it is not a decoder with its head. It has: {_list(outputs)}."
        )
    for name in ("input_ids", "attention_mask"):
        if name not in inputs:
            raise refuse(
                f"it has no input named '{name}'. It has: {_list(inputs)}. Without a mask padded batches would be "
                "wrong silently: export the decoder with both."
            )
    tokens = {name: inputs.get(name) for name in _AXES}
    for name, value in tokens.items():
        if value is not None and (value.shape is None or len(value.shape) != 2):
            raise refuse(f"its input '{name}' has the shape {value.shape}; it must have two axes, [batch, sequence].")
    past = sorted((value for name, value in inputs.items() if name not in _AXES), key=_place)
    present = sorted((value for name, value in outputs.items() if name != LOGITS), key=_place)
    unknown = [str(value.name) for value in past if not _is_keys_or_values(str(value.name))]
    unknown += [str(value.name) for value in present if not re.search(r"\d", str(value.name))]
    if unknown or len(past) != len(present):
        raise refuse(
            f"beside tokens and logits it has the inputs {_list(v.name for v in past)} and the outputs "
            f"{_list(v.name for v in present)}. They must be the cache, one numbered output for each "
            "input, whose name ends in a layer's number and key or value, as past_key_values.0.key."
        )
    logits = outputs[LOGITS]
    size = None if logits.shape is None else logits.shape[-1]
    if logits.shape is None or len(logits.shape) != 3 or not isinstance(size, int):
        raise refuse(f"'logits' has the shape {logits.shape}; it must be [batch, rows, vocabulary], the last a number.")
    for value in (logits, *past):
        if _dtype(value) not in ("float32", "float16"):
            raise refuse(f"{describe(value)} is of type {value.dtype}; an artifact can be float32 or float16.")
    return Contract(tokens, tuple(past), tuple(present), logits, size)


def _is_keys_or_values(name: str) -> bool:
    place = parsed_name(name)
    return place is not None and place[1] in ("key", "value")


def _place(value: onnx_ir.Value) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", str(value.name))], str(value.name)


def _dtype(value: onnx_ir.Value) -> str:
    return _NUMPY.get(value.dtype or onnx_ir.DataType.UNDEFINED, "")


def _cache_axes(value: onnx_ir.Value, facts: Facts, length: str) -> tuple[str | int, ...]:
    """[batch, heads, length, size]; what the graph leaves open is taken from the configuration."""
    if value.shape is None or len(value.shape) != 4:
        raise refuse(f"its cache input {describe(value)} has the shape {value.shape}, not [batch, heads, past, size].")
    _, heads, _, size = value.shape
    axes = [axis if isinstance(axis, int) else fact for axis, fact in ((heads, facts.heads), (size, facts.head_size))]
    return (BATCH, axes[0], length, axes[1])


def _list(names: Iterable[str | None]) -> str:
    return ", ".join(str(name) for name in names) or "none"
