"""Candidates one after another, each in the rows that still descend -> the same trough, from depth + 1 of K rows.

The scan of a row ends at the first layer that does not lower its entropy, so what lies before that layer need not be
projected. That takes a look at values between two layers, which a traced, exported or captured graph cannot have;
`cdsurgery.trough.select` measures all candidates at once for those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cdsurgery.entropy import Measure

# Rows that an accelerator multiplies while it reads the unembedding: a weight of 2 bytes makes 2 operations a row, and
# an H200 does 790e12 operations for every 4.3e12 bytes that it reads. Computed, and not yet measured on one.
ACCELERATOR_FREE_ROWS = 184

# (k, rows `[B, T]` bool) -> `[R, V]`, the logits of layer L-k in the R rows that are true.
Project = Callable[[int, Tensor], Tensor]


def can_look(device: torch.device) -> bool:
    """Whether code may go by values of tensors on that device: not in a graph that is being compiled or captured."""
    return not torch.compiler.is_compiling() and not (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    )


def fewer_rows_pay(device: torch.device, rows: int) -> bool:
    """Whether multiplying fewer rows pays for one more reading of the unembedding.

    Each look is one more reading, as of that many rows some nearly always go on. So on an accelerator it pays once
    multiplying all rows takes as long as two readings.

    Args:
        device: of the unembedding.
        rows: M x B x T, all that there are.
    """
    return device.type == "cpu" or rows > 2 * ACCELERATOR_FREE_ROWS


def select_lazily(
    final: Tensor, project: Project, lookback: int, measure: Measure, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `select` finds, measuring no candidate that the scan does not reach.

    Args:
        final: `[B, T, V]` logits of layer L.
        project: makes those of layer L-k, k in [1, K].
        lookback: K.
        measure, allowed: as for `select`.

    Returns:
        logits `[B, T, V]`, depth `[B, T]` int64 in [0, K], entropy `[B, T, M]` float32, NaN where nothing was measured:
        behind the first layer that did not lower it.
    """
    first = measure(final.detach())
    entropy = first.new_full((*first.shape, lookback + 1), float("nan"))
    entropy[..., 0] = first
    logits, depth = final, torch.zeros(first.shape, dtype=torch.int64, device=final.device)
    rows = torch.ones_like(depth, dtype=torch.bool) if allowed is None else allowed
    for k in range(1, lookback + 1 if rows.any() else 1):
        candidate = project(k, rows)
        measured = measure(candidate.detach())
        lower = measured < entropy[..., k - 1][rows]
        entropy[..., k][rows] = measured
        if not lower.any():
            break
        rows = rows.masked_scatter(rows, lower)
        if k == 1:
            logits = final.clone()  # the final logits are returned beside them
        logits[rows] = candidate[lower]
        depth[rows] = k
    return logits, depth, entropy
