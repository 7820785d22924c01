"""Logits -> how uncertain they are: Shannon entropy in nats, exact to float32 down to 1e-7 nats.

Two thirds of all tokens have a final entropy below 0.01 nats and the trough rule compares two such numbers, so the
arithmetic is part of the method: a careless entropy picks layers by rounding. See `docs/numerics.md`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Measure = Callable[[Tensor], Tensor]

# Logits that a CPU measures at a time: the dozen operations of an entropy then find in its caches what the one before
# left there. Rows together take 1.4 (V = 8,000) to 4 times as long (V = 152,000), on two cores.
CACHED_LOGITS = 1 << 18


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits).

    With u = z - max z and, over every entry but one argmax, s = sum e^u and t = sum e^u u:

        H = log(1 + s) - t / (1 + s)

    Leaving the maximum out keeps the small terms that `logsumexp(z) - sum p z` cancels away: both summands are
    positive, so the relative error stays near 2e-7 where the textbook form has lost every digit.

    Args:
        logits: `[..., V]`, float32, float16 or bfloat16. -inf entries contribute nothing.

    Returns:
        `[...]` float32 in nats, in [0, ln V]; NaN where the row holds a NaN or +inf, or nothing but -inf.
    """
    return entropy_of_sums(*partial_sums(logits))


def partial_sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the entropy needs to know of a row, or of a part of one.

    Args:
        logits: `[..., V]`, float32, float16 or bfloat16.

    Returns:
        the maximum, s and t of `entropy`, `[...]` float32 each. s and t mean nothing where the maximum is not finite.
    """
    if not torch.compiler.is_compiling() and logits.is_cpu and logits.numel() > CACHED_LOGITS:
        flat, step = logits.reshape(-1, logits.shape[-1]), max(1, CACHED_LOGITS // logits.shape[-1])
        # Made before the blocks: results kept between two blocks would stand where the second one's logits could go.
        sums = flat.new_empty((3, len(flat)), dtype=torch.float32)
        for begin in range(0, len(flat), step):
            for kind, part in enumerate(_sums_at_once(flat[begin : begin + step])):
                sums[kind, begin : begin + step] = part
        maximum, s, t = sums.view(3, *logits.shape[:-1])
        return maximum, s, t
    return _sums_at_once(logits)


def _sums_at_once(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.float()
    top = z.argmax(dim=-1, keepdim=True)
    # The maximum is read where argmax points, not by a second reduction: runtimes differ in which of the two skips a
    # NaN, and a NaN that one of them hides would leave a broken row with an entropy.
    maximum = z.gather(-1, top)
    u, lost = _subtract(z, maximum)
    e = u.scatter(-1, top, float("-inf")).exp()
    # Where e is 0, u may be -inf and the products NaN. A NaN in e is not 0, so a broken row stays broken.
    e = torch.where(e == 0, 0.0, e + e * lost)
    return maximum.squeeze(-1), e.sum(dim=-1), torch.where(e == 0, 0.0, e * u).sum(dim=-1)


def merged_sums(maximum: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of whole rows from those of their parts.

    A part whose maximum is d below the row's counts e^d of it, and its own maximum becomes one entry more:

        s += e^d (1 + s'),  t += e^d (t' + d (1 + s'))

    Args:
        maximum, s, t: `[parts, ...]` float32, as `partial_sums` gives them.

    Returns:
        The same of the rows, `[...]`.
    """
    top = maximum.argmax(dim=0, keepdim=True)
    highest = maximum.gather(0, top)
    d, lost = _subtract(maximum, highest)
    e = d.exp()
    # An e of 0 belongs to a part that is all -inf, whose sums are NaN, or to one too far below to count.
    e = torch.where(e == 0, 0.0, e + e * lost)
    mass = torch.where(e == 0, 0.0, e * (1 + s))
    leading = torch.zeros_like(e, dtype=torch.bool).scatter(0, top, True)  # its maximum is left out of s
    merged = torch.where(leading, s, mass).sum(dim=0)
    return highest.squeeze(0), merged, torch.where(e == 0, 0.0, e * t + d * mass).sum(dim=0)


def entropy_of_sums(maximum: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """`[...]` float32 nats from the sums of whole rows; NaN where the maximum is not finite."""
    # A row with +inf must never look certain. A comparison says so: graph compilers take max - max for 0.
    return torch.where(maximum.abs() < float("inf"), _log1p(s) - t / (1 + s), float("nan"))


def _log1p(x: Tensor) -> Tensor:
    """log(1 + x) for x >= 0, to float32's last digits, in operations that every runtime has.

    ONNX has no Log1p, and torch.log1p exports as Log(1 + x), which is 0 for x below 6e-8. The quotient undoes what
    rounding 1 + x did (Goldberg, What Every Computer Scientist Should Know About Floating-Point Arithmetic, theorem 4).
    """
    w = 1 + x
    return torch.where(w == 1, x, w.log() * (x / torch.where(w == 1, 1.0, w - 1)))


def _subtract(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b as (rounded, what rounding lost), exactly: TwoSum (Knuth, TAOCP 2, section 4.2.2, theorem B).

    At u = -17 half a unit in the last place is 1e-6, and e^u turns it into a relative error of that size.
    """
    rounded = a - b
    minus_b = rounded - a
    return rounded, (a - (rounded - minus_b)) - (b + minus_b)


def log_p_squared(logits: Tensor) -> Tensor:
    """-sum (log p)^2: what the authors' published vLLM overlay ranks layers by, kept for comparison only.

    Its `q * q.log_()` writes log q over q before multiplying, so the product is (log q)^2 and not q log q. The most
    *spread* tail of tiny probabilities wins, which is not confidence.
    https://github.com/QwenLM/Confident-Decoding

    Args:
        logits: `[..., V]`, float32, float16 or bfloat16.

    Returns:
        `[...]` float32, nats squared, in (-inf, 0]; -inf where a logit is -inf, NaN where one is NaN or +inf.
    """
    return -logits.float().log_softmax(dim=-1).square().sum(dim=-1)


MEASURES: dict[str, Measure] = {"entropy": entropy, "log_p_squared": log_p_squared}
