"""Seed, position and token -> does this row take the trough? The stochastic fallback of Algorithm 1, line 12.

One draw per row, from a counter instead of a generator's state: the answer depends on the seed, the row's position in
its text and the row's token, never on its neighbours, on padding or on how the text was cut into steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def allowed_rows(probability: float, seed: int, tokens: Tensor, positions: Tensor) -> Tensor:
    """True, with the given probability, where the row may leave the final layer.

    Args:
        probability: in [0, 1].
        seed: any non-negative integer.
        tokens, positions: `[B, T]` integers; what the row read, and where it stands in its text (0 is first).

    Returns:
        `[B, T]` bool.
    """
    counter = _mix(positions.long() + _mix(torch.full_like(positions, seed, dtype=torch.int64)))
    return _mix(counter + tokens.long()) < round(probability * 2**32)


def text_positions(inputs: dict[str, Any], tokens: Tensor, start: int = 0) -> Tensor:
    """Where each of this call's tokens stands in its text, as transformers counts: padding does not count.

    Args:
        inputs: the keyword arguments of a causal LM's forward; `position_ids` wins, then a two-dimensional
            `attention_mask`, then the length of `past_key_values`.
        tokens: `[B, S]`, for its shape and device.
        start: where the first of them stands if none of these says.

    Returns:
        `[B, S]` int64.
    """
    batch, length = tokens.shape
    positions = inputs.get("position_ids")
    mask = inputs.get("attention_mask")
    if positions is not None:
        if positions.ndim == 3:  # multimodal rotary positions, [3, B, S]: the first row is the text's
            positions = positions[0]
        return positions.expand(batch, length)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    past = inputs.get("past_key_values")
    start = start if past is None else past.get_seq_length()
    return (torch.arange(length, device=tokens.device) + start).expand(batch, length)


def _mix(x: Tensor) -> Tensor:
    """Scramble the low 32 bits of int64 counters (lowbias32, https://github.com/skeeto/hash-prospector).

    Division by a power of two stands for the right shift, which ONNX defines for unsigned types only.
    """
    x = x & _MASK
    x = x ^ (x // 2**16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x // 2**15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x // 2**16)
