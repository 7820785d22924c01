"""Three ways to compute the same entropy in float32 -> how wrong each is, against float64.

python examples/entropy_accuracy.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdsurgery.entropy import entropy

VOCABULARY, ROWS = 32768, 16


def textbook(z: Tensor) -> Tensor:
    """logsumexp(z) - sum p z."""
    return z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)


def shifted(z: Tensor) -> Tensor:
    """log S - T / S with S = sum e^u, T = sum e^u u, u = z - max z."""
    u = z - z.amax(-1, keepdim=True)
    e = u.exp()
    return e.sum(-1).log() - (e * u).sum(-1) / e.sum(-1)


def main() -> None:
    """Print one row per gap between the best token and the rest."""
    forms = {"logsumexp - sum p z": textbook, "log S - T/S, shifted": shifted, "cdsurgery": entropy}
    print("largest relative error of H in float32 over", ROWS, "rows, V =", VOCABULARY)
    print(f"{'H (nats)':>10}", *(f"{name:>22}" for name in forms))
    generator = torch.Generator().manual_seed(0)
    for gap in (10, 14, 18, 22, 26):
        z = torch.randn(ROWS, VOCABULARY, generator=generator)
        z[:, 0] = z[:, 1:].amax(-1) + gap
        log_p = z.double().log_softmax(-1)
        truth = -(log_p.exp() * log_p).sum(-1)
        errors = [((form(z).double() - truth).abs() / truth).max().item() for form in forms.values()]
        print(f"{truth.mean():10.1e}", *(f"{error:22.1e}" for error in errors))


if __name__ == "__main__":
    main()
