"""What `verify` measured -> whether it is within tolerance, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """How closely two runtimes must agree, in parts of the row's largest logit.

    An entropy is made of differences of logits, so it is rounded on their scale; it is measured against 1 nat where all
    logits of a row are smaller than that.
    """

    logits: float
    entropy: float


# float32: sums in another order, some 1e-6 over a dozen layers. float16: ten bits of mantissa through every layer.
# bfloat16 has three bits less than that.
TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-5),
    "float16": Tolerance(1e-2, 1e-3),
    "bfloat16": Tolerance(8e-2, 8e-3),
}
# Two runtimes that round alike are each as far from the exact result, so at most twice that from one another; half as
# much again is for the luck of the one that was measured.
NOISE_FACTOR = 3
# Beyond 30 times the tolerance and a hundredth of the largest logit, rounding decides what such a model says, and
# nothing can be shown of a graph by comparing it. (A random hybrid of 40 layers is 1.5e-3 from itself in float64.)
LARGEST_WIDENING, LARGEST_SHARE = 30, 1e-2


@dataclass
class Report:
    """What was compared, and how far apart it was.

    Attributes:
        tolerance: what is allowed.
        noise: how far PyTorch itself is from the same model in a wider dtype, on the same rows; measured only where a
            difference is above the tolerance. A model that amplifies rounding is allowed NOISE_FACTOR times as
            much, within limits.
        depth: L, the layers of the model.
        rows: rows compared; excluded: those of them too close to call; rerouted: those of them far apart because a
            router came closer to other experts than the runtimes agree.
        final_logits, logits: largest difference relative to the row's largest logit.
        entropy: the same for entropies; entropy_nats: their largest difference.
        layers: rows, outside of the excluded ones, where the selected layers differ.
        moved: share of rows whose selected layer is not the final one.
        tokens, tokens_equal: greedy tokens compared, up to and with the first that differs in each text.
        partings: for each text that parts, what the choice hung on.
    """

    tolerance: Tolerance
    depth: int
    rows: int = 0
    excluded: int = 0
    rerouted: int = 0
    moved: int = 0
    final_logits: float = 0.0
    logits: float = 0.0
    entropy: float = 0.0
    entropy_nats: float = 0.0
    layers: int = 0
    texts: int = 0
    tokens: int = 0
    tokens_equal: int = 0
    partings: list[dict[str, Any]] = field(default_factory=list)
    noise: Report | None = None

    @property
    def allowed(self) -> Tolerance:
        """The tolerance, widened to what rounding does to this model where that was measured."""
        t, noise = self.tolerance, self.noise
        if noise is None or not all(map(math.isfinite, (noise.final_logits, noise.logits, noise.entropy))):
            return t
        logits = NOISE_FACTOR * max(noise.final_logits, noise.logits)
        entropy = NOISE_FACTOR * noise.entropy
        return Tolerance(
            min(max(t.logits, logits), max(LARGEST_WIDENING * t.logits, LARGEST_SHARE)),
            min(max(t.entropy, entropy), max(LARGEST_WIDENING * t.entropy, LARGEST_SHARE)),
        )

    @property
    def close(self) -> bool:
        """All differences of numbers are within what is allowed."""
        t = self.allowed
        return self.final_logits <= t.logits and self.logits <= t.logits and self.entropy <= t.entropy

    @property
    def passed(self) -> bool:
        """Everything within what is allowed, and something was compared."""
        explained = all(self._explained(parting) for parting in self.partings)
        return self.close and self.layers == 0 and self.rows > self.excluded + self.rerouted and explained

    def add_rows(
        self,
        found: Sequence[Tensor],
        truth: Sequence[Tensor],
        scale: Tensor | None = None,
        routing: Tensor | None = None,
        entropy_scale: Tensor | None = None,
    ) -> None:
        """Count R rows in: logits `[R, V]`, final logits `[R, V]`, selected layers `[R]` and entropies `[R, M]`.

        A graph that scores has log-probabilities `[R, 1]` in place of logits, and needs the `scale` `[R, 1]` of the
        logits that they are made of. `routing` `[R]` is the row's closest call between experts, as in `RoutingMargins`.
        Another measure than entropy needs its `measure_scale` `[R, M]`.

        Too close to call is a row whose scan compared two entropies that lie no farther apart than twice what the two
        runtimes differ by in this row: either layer is right. On all others the layers must be equal.
        """
        self.rows += len(found[2])
        if routing is not None:
            far = ((found[1].double() - truth[1].double()) / _scale(truth, scale)).abs().amax(dim=-1)
            kept = ~((far > self.tolerance.logits) & (routing <= 2 * self.tolerance.logits))
            self.rerouted += int((~kept).sum())
            found, truth = [field[kept] for field in found], [field[kept] for field in truth]
            scale = scale[kept] if scale is not None else None
            entropy_scale = entropy_scale[kept] if entropy_scale is not None else None
        logits, final_logits, layers, entropy = found
        true_logits, true_final_logits, true_layers, true_entropy = truth
        scale = _scale(truth, scale)
        entropy_scale = scale.clamp(min=1) if entropy_scale is None else entropy_scale
        nats = (entropy - true_entropy).abs()
        clear = scan_margin(true_entropy) > 2 * nats.amax(dim=-1)
        self.excluded += int((~clear).sum())
        self.moved += int((layers < self.depth).sum())
        self.final_logits = max(self.final_logits, _relative(final_logits, true_final_logits, scale))
        self.logits = max(self.logits, _relative(logits[clear], true_logits[clear], scale[clear]))
        self.entropy = max(self.entropy, _largest(nats / entropy_scale))
        self.entropy_nats = max(self.entropy_nats, _largest(nats))
        self.layers += int((layers != true_layers)[clear].sum())

    def add_text(self, equal: int, parting: dict[str, Any] | None) -> None:
        """Count a text in: tokens equal from its beginning, and what the first other one hung on, if there is one."""
        self.tokens += equal + (parting is not None)
        self.tokens_equal += equal
        if parting is not None:
            self.partings.append(parting | {"step": equal})

    def _explained(self, parting: dict[str, Any]) -> bool:
        near_layer = parting["layer_margin"] <= 2 * self.allowed.entropy
        near = min(parting["token_margin"], parting["routing_margin"]) <= 2 * self.allowed.logits
        return bool(near_layer or near)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, with `passed` and `allowed`."""
        return {"passed": self.passed, "allowed": asdict(self.allowed)} | asdict(self)

    def __str__(self) -> str:
        t = self.allowed
        lines = [
            ("final logits", f"{self.final_logits:.1e} relative", f"{t.logits:.1e}"),
            ("selected logits", f"{self.logits:.1e} relative", f"{t.logits:.1e}"),
            ("entropies", f"{self.entropy:.1e} relative, {self.entropy_nats:.1e} nats", f"{t.entropy:.1e}"),
            ("selected layers", f"{self.layers} of {self.rows - self.excluded - self.rerouted} rows differ", "0"),
            ("too close to call", f"{self.excluded} of {self.rows} rows ({_share(self.excluded, self.rows)})", "shown"),
            ("other experts", f"{self.rerouted} of {self.rows} rows ({_share(self.rerouted, self.rows)})", "shown"),
            ("rows moved", f"{self.moved} of {self.rows} ({_share(self.moved, self.rows)})", "shown"),
            ("greedy tokens", f"{self.tokens_equal} of {self.tokens} equal, {self.texts} texts", "or explained"),
        ]
        table = [f"{'':18}{'found':38}allowed"] + [f"{name:18}{found:38}{allowed}" for name, found, allowed in lines]
        if self.noise is not None:
            table.append(
                f"PyTorch itself is {self.noise.final_logits:.1e} (final), {self.noise.logits:.1e} (selected) and "
                f"{self.noise.entropy:.1e} (entropies) from the same model in a wider dtype; {NOISE_FACTOR} times that "
                "is allowed."
            )
        for parting in self.partings:
            verdict = "explained" if self._explained(parting) else "NOT explained"
            table.append(
                f"text {parting['text']} parts at token {parting['step']}: layer margin {parting['layer_margin']:.1e} "
                f"relative, token margin {parting['token_margin']:.1e} relative, margin between experts "
                f"{parting['routing_margin']:.1e}: {verdict}"
            )
        return "\n".join([*table, "passed" if self.passed else "FAILED"])


def scan_margin(entropy: Tensor) -> Tensor:
    """The smallest gap between neighbours that the scan of each row compared: below it, rounding picks the layer.

    Args:
        entropy: `[..., M]` nats.

    Returns:
        `[...]` nats; NaN compares as no gap.
    """
    gaps = (entropy[..., 1:] - entropy[..., :-1]).nan_to_num(nan=0.0)
    improving = (gaps < 0).long().cumprod(dim=-1)
    # The scan compares every gap up to and with the first that does not improve.
    compared = torch.cat([torch.ones_like(improving[..., :1]), improving[..., :-1]], dim=-1).bool()
    return gaps.abs().masked_fill(~compared, float("inf")).amin(dim=-1)


def logit_scale(logits: Tensor) -> Tensor:
    """The largest magnitude in each row of logits `[..., V]`, `[..., 1]` float32."""
    return logits.float().abs().amax(dim=-1, keepdim=True)


def measure_scale(measure: str, values: Tensor, scale: Tensor, vocabulary: int) -> Tensor:
    """On what scale a measure is rounded: that of its logits, and how much it changes where they do.

    An entropy changes by as much as they do, about; m = -sum (log p)^2 by 2 sum |log p| times that, which is at most
    2 sqrt(V |m|) (Cauchy and Schwarz).

    Args:
        measure: its name.
        values: `[..., M]`, what was measured.
        scale: `[..., 1]`, the largest magnitude of the row's logits.
        vocabulary: V.

    Returns:
        `[..., M]`, at least 1.
    """
    changes = torch.ones_like(values) if measure == "entropy" else 2 * (vocabulary * values.abs()).sqrt()
    return (scale.clamp(min=1) * changes).clamp(min=1)


def _scale(truth: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    return logit_scale(truth[1]) if scale is None else scale


def _relative(found: Tensor, truth: Tensor, scale: Tensor) -> float:
    """The largest difference, in parts of its row's largest logit."""
    return _largest((found.double() - truth.double()) / scale)


def _largest(difference: Tensor) -> float:
    """The largest magnitude; NaN counts as infinitely far, nothing as 0."""
    return float(difference.abs().nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
