"""A few rows -> their logits on a CPU, at the speed at which memory gives the unembedding.

PyTorch multiplies one row with a float32 matrix on one core, and a few rows slower than one. `W @ x.T` is as quick as
reading W for up to three of them, and oneDNN, which PyTorch carries and does not use for float32, for more. Of a W
`[151936, 1024]` on two cores (`python -m benchmarks unembedding --batch 1`, 2, 4, 11; milliseconds):

| rows | `x @ W.T` | `W @ x.T` | `few_rows_linear` | reading W |
|---|---|---|---|---|
| 1 | 37 | 20 | 21 | 21 |
| 2 | 84 | 21 | 21 | 23 |
| 4 | 118 | 48 | 32 | 22 |
| 11 | 140 | 91 | 39 | 22 |

The logits differ in their last bits, so only scan='fused' computes final logits like this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy

ONEDNN_ROWS = 4


class OpenLinear(nn.Linear):
    """A linear layer whose product may be made by another.

    Attributes:
        instead: `[..., D]` -> `[..., V]`, or None where the layer is to make it after all.
    """

    instead: Callable[[Tensor], Tensor | None] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`."""
        product = None if self.instead is None else self.instead(input)
        return super().forward(input) if product is None else product


def few_rows_unembedding(model: PreTrainedModel, anatomy: Anatomy) -> Callable[[Tensor], Tensor] | None:
    """`[..., D]` -> `[..., V]` as the model's unembedding does it; None where that has to be called itself.

    Which is everywhere but with a plain float32 linear layer on a CPU that has no hooks and its own forward.
    """
    head: Any = model.get_submodule(anatomy.unembedding)
    if linear_flaw(head) is not None or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32:
        return None
    weight, bias = head.weight, head.bias
    if bias is not None and torch.is_autocast_enabled("cpu"):  # which rounds product and bias together
        return None
    return lambda state: few_rows_linear(state.flatten(0, -2), weight, bias).unflatten(0, state.shape[:-1])


def few_rows_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[R, D]`, `[V, D]`, `[V]` or None -> `[R, V]`, all float32 on a CPU, but for the result under an autocast."""
    logits = _product(rows, weight)
    return logits if bias is None else logits + bias


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    recorded = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    special = recorded or torch.is_autocast_enabled("cpu")
    if len(rows) >= ONEDNN_ROWS and not special and torch.backends.mkldnn.is_available():
        # What torch.compile's code calls for a linear layer. It has no derivative, and autocast does not know it.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
        return product
    several = rows.expand(2, -1).contiguous() if len(rows) == 1 else rows  # one alone is a matrix-vector product
    return (weight @ several.T).T[: len(rows)]


def linear_flaw(head: Any) -> str | None:
    """What keeps a module from being computed as the product of its weight; None for a plain linear layer."""
    weight = getattr(head, "weight", None)
    if type(head) not in (nn.Linear, OpenLinear) or type(weight) is not nn.Parameter:
        return f"it is a {_name(head)} whose weight is a {_name(weight)}"
    if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        return "its forward is hooked or replaced, as accelerate does to offload weights"
    return None


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
