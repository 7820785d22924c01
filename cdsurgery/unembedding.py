"""A few rows -> their logits on a CPU, at the speed at which memory gives the unembedding.

PyTorch multiplies one row with a float32 matrix on one core, and a few rows slower than one. On two cores, of a W
`[151936, 1024]` that takes 20 ms to be read, `x @ W.T` took 35 ms for one row, 79 for two and 126 for eleven, `W @ x.T`
19, 19 and 87 (`python -m benchmarks unembedding --batch 1`, 2, 11). The logits differ in their last bits, so the
model's own final logits are never computed like this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy


def few_rows_unembedding(model: PreTrainedModel, anatomy: Anatomy) -> Callable[[Tensor], Tensor] | None:
    """`[..., D]` -> `[..., V]` as the model's unembedding does it; None where it is to be called itself.

    It is, unless it is a plain linear layer in float32 on a CPU that nobody watches or has replaced the forward of.
    """
    head: Any = model.get_submodule(anatomy.unembedding)
    if linear_flaw(head) is not None or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32:
        return None
    weight, bias = head.weight, head.bias

    def unembed(state: Tensor) -> Tensor:
        rows = state.flatten(0, -2)
        several = rows if len(rows) > 1 else rows.expand(2, -1).contiguous()  # one alone is a matrix-vector product
        logits = (weight @ several.T).T[: len(rows)]
        return (logits if bias is None else logits + bias).unflatten(0, state.shape[:-1])

    return unembed


def linear_flaw(head: Any) -> str | None:
    """What keeps a module from being computed as the product of its weight; None for a plain linear layer."""
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or type(weight) is not nn.Parameter:
        return f"it is a {_name(head)} whose weight is a {_name(weight)}"
    if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        return "its forward is hooked or replaced, as accelerate does to offload weights"
    return None


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
