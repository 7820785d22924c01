"""What families do to a state or to logits without a module -> rows of data, one a family that is the first to do it.

To add one: what it is called, which option holds its value, what it computes, and the line of the model that does it.
Where in a model it stands is not said here; the search finds that, and the proof shows it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Transform:
    """Something a model does between two of its modules: one row of data.

    Attributes:
        name: what `inspect` prints.
        option: what holds its value: an attribute of the model, a part of it, or else an option of its text config.
            None there, or none of these, means "not done".
        apply: (state `[..., D]` or logits `[..., V]`, value) -> the same transformed, in the model's own order of
            operations, so that the result is bitwise the model's in every dtype.
        source: the line of the model's code that this repeats.
    """

    name: str
    option: str
    apply: Callable[[Tensor, Any], Tensor]
    source: str

    def value(self, model: PreTrainedModel) -> Any:
        """The value in this model, as it is now; None where the model has no such option."""
        try:
            return functools.reduce(getattr, self.option.split("."), model)
        except AttributeError:
            return getattr(model.config.get_text_config(), self.option, None)

    def of(self, model: PreTrainedModel, x: Tensor) -> Tensor:
        """The state or logits after it; as they are where it is not done, which may be switched off in a config."""
        value = self.value(model)
        return x if value is None else self.apply(x, value)


def declared_transforms(model: PreTrainedModel) -> list[Transform]:
    """The rows whose option this model has, each with the full path of the part that holds its value."""
    parts = {path.rpartition(".")[2]: path for path, _ in model.named_modules()}
    rows = [replace(row, option=parts.get(row.option, row.option)) for row in TRANSFORMS]
    return [row for row in rows if row.value(model) is not None]


# A gap closed so far takes two (xlstm in half precision: a cast, then a softcap).
MOST_IN_A_GAP = 3


def sequences(declared: Sequence[Transform], most: int = MOST_IN_A_GAP) -> Iterator[tuple[Transform, ...]]:
    """No transform, each one, each two in either order, and so on: what may stand in a gap, shortest first."""
    return (rows for size in range(most + 1) for rows in permutations(declared, size))


def transformed(model: PreTrainedModel, rows: Sequence[Transform], state: Tensor | None) -> Tensor | None:
    """The state, of any shape, after these transforms in turn; None where one of them does not fit what it gets."""
    try:
        for row in rows:
            state = None if state is None else row.apply(state, row.value(model))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return state


# Each is found by its name, so that a wrapped model can be pickled.


def _halved(x: Tensor, _: Any) -> Tensor:
    return x / 2


def _cut(z: Tensor, size: int) -> Tensor:
    return z[..., :size]


def _in_float32(z: Tensor, _: Any) -> Tensor:
    return z.float()


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _softcap(z: Tensor, cap: float) -> Tensor:
    return torch.tanh(z / cap) * cap


def _merge_streams(streams: Tensor, projections: Sequence[nn.Module]) -> Tensor:
    """`[S, B, T, D]` -> `[B, T, D]`: the mean of the streams, the later ones projected to the first one's magnitude."""
    first = streams[0]
    magnitude = torch.mean(first**2, dim=-1, keepdim=True) ** 0.5
    merged = [first]
    for stream, projection in zip(streams[1:], projections, strict=True):
        x = projection(stream).to(first.dtype)  # an autocast's product is not
        merged.append(x * magnitude / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True).clamp(min=1e-5)))
    return torch.mean(torch.stack(merged), dim=0)


_MODELS = "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models"

TRANSFORMS = (
    Transform("scale", "logit_scale", operator.mul, f"{_MODELS}/cohere/modeling_cohere.py#L495"),
    Transform("scaling", "logits_scaling", operator.truediv, f"{_MODELS}/granite/modeling_granite.py#L486"),
    Transform("multiplier", "logits_scaling", operator.mul, f"{_MODELS}/hyperclovax/modeling_hyperclovax.py#L493"),
    Transform("multiplier", "lm_head_multiplier", operator.mul, f"{_MODELS}/falcon_h1/modeling_falcon_h1.py#L1170"),
    Transform("width", "logits_mup_width_multiplier", operator.truediv, f"{_MODELS}/inkling/modeling_inkling.py#L805"),
    Transform("unpadded", "unpadded_vocab_size", _cut, f"{_MODELS}/inkling/modeling_inkling.py#L810"),
    Transform("softcap", "final_logit_softcapping", _softcap, f"{_MODELS}/gemma2/modeling_gemma2.py#L518-L521"),
    Transform(
        "softcap", "logits_soft_cap", _softcap, f"{_MODELS}/recurrent_gemma/modeling_recurrent_gemma.py#L745-L746"
    ),
    Transform("softcap", "output_logit_soft_cap", _softcap, f"{_MODELS}/xlstm/modeling_xlstm.py#L1573"),
    Transform(
        "streams", "altup_unembed_projections", _merge_streams, f"{_MODELS}/gemma3n/modeling_gemma3n.py#L1728-L1742"
    ),
    Transform("halving", "rescale_every", _halved, f"{_MODELS}/rwkv/modeling_rwkv.py#L587-L592"),
    Transform(
        "in float32", "dtype", _in_float32, f"{_MODELS}/mamba/modeling_mamba.py#L789"
    ),  # logits of a half-precision model
    Transform(
        "in the model's dtype", "dtype", _in_dtype, f"{_MODELS}/mamba/modeling_mamba.py#L789"
    ),  # a residual stream that is kept in float32
)
