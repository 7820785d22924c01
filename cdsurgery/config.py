"""The options of a wrapped model, checked once: how far to look back, how often, and by what measure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from cdsurgery.entropy import MEASURES
from cdsurgery.errors import InvalidInputError

DEFAULT_LOOKBACK = 10
SCANS = ("auto", "full", "lazy", "fused")


@dataclass(frozen=True)
class ConfidentConfig:
    """What `wrap` was asked for.

    Attributes:
        lookback: K, the number of moves the scan may make. An int in [1, L-1], or a float in (0, 1]: that share of
            the L layers, rounded up and clipped to L-1. The default of 10 is clipped to L-1 too. The paper's Eq. 7,
            and the authors' own overlay, count the final layer in: their 10 is a lookback of 9.
        probability: in [0, 1]; the share of rows that may leave the final layer. 0 is the plain model, bit for bit
            and without extra work; 1 draws nothing.
        seed: for the draws of 0 < probability < 1, in [0, 2**32). None takes one from torch's global generator.
        measure: "entropy", or "log_p_squared" to reproduce the authors' published overlay.
        scan: "full" measures all K+1 candidates of every row; "lazy" no more than the scan reaches, for the same
            selection, and NaN for the other entropies, but in compiled and captured graphs, where it is full; "auto"
            is lazy inside of `generate`, where that is cheaper, and full else. "fused" makes the final logits in the
            same reading of the unembedding as the first candidates', equal to the model's own but for rounding; it
            measures all K+1, but inside of `generate` only as far as `cdsurgery.readings` plans.
    """

    lookback: int | float = DEFAULT_LOOKBACK
    probability: float = 1.0
    seed: int | None = None
    measure: str = "entropy"
    scan: str = "auto"

    def __post_init__(self) -> None:
        _check_lookback(self.lookback)
        if not _is_number(self.probability) or not 0 <= self.probability <= 1:
            raise InvalidInputError(f"probability is {self.probability!r}; it must be a number in [0, 1].")
        if self.seed is not None and (not _is_integer(self.seed) or not 0 <= self.seed < 2**32):
            raise InvalidInputError(f"seed is {self.seed!r}; it must be None or an integer in [0, 2**32).")
        if not isinstance(self.measure, str) or self.measure not in MEASURES:
            raise InvalidInputError(f"measure is {self.measure!r}; it must be one of {', '.join(MEASURES)}.")
        if not isinstance(self.scan, str) or self.scan not in SCANS:
            raise InvalidInputError(f"scan is {self.scan!r}; it must be one of {', '.join(SCANS)}.")
        if self.scan == "fused" and self.measure != "entropy":
            raise InvalidInputError(
                f"scan is 'fused' and measure {self.measure!r}; the fused scan makes entropies only. Use measure="
                "'entropy', or scan='full' or 'lazy'."
            )

    def resolve(self, layers: int) -> ConfidentConfig:
        """The same options for a model of `layers` layers: `lookback` an int, a `seed` wherever one is needed."""
        deepest = layers - 1
        if isinstance(self.lookback, float):
            # The share as it is written: as a float, 0.14 of 50 layers is a little more than 7.
            lookback = min(math.ceil(Fraction(str(self.lookback)) * layers), deepest)
        elif self.lookback > deepest and self.lookback != DEFAULT_LOOKBACK:
            raise InvalidInputError(
                f"lookback is {self.lookback}, but the model has {layers} decoder layers, which leaves {deepest} to "
                f"look back to. Use an integer in [1, {deepest}] or a share of the depth in (0, 1]."
            )
        else:
            lookback = min(self.lookback, deepest)
        seed = self.seed
        if seed is None and 0 < self.probability < 1:
            seed = int(torch.randint(2**32, ()).item())
        return replace(self, lookback=lookback, seed=seed)


def _check_lookback(lookback: int | float) -> None:
    if _is_integer(lookback):
        if lookback < 1:
            raise InvalidInputError(
                f"lookback is {lookback}; as an integer it must be at least 1, the number of layers to look back. "
                "For ordinary decoding use the model unwrapped, or probability=0."
            )
    elif not _is_number(lookback) or not 0 < lookback <= 1:
        raise InvalidInputError(
            f"lookback is {lookback!r}; it must be an integer of at least 1 or a float in (0, 1], a share of the depth."
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
