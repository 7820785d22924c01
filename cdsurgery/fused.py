"""The end of a model's tail -> what `unembed_sums` takes: the unembedding, a scale, a softcap; or why it is none."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy
from cdsurgery.errors import UnsupportedModelError
from cdsurgery.kernels.unembed_sums import DTYPES, unembed_sums
from cdsurgery.transforms import TRANSFORMS
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
        widened: whether logits are float32 from there on.
        counted: how many entries of the vocabulary have a logit; those behind are padding.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    product: torch.dtype
    widened: bool
    counted: int

    def entropies(self, rows: Tensor, written: int, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`[R, D]` -> the entropies of their logits `[R]`, and the products `[written, V]` of the first ones.

        `active` as of `unembed_sums`: how many of the rows count.
        """
        state, weight = (tensor.detach().to(self.product) for tensor in (rows, self.weight))
        bias = None if self.bias is None else self.bias.detach().to(self.product)
        entropy, *_, products = unembed_sums(
            state, weight, bias, self.scale, self.softcap, self.widened, self.counted, written, active
        )
        return entropy, products

    def writes(self, rows: int) -> bool:
        """Whether writing the products of R candidates costs less than making those of the chosen ones again.

        What is written takes R V numbers, and another pass over the unembedding reads V D. So R < D where both have
        as many bytes, as in every decode step; then they never take more memory than the unembedding does. Computed,
        and not yet measured on a GPU.
        """
        return rows * self.product.itemsize < self.weight.shape[1] * self.weight.dtype.itemsize


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
    counted, scale, softcap, widened = weight.shape[0], 1.0, None, False
    for row in anatomy.after_unembedding:
        kind, value = _KINDS.get(row.apply), row.value(model)
        if value is None:  # switched off since
            continue
        if kind == "in float32" and scale == 1 and softcap is None:
            widened = True
        elif kind not in _LOGITS or not isinstance(value, (int, float)):
            raise _unsupported(model, anatomy, f"its logits go through ({row.name}), whose value is {value!r}")
        elif kind == "unpadded":
            counted = int(value)
        elif softcap is not None or (scale != 1 and kind != "softcap"):
            raise _unsupported(model, anatomy, f"({row.name}) comes after another transform of its logits")
        elif kind == "softcap":
            softcap = float(value)
        else:
            scale = 1 / value if kind == "scaling" else float(value)
    return FusedUnembedding(weight, bias, scale, softcap, product, widened, counted)


_TRITON_IS_INSTALLED = find_spec("triton") is not None  # asked once: a compiled step cannot look for modules
_LOGITS = ("scale", "scaling", "multiplier", "softcap", "unpadded")
_KINDS = {row.apply: row.name for row in TRANSFORMS if row.name in (*_LOGITS, "in float32")}


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
