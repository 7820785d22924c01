"""A model's own output class -> the same class with three more fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

_CLASSES: dict[type[ModelOutput], type[ConfidentOutput]] = {}  # a dict, for Dynamo looks inside functools.cache


@dataclass
class ConfidentOutput(ModelOutput):
    """What a wrapped model returns, beside everything its own output class has.

    Attributes:
        logits: `[B, T, V]`, those of the selected layer: what `generate` and every existing client reads.
        final_logits: `[B, T, V]`, what the model returned before it was wrapped, bit for bit; but for rounding with
            `scan="fused"`.
        selected_layer: `[B, T]` int64 in [L-K, L]; layers are counted 1..L.
        entropy: `[B, T, M]` float32, nats; index k is layer L-k. NaN where a candidate is broken, or `generate` or a
            lazy scan did not look (`scan`). None where `probability=0`: nothing is computed.
    """

    logits: Tensor | None = None
    final_logits: Tensor | None = None
    selected_layer: Tensor | None = None
    entropy: Tensor | None = None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a class is made, not traced
def confident_output_class(plain: type[ModelOutput]) -> type[ConfidentOutput]:
    """A dataclass that is both a `ConfidentOutput` and a `plain`, with the plain fields first and in their order."""
    if plain not in _CLASSES:

        def reduced(self: ConfidentOutput) -> tuple[Any, ...]:  # pickle would look for the class by its name
            _, values, *rest = plain.__reduce__(self)
            return _unpickled, (plain, *values), *rest

        body = {"__reduce__": reduced}
        _CLASSES[plain] = dataclass(type(f"Confident{plain.__name__}", (ConfidentOutput, plain), body))
    return _CLASSES[plain]


def _unpickled(plain: type[ModelOutput], *values: Any) -> ConfidentOutput:
    return confident_output_class(plain)(*values)


def confident_output(plain: Any, **confident: Any) -> ConfidentOutput:
    """The model output `plain` with these fields set, and with room for the three new ones."""
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    output_class = confident_output_class(type(plain))
    return output_class(**(values | confident))
