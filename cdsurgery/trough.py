"""Entropies of the near-final layers -> which layer speaks: the first trough, scanning back from the end.

Algorithm 1 of Confident Decoding (arXiv 2606.21906, section 4.1) in closed form. Everything here is static tensor
operations, so that it traces, exports and replays in a captured CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdsurgery.entropy import Measure


def trough_depth(entropy: Tensor) -> Tensor:
    """How many layers back from the final one the first trough lies.

    Starting at the final layer, move one layer back while that strictly lowers the entropy; stop at the first layer
    that does not. A comparison with NaN is no improvement, so a broken layer stops the scan and never wins.

    Args:
        entropy: `[..., M]` float, nats; index k is the entropy of layer L-k.

    Returns:
        `[...]` int64 in [0, M-1].
    """
    stopped = ~(entropy[..., 1:] < entropy[..., :-1])
    return (stopped.cumsum(dim=-1) == 0).sum(dim=-1)


def allowed_depth(entropy: Tensor, allowed: Tensor | None) -> Tensor:
    """`trough_depth`, and 0 in rows that have to keep their final layer.

    Args:
        entropy: `[B, T, M]`, as for `trough_depth`.
        allowed: `[B, T]` bool, or None for all.

    Returns:
        `[B, T]` int64 in [0, M-1].
    """
    depth = trough_depth(entropy)
    return depth if allowed is None else depth * allowed


def pick(candidates: Tensor, depth: Tensor) -> Tensor:
    """Take, for every row, the candidate at its depth.

    Args:
        candidates: `[M, B, T, V]`, index k belongs to layer L-k; or any `[M, B, T, ..]`.
        depth: `[B, T]` int64 in [0, M-1].

    Returns:
        `[B, T, V]`, dtype of the candidates; unchosen candidates leave no trace, NaN and inf included.
    """
    batch = torch.arange(depth.shape[0], device=depth.device)[:, None]
    position = torch.arange(depth.shape[1], device=depth.device)[None]
    # Advanced indexing exports as one GatherND with batch and sequence dynamic; take_along_dim freezes both.
    return candidates[depth, batch, position]


def select(candidates: Tensor, measure: Measure, allowed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Measure all candidates, find each row's trough, and return its logits.

    Args:
        candidates: `[M, B, T, V]` logits; index k belongs to layer L-k.
        measure: `[..., V]` logits -> `[...]` float32, lower is more confident.
        allowed: `[B, T]` bool, or None for all; a row that is not allowed keeps its final layer.

    Returns:
        logits `[B, T, V]`, depth `[B, T]` int64 in [0, M-1], entropy `[B, T, M]` float32.
    """
    entropy = measure(candidates.detach()).movedim(0, -1)
    depth = allowed_depth(entropy, allowed)
    return pick(candidates, depth), depth, entropy


def select_beside(
    final: Tensor, earlier: Tensor, measure: Measure, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`select` where the final logits are not one tensor with the others, and are not made one: those may be gigabytes.

    Args:
        final: `[B, T, V]` logits of layer L.
        earlier: `[K, B, T, V]` logits; index k belongs to layer L-k-1.
        measure, allowed: as of `select`.

    Returns:
        As `select`.
    """
    measured = [measure(final.detach())[None], measure(earlier.detach())]
    entropy = torch.cat(measured).movedim(0, -1)
    depth = allowed_depth(entropy, allowed)
    chosen = pick(earlier, (depth - 1).clamp(min=0))
    return torch.where((depth > 0)[..., None], chosen, final), depth, entropy
