"""Rows and an unembedding on a GPU -> the sums of their logits: how the work is cut for the kernels of `tiles`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cdsurgery.kernels.tiles import measure_tiles, merge_tiles

TILE, WIDTH = 128, 64  # entries of the vocabulary, and products added up at a time
# Blocks of rows that share a tile through the L2 cache: at 128 rows of 4,096 numbers of 2 bytes they take 16 MB of its
# 50 MB on an H100, and one more reading of W_U for 2,048 rows is a tenth of what multiplying them takes.
GROUP = 16


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start both kernels, on tensors as `unembed_sums` takes them.

    Args:
        products: `[written, V]` to be filled, contiguous.

    Returns:
        maximum, index, s and t, `[R]`, as of `unembed_sums`.
    """
    (rows, width), vocabulary = state.shape, len(weight)
    state = state.contiguous()
    tiles = triton.cdiv(vocabulary, TILE)
    block, warps, stages = block_of_rows(rows, state.dtype)
    with torch.cuda.device_of(state):  # Triton starts kernels on the current device
        partial = torch.empty(3, rows, tiles, dtype=torch.float32, device=state.device)
        partial_index = torch.empty(rows, tiles, dtype=torch.int32, device=state.device)
        maximum, s, t = torch.empty(3, rows, dtype=torch.float32, device=state.device)
        index = torch.empty(rows, dtype=torch.int64, device=state.device)
        if rows == 0:
            return maximum, index, s, t
        measure_tiles[(triton.cdiv(rows, block) * tiles,)](
            state,
            weight,
            bias,
            products,
            partial[0],
            partial_index,
            partial[1],
            partial[2],
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
            partial[0],
            partial_index,
            partial[1],
            partial[2],
            active,
            maximum,
            index,
            s,
            t,
            tiles,
            BLOCK=triton.next_power_of_2(tiles),
            enable_fp_fusion=False,
        )
    return maximum, index, s, t


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
