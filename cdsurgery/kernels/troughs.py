"""Entropies of M layers -> each row's trough and the product that stands there, in OpenAI's Triton language.

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
