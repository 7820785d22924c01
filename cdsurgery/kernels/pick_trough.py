"""Entropies and products of several layers' rows -> each row's trough, and its product, as operators of PyTorch.

What `cdsurgery.trough` does in seven small operations is one here: on a GPU each takes two microseconds or three of a
decode step, however few numbers it has. `pick_trough` is for a first reading of the unembedding, `pick_further` for a
later one, of the rows that go on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdsurgery.errors import InvalidInputError
from cdsurgery.trough import allowed_depth, trough_depth

DEVICES = ("cpu", "cuda")


@torch.library.custom_op(
    "cdsurgery::pick_trough",
    mutates_args=(),
    device_types=DEVICES,
    schema="(Tensor entropy, Tensor products, Tensor? allowed=None) -> (Tensor, Tensor)",
)
def pick_trough(entropy: Tensor, products: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first trough of every row, as `cdsurgery.trough.allowed_depth` finds it, and what stands there.

    Args:
        entropy: `[A, R]` float32; index k is of layer L-k. NaN is never an improvement.
        products: `[A R, V]`, the rows of layer L first, then those of layer L-1, and so on.
        allowed: `[R]` bool, which rows may leave layer L; None for all.

    Returns:
        depth `[R]` int64 in [0, A-1], and of `products` the rows at those depths, `[R, V]`.

    Raises:
        InvalidInputError: tensors of other shapes or dtypes, or not contiguous.
    """
    fits = entropy.ndim == products.ndim == 2 and len(entropy) > 0 and len(products) == entropy.numel()
    fits = fits and entropy.dtype == torch.float32
    fits = fits and (allowed is None or (allowed.dtype, allowed.shape) == (torch.bool, entropy.shape[1:]))
    _check("pick_trough", fits, (entropy, products, allowed), "[A, R] in float32, [A R, V], and a bool [R] or None")
    if entropy.is_cuda:
        from cdsurgery.kernels.launch import launch_pick  # imports Triton, as did what made the entropies

        depth, chosen = _picked(entropy, products, allowed)
        launch_pick(entropy, products, allowed, depth, chosen)
        return depth, chosen
    depth = allowed_depth(entropy.T, allowed)
    return depth, products.unflatten(0, entropy.shape)[depth, torch.arange(len(depth))]


@pick_trough.register_fake
def _picked(entropy: Tensor, products: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    rows = entropy.shape[1]
    return entropy.new_empty(rows, dtype=torch.int64), products.new_empty((rows, products.shape[1]))


@torch.library.custom_op(
    "cdsurgery::pick_further",
    mutates_args=("chosen",),
    device_types=DEVICES,
    schema="(Tensor depth, Tensor(a!) chosen, Tensor entropy, Tensor place, Tensor deeper, Tensor products)"
    " -> (Tensor, Tensor)",
)
def pick_further(
    depth: Tensor, chosen: Tensor, entropy: Tensor, place: Tensor, deeper: Tensor, products: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of rows that went as far as had been read, now that more layers have been.

    Args:
        depth: `[R]` int64; rows with depth A-1 go on, the others stay.
        chosen: `[R, V]`, what stands at those depths; changed in place where a row moves further.
        entropy: `[A, R]` float32, what has been read.
        place: `[R]` int64, where each row stands in what follows.
        deeper: `[R, B]` float32, the entropies of the next B layers.
        products: `[R B, V]`, all layers of one row, then those of the next one.

    Returns:
        depth `[R]` int64 in [0, A-1+B], and entropy `[A+B, R]` float32, NaN in the new layers of rows that stay.

    Raises:
        InvalidInputError: as of `pick_trough`.
    """
    rows = len(depth)
    fits = [tensor.ndim for tensor in (depth, chosen, entropy, place, deeper, products)] == [1, 2, 2, 1, 2, 2]
    fits = fits and [len(chosen), entropy.shape[1], len(place), len(deeper)] == [rows] * 4 and len(entropy) > 0
    fits = fits and (len(products), products.dtype) == (deeper.numel(), chosen.dtype)
    fits = fits and products.shape[1] == chosen.shape[1] and depth.dtype == place.dtype == torch.int64
    fits = fits and entropy.dtype == deeper.dtype == torch.float32
    expected = "int64 [R], [R, V], float32 [A, R], int64 [R], float32 [R, B], and [R B, V] of the second's dtype"
    _check("pick_further", fits, (depth, chosen, entropy, place, deeper, products), expected)
    if entropy.is_cuda:
        from cdsurgery.kernels.launch import launch_pick_further

        new_depth, new_entropy = _picked_further(depth, chosen, entropy, place, deeper, products)
        launch_pick_further(depth, chosen, entropy, place, deeper, products, new_depth, new_entropy)
        return new_depth, new_entropy
    reached = len(entropy) - 1
    goes = depth == reached
    read = torch.where(goes[:, None], deeper[place], float("nan")).T
    new_depth = torch.where(goes, reached + trough_depth(torch.cat([entropy[-1:], read]).T), depth)
    moved = (new_depth > reached).nonzero().flatten()
    chosen[moved] = products.unflatten(0, deeper.shape)[place[moved], new_depth[moved] - reached - 1]
    return new_depth, torch.cat([entropy, read])


@pick_further.register_fake
def _picked_further(
    depth: Tensor, chosen: Tensor, entropy: Tensor, place: Tensor, deeper: Tensor, products: Tensor
) -> tuple[Tensor, Tensor]:
    layers = entropy.shape[0] + deeper.shape[1]
    return torch.empty_like(depth), entropy.new_empty((layers, entropy.shape[1]))


def _check(name: str, fits: bool, given: tuple[Tensor | None, ...], expected: str) -> None:
    tensors = [tensor for tensor in given if tensor is not None]
    if not fits or not all(tensor.is_contiguous() for tensor in tensors):
        found = ", ".join(f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}" for tensor in tensors)
        raise InvalidInputError(f"{name} got {found}. It takes {expected}, all contiguous.")
