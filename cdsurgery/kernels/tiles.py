"""Rows times tiles of the unembedding -> maximum, its index, s and t of the logits, in OpenAI's Triton language.

`measure_tiles` multiplies a block of rows with a tile of the vocabulary, writes the products of the rows that are
wanted, makes logits of them in registers, and writes four numbers a row and tile; `merge_tiles` makes those of whole
rows. W_U is read once for a block of rows, and blocks that follow each other read the same tile of it, which is then
still in the L2 cache. The order of programs is that of Triton's tutorial on matrix products, and merging sums of parts
is the online softmax of Milakov and Gimelshein (arXiv 1805.02867), here for the form of entropy that
`cdsurgery.entropy` explains.

Importing this module imports `triton`, which `cdsurgery` alone does not need.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "written"])
def measure_tiles(
    state,  # [rows, width], contiguous
    weight,  # [vocabulary, width], contiguous along the width
    bias,  # [vocabulary], or None
    products,  # [written, vocabulary]
    maximum,  # [rows, tiles] float32, as are s and t
    index,  # [rows, tiles] int32
    s,
    t,
    active,  # int64, how many of the first rows there is anything to do for; None for all
    rows,
    written,  # rows whose products are kept: the first ones
    vocabulary,
    counted,  # entries of the vocabulary that are measured: the first ones
    width,
    weight_stride,
    scale,  # float32, as is softcap
    softcap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDENED: tl.constexpr,  # whether what a model does to products is done in float32
    WHOLE: tl.constexpr,  # whether BLOCK_D divides the width
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,  # how many blocks of rows share a tile before the next one is read
):
    """One block of rows and one tile of the vocabulary: their logits, in registers, and the sums of those."""
    program = tl.program_id(0)
    tiles = tl.cdiv(vocabulary, BLOCK_V)
    first = program // (GROUP * tiles) * GROUP
    members = tl.minimum(tl.cdiv(rows, BLOCK_R) - first, GROUP)
    turn = program % (GROUP * tiles)
    tile = turn // members
    block = first + turn % members
    if active is not None and block * BLOCK_R >= tl.load(active):
        return
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)

    # Behind the end the last row is read again, so that no load but that of a part of the width has a mask.
    read_row = tl.minimum(row, rows - 1).to(tl.int64)
    read_column = tl.minimum(column, vocabulary - 1).to(tl.int64)  # V x D may exceed 2^31
    depth = tl.arange(0, BLOCK_D)
    x_at = state + read_row[:, None] * width + depth[None, :]
    w_at = weight + read_column[None, :] * weight_stride + depth[:, None]
    z = tl.zeros((BLOCK_R, BLOCK_V), dtype=tl.float32)
    for begin in range(0, width, BLOCK_D):
        if WHOLE:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(begin + depth < width)[None, :], other=0.0)
            w = tl.load(w_at, mask=(begin + depth < width)[:, None], other=0.0)
        z = tl.dot(x, w, acc=z, input_precision="ieee")
        x_at += BLOCK_D
        w_at += BLOCK_D

    if bias is not None:
        z += tl.load(bias + read_column).to(tl.float32)[None, :]
    z = _rounded(z, state.dtype.element_ty)
    kept = (row < written)[:, None] & (column < vocabulary)[None, :]
    place = row.to(tl.int64)[:, None] * vocabulary + column[None, :]
    tl.store(products + place, z.to(state.dtype.element_ty), mask=kept)

    # What the model does to its logits, rounded where it rounds them.
    kind: tl.constexpr = tl.float32 if WIDENED else state.dtype.element_ty
    if SCALED:
        z = _rounded(z * scale, kind)
    if CAPPED:
        z = _rounded(_rounded(_tanh(_rounded(z * (1.0 / softcap), kind)), kind) * softcap, kind)
    z = tl.where((column < counted)[None, :], z, -float("inf"))

    top, at = _first_maximum(z, column[None, :])
    u, lost = _subtract(z, top[:, None])
    e = tl.where(column[None, :] == at[:, None], 0.0, tl.exp(u))
    e = tl.where(e == 0, 0.0, e + e * lost)
    to = row.to(tl.int64) * tiles + tile
    tl.store(maximum + to, top, mask=row < rows)
    tl.store(index + to, at, mask=row < rows)
    tl.store(s + to, tl.sum(e, 1), mask=row < rows)
    tl.store(t + to, tl.sum(tl.where(e == 0, 0.0, e * u), 1), mask=row < rows)


@triton.jit
def merge_tiles(
    tile_maximum,  # [rows, tiles] float32, as are tile_s and tile_t
    tile_index,  # [rows, tiles] int32
    tile_s,
    tile_t,
    active,  # as of `measure_tiles`
    entropy,  # [rows] float32, as are maximum, s and t
    maximum,
    index,  # [rows] int64
    s,
    t,
    tiles,
    BLOCK: tl.constexpr,  # a power of 2, at least `tiles`
):
    """One row: `cdsurgery.entropy.merged_sums` of its tiles, and `entropy_of_sums` of those."""
    row = tl.program_id(0)
    one = tl.arange(0, 1)
    if active is not None and row >= tl.load(active):
        tl.store(entropy + row + one, float("nan"))
        tl.store(maximum + row + one, float("nan"))
        tl.store(index + row + one, 0)
        tl.store(s + row + one, float("nan"))
        tl.store(t + row + one, float("nan"))
        return
    part = tl.arange(0, BLOCK)[None, :]
    of = row.to(tl.int64) * tiles + part
    m = tl.load(tile_maximum + of, mask=part < tiles, other=-float("inf"))
    own_s = tl.load(tile_s + of, mask=part < tiles, other=0.0)
    own_t = tl.load(tile_t + of, mask=part < tiles, other=0.0)
    own_index = tl.load(tile_index + of, mask=part < tiles, other=0)
    top, leader = _first_maximum(m, part)
    leads = part == leader[:, None]
    d, lost = _subtract(m, top[:, None])
    e = tl.exp(d)
    e = tl.where(e == 0, 0.0, e + e * lost)
    mass = tl.where(e == 0, 0.0, e * (1 + own_s))
    whole_s = tl.sum(tl.where(leads, own_s, mass), 1)
    whole_t = tl.sum(tl.where(e == 0, 0.0, e * own_t + d * mass), 1)
    tl.store(entropy + row + one, _entropy(top, whole_s, whole_t))
    tl.store(maximum + row + one, top)
    tl.store(index + row + one, tl.sum(tl.where(leads, own_index, 0), 1).to(tl.int64))
    tl.store(s + row + one, whole_s)
    tl.store(t + row + one, whole_t)


@triton.jit
def _first_maximum(z, place):
    """Of each row of z `[R, N]` the maximum and the lowest of the places `[1, N]` where it stands; NaN is above all."""
    # Whether a maximum shows a NaN depends on the device, so NaN is looked for.
    unknown = z != z
    broken = tl.max(unknown.to(tl.int32), 1) > 0
    top = tl.max(tl.where(unknown, -float("inf"), z), 1)
    stands = tl.where(broken[:, None], unknown, z == top[:, None])
    lowest = tl.min(tl.where(stands, place, 2147483647), 1)
    return tl.where(broken, float("nan"), top), lowest


@triton.jit
def _entropy(maximum, s, t):
    """`cdsurgery.entropy.entropy_of_sums`: log1p(s) - t / (1 + s), NaN where the maximum is not finite."""
    w = 1 + s
    log1p = tl.where(w == 1, s, tl.log(w) * (s / tl.where(w == 1, 1.0, w - 1)))
    return tl.where(tl.abs(maximum) < float("inf"), log1p - t / w, float("nan"))


@triton.jit
def _subtract(a, b):
    """a - b as (rounded, what rounding lost), as in `cdsurgery.entropy`."""
    rounded = a - b
    minus_b = rounded - a
    return rounded, (a - (rounded - minus_b)) - (b + minus_b)


@triton.jit
def _rounded(z, kind: tl.constexpr):
    return z.to(kind).to(tl.float32)


@triton.jit
def _tanh(x):
    """tanh to float32's last digits, which Triton's language lacks: near 0 the polynomial of Cephes' tanhf."""
    square = x * x
    tail = -5.70498872745e-3 * square + 2.06390887954e-2
    tail = (tail * square - 5.37397155531e-2) * square + 1.33314422036e-1
    near = (tail * square - 3.33332819422e-1) * square * x + x
    return tl.where(tl.abs(x) < 0.625, near, 1 - 2 / (tl.exp(2 * x) + 1))
