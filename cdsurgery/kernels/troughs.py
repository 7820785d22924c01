"""Entropies of several layers -> each row's trough and the product there; rows that go on, in OpenAI's Triton language.

Importing this module imports `triton`, which `cdsurgery` alone does not need.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def pick_rows(
    entropy,  # [layers, rows] float32
    products,  # [layers * rows, vocabulary]
    allowed,  # [rows] bool, or None
    depth,  # [rows] int64
    chosen,  # [rows, vocabulary]
    layers,
    rows,
    vocabulary,
    LAYERS: tl.constexpr,  # a power of 2, at least `layers`
    PART: tl.constexpr,
):
    """A part of one row: its trough, which every part finds for itself, and the product that stands there."""
    row, part = tl.program_id(0), tl.program_id(1)
    back = tl.arange(0, LAYERS)
    own = tl.load(entropy + back * rows + row, mask=back < layers, other=float("nan"))
    # Behind the last layer NaN stands, which is no improvement.
    earlier = tl.load(entropy + (back + 1) * rows + row, mask=back + 1 < layers, other=float("nan"))
    trough = tl.min(tl.where(earlier < own, LAYERS, back), 0)
    if allowed is not None:
        trough = tl.where(tl.load(allowed + row), trough, 0)
    if part == 0:
        tl.store(depth + row, trough.to(tl.int64))
    entry = part * PART + tl.arange(0, PART)
    from_row = (trough * rows + row).to(tl.int64) * vocabulary  # M x R x V may exceed 2^31
    product = tl.load(products + from_row + entry, mask=entry < vocabulary)
    tl.store(chosen + row.to(tl.int64) * vocabulary + entry, product, mask=entry < vocabulary)


@triton.jit(do_not_specialize=["rows", "reached", "layers"])
def pick_further_rows(
    depth,  # [rows] int64
    chosen,  # [rows, vocabulary], written where a row goes further
    entropy,  # [reached + 1, rows] float32
    place,  # [rows] int64
    deeper,  # [rows, layers] float32
    products,  # [rows * layers, vocabulary]
    new_depth,  # [rows] int64
    new_entropy,  # [reached + 1 + layers, rows] float32
    reached,
    layers,
    rows,
    vocabulary,
    LAYERS: tl.constexpr,  # a power of 2, at least reached + 1 + layers
    PART: tl.constexpr,
):
    """A part of one row: how much further it goes, and the product that stands there."""
    row, part = tl.program_id(0), tl.program_id(1)
    old, at = tl.load(depth + row), tl.load(place + row)
    last = tl.where(old == reached, reached + layers, reached)  # the earliest layer that is known of this row
    back = tl.arange(0, LAYERS)
    known = tl.load(entropy + back * rows + row, mask=back <= reached, other=float("nan"))
    ahead = deeper + at * layers + back - reached  # of the layer behind each
    read = tl.load(ahead - 1, mask=(back > reached) & (back <= last), other=float("nan"))
    own = tl.where(back <= reached, known, read)
    earlier = tl.load(ahead, mask=(back >= reached) & (back < last), other=float("nan"))
    trough = tl.min(tl.where((back < reached) | (earlier < own), LAYERS, back), 0)
    if part == 0:
        tl.store(new_depth + row, tl.where(old == reached, trough.to(tl.int64), old))
        tl.store(new_entropy + back * rows + row, own, mask=back <= reached + layers)
    entry = part * PART + tl.arange(0, PART)
    moves = entry < tl.where(trough > reached, vocabulary, 0)
    from_row = (at * layers + trough - reached - 1) * vocabulary  # int64, as `at` is
    product = tl.load(products + from_row + entry, mask=moves)
    tl.store(chosen + row.to(tl.int64) * vocabulary + entry, product, mask=moves)


@triton.jit(do_not_specialize=["rows"])
def compact_rows(
    counts,  # [rows] bool
    order,  # [rows] int64, as is place
    place,
    active,  # int64
    rows,
    ROWS: tl.constexpr,  # a power of 2, at least `rows`
):
    """All rows: those that count come first, and each part keeps its order."""
    row = tl.arange(0, ROWS)
    count = tl.load(counts + row, mask=row < rows, other=0).to(tl.int32)
    before = tl.cumsum(count, 0) - count
    total = tl.sum(count, 0)
    to = tl.where(count != 0, before, total + row - before)
    tl.store(order + to, row.to(tl.int64), mask=row < rows)
    tl.store(place + row, to.to(tl.int64), mask=row < rows)
    tl.store(active, total.to(tl.int64))
