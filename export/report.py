"""What `verify` measured -> whether it is within tolerance, as a table and as JSON."""

from __future__ import annotations

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
TOLERANCES = {"float32": Tolerance(1e-5, 1e-5), "float16": Tolerance(1e-2, 1e-3)}


@dataclass
class Report:
    """What was compared, and how far apart it was.

    Attributes:
        tolerance: what was allowed.
        depth: L, the layers of the model.
        rows: rows compared; excluded: those of them too close to call.
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

    @property
    def passed(self) -> bool:
        """Everything within its tolerance, and something was compared."""
        t = self.tolerance
        close = self.final_logits <= t.logits and self.logits <= t.logits and self.entropy <= t.entropy
        return close and self.layers == 0 and self.rows > self.excluded and all(p["explained"] for p in self.partings)

    def add_rows(self, found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
        """Count R rows in: logits `[R, V]`, final logits `[R, V]`, selected layers `[R]` and entropies `[R, M]`.

        Too close to call is a row whose scan compared two entropies that lie no farther apart than twice what the two
        runtimes differ by in this row: either layer is right. On all others the layers must be equal.
        """
        logits, final_logits, layers, entropy = found
        true_logits, true_final_logits, true_layers, true_entropy = truth
        nats = (entropy - true_entropy).abs()
        clear = scan_margin(true_entropy) > 2 * nats.amax(dim=-1)
        self.rows += len(layers)
        self.excluded += int((~clear).sum())
        self.moved += int((layers < self.depth).sum())
        self.final_logits = max(self.final_logits, _relative(final_logits, true_final_logits))
        self.logits = max(self.logits, _relative(logits[clear], true_logits[clear]))
        self.entropy = max(self.entropy, _largest(nats / logit_scale(true_final_logits).clamp(min=1)))
        self.entropy_nats = max(self.entropy_nats, _largest(nats))
        self.layers += int((layers != true_layers)[clear].sum())

    def add_text(self, equal: int, parting: dict[str, Any] | None) -> None:
        """Count a text in: tokens equal from its beginning, and what the first other one hung on, if there is one."""
        self.tokens += equal + (parting is not None)
        self.tokens_equal += equal
        if parting is not None:
            near_layer = parting["layer_margin"] <= 2 * self.tolerance.entropy
            near_token = parting["token_margin"] <= 2 * self.tolerance.logits
            self.partings.append(parting | {"step": equal, "explained": near_layer or near_token})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, with `passed`."""
        return {"passed": self.passed} | asdict(self)

    def __str__(self) -> str:
        t = self.tolerance
        lines = [
            ("final logits", f"{self.final_logits:.1e} relative", f"{t.logits:.0e}"),
            ("selected logits", f"{self.logits:.1e} relative", f"{t.logits:.0e}"),
            ("entropies", f"{self.entropy:.1e} relative, {self.entropy_nats:.1e} nats", f"{t.entropy:.0e}"),
            ("selected layers", f"{self.layers} of {self.rows - self.excluded} rows differ", "0"),
            ("too close to call", f"{self.excluded} of {self.rows} rows ({_share(self.excluded, self.rows)})", "shown"),
            ("rows moved", f"{self.moved} of {self.rows} ({_share(self.moved, self.rows)})", "shown"),
            ("greedy tokens", f"{self.tokens_equal} of {self.tokens} equal, {self.texts} texts", "or explained"),
        ]
        table = [f"{'':18}{'found':38}allowed"] + [f"{name:18}{found:38}{allowed}" for name, found, allowed in lines]
        for parting in self.partings:
            verdict = "explained" if parting["explained"] else "NOT explained"
            table.append(
                f"text {parting['text']} parts at token {parting['step']}: layer margin {parting['layer_margin']:.1e} "
                f"relative, token margin {parting['token_margin']:.1e} relative: {verdict}"
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


def _relative(found: Tensor, truth: Tensor) -> float:
    """The largest difference, in parts of its row's largest logit."""
    return _largest((found.float() - truth.float()) / logit_scale(truth))


def _largest(difference: Tensor) -> float:
    """The largest magnitude; NaN counts as infinitely far, nothing as 0."""
    return float(difference.abs().nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
