"""What an artifact was asked for -> options checked once: which rows, for which runtime, in which arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cdsurgery.errors import InvalidInputError

# TensorRT builds this one in float32, float16 and bfloat16; 23's Attention fails there in float32.
OPSET = 20

Positions = Literal["last", "all", "score"]
Target = Literal["portable", "cpu", "cuda"]
Scan = Literal["static", "lazy"]


@dataclass(frozen=True)
class GraphOptions:
    """How a decoder graph is made.

    Attributes:
        positions: "last" returns logits `[B, 1, V]` of each row's last real token, as decoding needs; "all"
            `[B, S, V]`; "score" takes `targets` and returns their log-probabilities `[B, S]` instead, and never holds
            the logits of more than one candidate.
        target: "portable" for standard operators only, which any runtime has; "cpu" or "cuda" for those of that
            provider of ONNX Runtime.
        upcast: keep the weights in the model's half precision, and compute in float32.
        scan: "static" projects all candidates of every row in one pass, and its shapes go by no value; "lazy" projects
            the two last layers' first, and the others of the rows that descend (an ONNX NonZero).
    """

    positions: Positions = "last"
    target: Target = "portable"
    upcast: bool = False
    scan: Scan = "static"

    def __post_init__(self) -> None:
        for name, kind in (("positions", Positions), ("target", Target), ("scan", Scan)):
            allowed = get_args(kind)
            if getattr(self, name) not in allowed:
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, allowed))}."
                )
        if self.scan == "lazy" and self.positions == "score":
            raise InvalidInputError("scan is 'lazy'; a graph with positions='score' takes one candidate after another.")
