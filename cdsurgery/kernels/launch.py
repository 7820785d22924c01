"""How work on a GPU is cut for the kernels: rows and an unembedding for `tiles`, picked rows for `troughs`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cdsurgery.kernels.tiles import measure_tiles, merge_tiles
from cdsurgery.kernels.troughs import compact_rows, pick_further_rows, pick_rows

TILE, WIDTH = 128, 64  # entries of the vocabulary, and products added up at a time
# Blocks of rows that share a tile through the L2 cache: at 128 rows of 4,096 numbers of 2 bytes they take 16 MB of its
# 50 MB on an H100, and one more reading of W_U for 2,048 rows is a tenth of what multiplying them takes.
GROUP = 16
PART = 2048  # entries of the vocabulary that a program copies


def launch(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    widened: bool,
    counted: int,
    active: Tensor | None,
    products: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Start both kernels, on tensors as `unembed_sums` takes them.

    Args:
        products: `[written, V]` to be filled, contiguous.

    Returns:
        entropy, maximum, index, s and t, `[R]`, as of `unembed_sums`.
    """
    (rows, width), vocabulary = state.shape, len(weight)
    state = state.contiguous()
    tiles = triton.cdiv(vocabulary, TILE)
    block, warps, stages = block_of_rows(rows, state.dtype)
    with torch.cuda.device_of(state):  # Triton starts kernels on the current device
        # Each in memory of its own: an operator's results may not share any, and kernels are compiled anew for tensors
        # that do not begin at a multiple of 16 bytes.
        tile_maximum, tile_s, tile_t = (state.new_empty((rows, tiles), dtype=torch.float32) for _ in range(3))
        tile_index = state.new_empty((rows, tiles), dtype=torch.int32)
        entropy, maximum, s, t = (state.new_empty(rows, dtype=torch.float32) for _ in range(4))
        index = state.new_empty(rows, dtype=torch.int64)
        if rows == 0:
            return entropy, maximum, index, s, t
        measure_tiles[(triton.cdiv(rows, block) * tiles,)](
            state,
            weight,
            bias,
            products,
            tile_maximum,
            tile_index,
            tile_s,
            tile_t,
            active,
            rows,
            len(products),
            vocabulary,
            counted,
            width,
            weight.stride(0),
            scale,
            softcap or 0.0,
            SCALED=scale != 1,
            CAPPED=softcap is not None,
            WIDENED=widened,
            WHOLE=width % WIDTH == 0,
            BLOCK_R=block,
            BLOCK_V=TILE,
            BLOCK_D=WIDTH,
            GROUP=GROUP,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,  # products are rounded before something is subtracted, as in the model
        )
        merge_tiles[(rows,)](
            tile_maximum,
            tile_index,
            tile_s,
            tile_t,
            active,
            entropy,
            maximum,
            index,
            s,
            t,
            tiles,
            BLOCK=triton.next_power_of_2(tiles),
            enable_fp_fusion=False,
        )
    return entropy, maximum, index, s, t


def block_of_rows(rows: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """How many rows a program takes, on how many warps, with how many tiles on their way to it.

    Tensor cores take 16 rows at least. Few rows wait for memory: three tiles of 16 KB on their way, in each of the four
    programs that share a multiprocessor, are more than the 26 KB that keep an H200 busy (4.3 TB/s, 0.8 us until a
    byte arrives, 132 multiprocessors). 128 rows take 64 or 96 KB of shared memory, which the 99 KB of a consumer's card
    still hold. Computed, and not yet measured on a GPU.
    """
    if dtype == torch.float32:  # tiles of twice the bytes, and no tensor cores: on 4 warps registers would not do
        return (16, 8, 2) if rows <= 16 else (32, 8, 2)
    if rows <= 64:
        return max(16, triton.next_power_of_2(rows)), 4, 4
    return 128, 8, 3


def launch_pick(entropy: Tensor, products: Tensor, allowed: Tensor | None, depth: Tensor, chosen: Tensor) -> None:
    """Start the kernel of `pick_trough`, on tensors as that takes them, and on its two results, which are filled."""
    (layers, rows), vocabulary = entropy.shape, products.shape[1]
    if chosen.numel() == 0:
        return
    with torch.cuda.device_of(entropy):  # Triton starts kernels on the current device
        pick_rows[(rows, triton.cdiv(vocabulary, PART))](
            entropy,
            products,
            allowed,
            depth,
            chosen,
            layers,
            rows,
            vocabulary,
            LAYERS=triton.next_power_of_2(layers),
            PART=PART,
            enable_fp_fusion=False,  # there is nothing to fuse, and Triton 3.9 warns where it is not told
        )


def launch_pick_further(
    depth: Tensor,
    chosen: Tensor,
    entropy: Tensor,
    place: Tensor,
    deeper: Tensor,
    products: Tensor,
    new_depth: Tensor,
    new_entropy: Tensor,
) -> None:
    """Start the kernel of `pick_further`, on tensors as that takes them, and on its two results, which are filled."""
    rows, layers = deeper.shape
    if chosen.numel() == 0:
        return
    with torch.cuda.device_of(entropy):
        pick_further_rows[(rows, triton.cdiv(chosen.shape[1], PART))](
            depth,
            chosen,
            entropy,
            place,
            deeper,
            products,
            new_depth,
            new_entropy,
            len(entropy) - 1,
            layers,
            rows,
            chosen.shape[1],
            LAYERS=triton.next_power_of_2(len(new_entropy)),
            PART=PART,
            enable_fp_fusion=False,
        )


def launch_compact(counts: Tensor, order: Tensor, place: Tensor, active: Tensor) -> None:
    """Start the kernel of `compact`, on rows as that takes them, and on its three results, which are filled."""
    rows = len(counts)
    with torch.cuda.device_of(counts):
        compact_rows[(1,)](
            counts, order, place, active, rows, ROWS=triton.next_power_of_2(max(rows, 1)), enable_fp_fusion=False
        )
