"""Entropies and products of M layers' rows -> each row's trough, and its product: `cdsurgery::pick_trough` in PyTorch.

What `cdsurgery.trough` does in seven small operations is one here, for each of those takes two microseconds or three of
a decode step on a GPU, however few numbers it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdsurgery.errors import InvalidInputError
from cdsurgery.trough import allowed_depth


@torch.library.custom_op(
    "cdsurgery::pick_trough",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor entropy, Tensor products, Tensor? allowed=None) -> (Tensor, Tensor)",
)
def pick_trough(entropy: Tensor, products: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first trough of every row, as `cdsurgery.trough.allowed_depth` finds it, and what stands there.

    Args:
        entropy: `[M, R]` float32; index k is of layer L-k. NaN is never an improvement.
        products: `[M R, V]`, contiguous, the rows of layer L first, then those of layer L-1, and so on.
        allowed: `[R]` bool, which rows may leave layer L; None for all.

    Returns:
        depth `[R]` int64 in [0, M-1], and of `products` the rows at those depths, `[R, V]`.

    Raises:
        InvalidInputError: tensors of other shapes, dtypes or strides.
    """
    _check(entropy, products, allowed)
    depth = allowed_depth(entropy.T, allowed)
    rows = torch.arange(len(depth), device=depth.device)
    return depth, products.unflatten(0, entropy.shape)[depth, rows]


@pick_trough.register_kernel("cuda")
def _on_gpu(entropy: Tensor, products: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from cdsurgery.kernels.launch import launch_pick  # imports Triton, which made the entropies

    _check(entropy, products, allowed)
    depth, chosen = _shapes(entropy, products, allowed)
    launch_pick(entropy, products, allowed, depth, chosen)
    return depth, chosen


@pick_trough.register_fake
def _shapes(entropy: Tensor, products: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    rows = entropy.shape[1]
    return entropy.new_empty(rows, dtype=torch.int64), products.new_empty((rows, products.shape[1]))


def _check(entropy: Tensor, products: Tensor, allowed: Tensor | None) -> None:
    fits = entropy.ndim == products.ndim == 2 and len(entropy) > 0 and len(products) == entropy.numel()
    fits = fits and entropy.dtype == torch.float32 and entropy.is_contiguous() and products.is_contiguous()
    if allowed is not None:
        fits = fits and allowed.dtype == torch.bool and allowed.shape == entropy.shape[1:] and allowed.is_contiguous()
    if not fits:
        given = [entropy, products] if allowed is None else [entropy, products, allowed]
        found = ", ".join(f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}" for tensor in given)
        raise InvalidInputError(
            f"pick_trough got {found}. It takes entropies [M, R] in float32, products [M R, V], and a bool [R] or "
            "None, all contiguous."
        )
