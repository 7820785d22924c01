"""Where a model keeps what surgery needs: its decoder layers, and the tail from their end to the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LogitTransform:
    """Something a family does to its logits after the unembedding: one row of data.

    Attributes:
        name: what `inspect` prints.
        option: the attribute of the (text) config that holds its value; None there means "not done".
        apply: (logits `[..., V]`, value) -> logits `[..., V]`, in the model's own order of operations, so that the
            result is bitwise the model's in every dtype.
        source: the line of the model's code that this repeats.
    """

    name: str
    option: str
    apply: Callable[[Tensor, float], Tensor]
    source: str


_MODELS = "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models"

LOGIT_TRANSFORMS = (
    LogitTransform("scale", "logit_scale", lambda z, value: z * value, f"{_MODELS}/cohere/modeling_cohere.py#L495"),
    LogitTransform(
        "scaling", "logits_scaling", lambda z, value: z / value, f"{_MODELS}/granite/modeling_granite.py#L486"
    ),
    LogitTransform(
        "softcap",
        "final_logit_softcapping",
        lambda z, value: torch.tanh(z / value) * value,
        f"{_MODELS}/gemma2/modeling_gemma2.py#L518-L521",
    ),
)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model, by the paths that `model.get_submodule` takes.

    Attributes:
        layers: the L decoder layers in order; `layers[l-1]` is layer l of the paper.
        tail: the modules between the last layer and the logits, in order: final norm, projections, unembedding.
        transforms: what happens to the logits after the unembedding, in order.
    """

    layers: tuple[str, ...]
    tail: tuple[str, ...]
    transforms: tuple[LogitTransform, ...] = ()

    @property
    def unembedding(self) -> str:
        """The path of the module whose rows are the vocabulary."""
        return self.tail[-1]


def tail_logits(model: PreTrainedModel, anatomy: Anatomy, state: Tensor) -> Tensor:
    """z = tail(x): everything the model does from its residual stream to its logits.

    Paths are looked up at every call, so that a head replaced later (resized, quantised, adapted) is the one used.

    Args:
        state: `[..., T, D]`, the residual stream after a decoder layer, before the final norm.

    Returns:
        `[..., T, V]` in the dtype of the model's logits.
    """
    for path in anatomy.tail:
        state = model.get_submodule(path)(state)
    for transform in anatomy.transforms:
        value = transform_value(model, transform)
        assert value is not None
        state = transform.apply(state, value)
    return state


def transform_value(model: PreTrainedModel, transform: LogitTransform) -> float | None:
    """The transform's value in the model's text config; None where the model has no such option."""
    return getattr(model.config.get_text_config(), transform.option, None)
