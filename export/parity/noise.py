"""What `verify` measured of an artifact that rounds its activations -> how noisy it is, and whether that is all it is.

int8 rounds the input of each product to 255 steps between its least and largest number. PyTorch cannot repeat that to
the last digit: one step more or less in a million, and all that follows differs. So what such an artifact must be is no
noisier than PyTorch is when it rounds the same inputs in the same way. A weight, scale or layer that is wrong adds far
more. What does not hang on the noise is held exactly: that scan and output read one head, and select by what they saw.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdsurgery.export.parity.report import logit_scale
from cdsurgery.trough import trough_depth

# Noise of the same kind, on other rows: tiny models of 4 to 16 layers were measured at 0.7 to 1.1 of what is expected.
LARGEST_RATIO = 2.0
# Entropies that the graph returned against those of the logits that it returned: one runtime, two orders of summation.
ENTROPY = 1e-5


@dataclass
class NoiseReport:
    """How far an int8 artifact is from the model under the same weights.

    Attributes:
        depth: L, the layers of the model.
        expected: noise of the model itself when its activations are rounded, in PyTorch; as `noise`.
        measure: what the scan compares, of logits `[R, V]`.
        rows: rows compared; moved: those whose selected layer is not the final one; equal: those where both select one.
        error, signal: sums over rows of |z - z'|^2 and of |z - mean z|^2, of final logits.
        relative, relative_max: mean and largest difference of a final logit, in parts of its row's largest.
        divergence, divergence_max: mean and largest KL(PyTorch || artifact) of the final distributions, nats.
        entropy: largest difference of a returned entropy from that of the returned logits, in parts of the largest.
        inconsistent: rows whose layer does not follow from the entropies.
        texts, tokens, tokens_equal: greedy texts; tokens compared, up to and with the first that differs in each.
    """

    depth: int
    expected: float
    measure: Callable[[Tensor], Tensor]
    rows: int = 0
    moved: int = 0
    equal: int = 0
    error: float = 0.0
    signal: float = 0.0
    relative: float = 0.0
    relative_max: float = 0.0
    divergence: float = 0.0
    divergence_max: float = 0.0
    entropy: float = 0.0
    inconsistent: int = 0
    texts: int = 0
    tokens: int = 0
    tokens_equal: int = 0

    @property
    def noise(self) -> float:
        """Root mean square of the final logits' error, in parts of that of the centred logits."""
        return (self.error / self.signal) ** 0.5 if self.signal else float("inf")

    @property
    def passed(self) -> bool:
        """No noisier than rounded activations are, and consistent in itself."""
        exact = self.inconsistent == 0 and self.entropy <= ENTROPY
        return exact and self.noise <= LARGEST_RATIO * self.expected

    def add_rows(self, found: Sequence[Tensor], truth: Sequence[Tensor], *_unused: Any) -> None:
        """Count R rows in: logits `[R, V]`, final logits `[R, V]`, selected layers `[R]` and entropies `[R, M]`.

        What `Report` is told of scales and routing does not matter here: noise is measured, not excused.
        """
        logits, final, layers, entropy = found
        _, true_final, true_layers, _ = truth
        self.rows += len(layers)
        self.moved += int((layers < self.depth).sum())
        self.equal += int((layers == true_layers).sum())
        self.error += float((final - true_final).square().sum())
        self.signal += float(_centred(true_final).square().sum())
        relative = (final - true_final).abs() / logit_scale(true_final)
        self.relative += float(relative.mean(dim=-1).sum())
        self.relative_max = max(self.relative_max, float(relative.max()))
        log_p, log_q = true_final.log_softmax(dim=-1), final.log_softmax(dim=-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        self.divergence += float(divergence.sum())
        self.divergence_max = max(self.divergence_max, float(divergence.max()))
        self._check_itself(logits, final, layers, entropy)

    def _check_itself(self, logits: Tensor, final: Tensor, layers: Tensor, entropy: Tensor) -> None:
        chosen = entropy.gather(-1, (self.depth - layers)[:, None]).squeeze(-1)
        for spoken, seen in ((logits, chosen), (final, entropy[:, 0])):
            scale = logit_scale(spoken).squeeze(-1).clamp(min=1)
            difference = (self.measure(spoken) - seen).abs() / torch.maximum(scale, seen.abs())
            self.entropy = max(self.entropy, float(difference.nan_to_num(nan=float("inf")).max()))
        # A row that was not allowed to move (probability < 1) keeps the final layer.
        self.inconsistent += int(((layers != self.depth - trough_depth(entropy)) & (layers != self.depth)).sum())

    def add_text(self, equal: int, parting: dict[str, Any] | None) -> None:
        """Count a text in: tokens equal from its beginning, and whether another one came then."""
        self.tokens += equal + (parting is not None)
        self.tokens_equal += equal

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, with means for sums, `noise` and `passed`."""
        values = {name: value for name, value in asdict(self).items() if name not in ("measure", "error", "signal")}
        means = {name: values[name] / max(self.rows, 1) for name in ("relative", "divergence")}
        return {"passed": self.passed, "noise": self.noise} | values | means

    def __str__(self) -> str:
        d = self.to_dict()
        lines = [
            ("noise", f"{self.noise:.1%} of the logits", f"{LARGEST_RATIO * self.expected:.1%}"),
            ("", f"{self.expected:.1%} by rounding in PyTorch", "shown"),
            ("final logits", f"{d['relative']:.1e} mean, {d['relative_max']:.1e} max relative", "shown"),
            ("divergence", f"{d['divergence']:.1e} mean, {d['divergence_max']:.1e} max nats", "shown"),
            ("selected layers", f"{self.equal} of {self.rows} rows equal", "shown"),
            ("rows moved", f"{self.moved} of {self.rows}", "shown"),
            ("greedy tokens", f"{self.tokens_equal} of {self.tokens} equal, {self.texts} texts", "shown"),
            ("own entropies", f"{self.entropy:.1e} relative", f"{ENTROPY:.0e}"),
            ("own selection", f"{self.inconsistent} of {self.rows} rows inconsistent", "0"),
        ]
        table = [f"{'':18}{'found':38}allowed"] + [f"{name:18}{found:38}{allowed}" for name, found, allowed in lines]
        return "\n".join([*table, "passed" if self.passed else "FAILED"])


@torch.no_grad()
def rounding_noise(model: Any, names: Collection[str]) -> float:
    """`NoiseReport.noise` of the model itself when the inputs of its quantised products are rounded.

    Args:
        model: a wrapped model, under the artifact's weights.
        names: of the parameters that the artifact has quantised.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (4, 24), generator=torch.Generator().manual_seed(0)).to(model.device)
    exact = model(ids, use_cache=False).final_logits.float()
    with _rounded_inputs(model, names):
        rounded = model(ids, use_cache=False).final_logits.float()
    return float(((exact - rounded).square().sum() / _centred(exact).square().sum()).sqrt())


@contextmanager
def _rounded_inputs(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Round what every module that multiplies with one of the parameters is given; lookups in a table are exact."""
    weights = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    modules = [module for module in model.modules() if id(getattr(module, "weight", None)) in weights]
    hooks = [
        module.register_forward_pre_hook(lambda _, args: (_rounded(args[0]), *args[1:]))
        for module in modules
        if not isinstance(module, nn.Embedding)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(x: Tensor) -> Tensor:
    """To the nearest of 255 steps, as https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html does."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def _centred(logits: Tensor) -> Tensor:
    """Logits without their row's mean, which no probability hangs on."""
    return logits - logits.mean(dim=-1, keepdim=True)
