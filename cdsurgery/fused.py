"""Candidates' states -> their entropies from one pass over the unembedding, and logits of the selected layers only.

`select` measures `[K, B, T, V]` logits, all of which but `[B, T, V]` are thrown away. Here four numbers a row leave the
pass (`cdsurgery.kernels.unembed_sums`). Static tensor operations, as in `cdsurgery.trough`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy, joined, unembedded, unembedding_input
from cdsurgery.entropy import entropy, entropy_of_sums
from cdsurgery.errors import UnsupportedModelError
from cdsurgery.kernels.unembed_sums import DTYPES, unembed_sums
from cdsurgery.transforms import TRANSFORMS
from cdsurgery.trough import allowed_depth, pick
from cdsurgery.unembedding import linear_flaw


@dataclass(frozen=True)
class FusedUnembedding:
    """The end of a tail, from the unembedding on, as `unembed_sums` takes it.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        scale: what logits are multiplied by.
        softcap: what bounds them then, or None.
        product: dtype of what the linear layer returns: that of its weight, or of an autocast around it.
        dtype: of the logits.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    product: torch.dtype
    dtype: torch.dtype

    def sums(self, rows: Tensor, write: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`[R, D]` -> maximum, s and t `[R]`, and the logits, `[R, V]` if they are to be written."""
        state, weight = (tensor.detach().to(self.product) for tensor in (rows, self.weight))
        bias = None if self.bias is None else self.bias.detach().to(self.product)
        maximum, _, s, t, logits = unembed_sums(state, weight, bias, self.scale, self.softcap, self.dtype, write)
        return maximum, s, t, logits

    def writes(self, rows: int) -> bool:
        """Whether writing the logits of all R rows costs less than projecting the chosen ones again.

        What is written takes R V numbers, and another pass over the unembedding reads V D. So R < D where both have
        as many bytes, as in every decode step; then the logits never take more memory than the unembedding does.
        Computed, and not yet measured on a GPU. Gradients need the pass.
        """
        written, read = rows * self.dtype.itemsize, self.weight.shape[1] * self.weight.dtype.itemsize
        return written < read and not torch.is_grad_enabled()


def fused_unembedding(model: PreTrainedModel, anatomy: Anatomy) -> FusedUnembedding:
    """The end of the model's tail, as it is now.

    Raises:
        UnsupportedModelError: it is more than a plain linear layer, a scale and a softcap.
    """
    head: Any = model.get_submodule(anatomy.unembedding)
    flaw = _flaw(head)
    if flaw is not None:
        raise _unsupported(model, anatomy, flaw)
    weight, bias, device = head.weight, head.bias, head.weight.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    vocabulary, scale, softcap, dtype = weight.shape[0], 1.0, None, product
    for row in anatomy.after_unembedding:
        kind, value = _KINDS.get(row.apply), row.value(model)
        if kind == "in float32" and scale == 1 and softcap is None:
            dtype = torch.float32
        elif kind not in _LOGITS or not isinstance(value, (int, float)):
            raise _unsupported(model, anatomy, f"its logits go through ({row.name}), whose value is {value!r}")
        elif kind == "unpadded":
            vocabulary = int(value)
        elif softcap is not None or (scale != 1 and kind != "softcap"):
            raise _unsupported(model, anatomy, f"({row.name}) comes after another transform of its logits")
        elif kind == "softcap":
            softcap = float(value)
        else:
            scale = 1 / value if kind == "scaling" else float(value)
    bias = None if bias is None else bias[:vocabulary]
    return FusedUnembedding(weight[:vocabulary], bias, scale, softcap, product, dtype)


_TRITON_IS_INSTALLED = find_spec("triton") is not None  # asked once: a compiled step cannot look for modules
_KINDS = {row.apply: row.name for row in TRANSFORMS}
_LOGITS = ("scale", "scaling", "multiplier", "softcap", "unpadded")


def _flaw(head: Any) -> str | None:
    """What keeps a kernel from doing what this module does, or None."""
    flaw = linear_flaw(head)
    if flaw is not None:
        return flaw
    weight = head.weight
    if weight.dtype not in DTYPES or weight.device.type not in ("cpu", "cuda") or not weight.is_contiguous():
        return f"its weight is {weight.dtype} on {weight.device.type} with strides {weight.stride()}"
    if weight.is_cuda and not _TRITON_IS_INSTALLED:
        return "it is on a GPU, where the pass is a kernel of Triton, which is not installed (pip install triton)"
    return None


def _unsupported(model: PreTrainedModel, anatomy: Anatomy, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}: scan='fused' cannot take its unembedding '{anatomy.unembedding}': {found}. It takes "
        f"a torch.nn.Linear in {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, then at most a "
        "scale and a softcap. Use scan='full' or 'lazy'."
    )


def select_fused(
    model: PreTrainedModel, anatomy: Anatomy, final: Tensor, states: Sequence[Tensor], allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `select` finds, from the candidates' states instead of their logits.

    Args:
        final: `[B, T, V]` logits of layer L.
        states: K of them, index k of layer L-k-1, each as `tail_logits` takes it.
        allowed: as for `select`.

    Returns:
        logits `[B, T, V]`, depth `[B, T]` int64 in [0, K], entropy `[B, T, M]` float32.

    Raises:
        UnsupportedModelError: the model's unembedding has become one that this cannot take.
    """
    head, shape = fused_unembedding(model, anatomy), (len(states), *final.shape[:-1])
    inputs = unembedding_input(model, anatomy, joined(states, anatomy))
    rows = inputs.flatten(0, -2)
    write = head.writes(rows.shape[0])
    maximum, s, t, written = head.sums(rows, write)
    earlier = entropy_of_sums(maximum, s, t).unflatten(0, shape)
    measured = torch.cat([entropy(final.detach())[None], earlier.to(final.device)]).movedim(0, -1)
    depth = allowed_depth(measured, allowed)
    chosen = (depth - 1).clamp(min=0).to(rows.device)  # among the earlier ones; a row that stays gets what is not used
    if write:
        logits = pick(written.unflatten(0, shape), chosen)
    else:
        logits = unembedded(model, anatomy, pick(inputs.unflatten(0, shape[:2]), chosen))
    return torch.where((depth > 0)[..., None], logits.to(final.device), final), depth, measured
