"""The arguments of a call -> the int64 tensors that a decoder graph takes, or an error that says what does not fit.

ONNX Runtime takes most of what is wrong without an error and computes something: a token id of -1 is the last of the
vocabulary, a mask of 2 is a mask of 1 to some graphs and not to others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cdsurgery.errors import InvalidInputError

INTEGERS = (torch.int64, torch.int32)
# What `generate` passes on to every model: the tokenizer is the one that it cut its stop strings with.
PASSED_ON = ("use_cache", "return_dict", "tokenizer")


def decoder_inputs(
    config: PreTrainedConfig, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cached: int
) -> dict[str, Tensor]:
    """Check the tokens of one run and what goes with them, and fill in what was left out.

    Args:
        config: of the model: its vocabulary V and its context.
        input_ids: `[B, S]` in [0, V).
        attention_mask: `[B, P+S]` of 0 and 1 in any dtype that has them; None for all ones.
        position_ids: `[B, S]` in [0, context); None counts the mask.
        cached: P, the tokens in the cache.

    Returns:
        The three by name, int64.

    Raises:
        InvalidInputError: one is of another kind, dtype or shape, or holds a value out of range.
    """
    text = config.get_text_config()
    check_kind("input_ids", input_ids, INTEGERS)
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise InvalidInputError(
            f"input_ids has shape {list(input_ids.shape)}; it must be [batch, sequence], with at least one token."
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= text.vocab_size:
        raise InvalidInputError(f"input_ids holds ids from {low} to {high}; allowed are 0 to {text.vocab_size - 1}.")
    batch, length = input_ids.shape
    if attention_mask is None:
        attention_mask = input_ids.new_ones(batch, cached + length)
    check_mask(attention_mask, [batch, cached + length], cached)
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    _check_positions(position_ids, [batch, length], getattr(text, "max_position_embeddings", None))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return {name: tensor.long() for name, tensor in inputs.items()}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse every further argument that asks for something: what is None or False asks for nothing.

    Args:
        options: what was passed beside the inputs.
    """
    asked = [name for name, value in options.items() if value is not None and value is not False]
    if unknown := [name for name in asked if name not in PASSED_ON]:
        raise InvalidInputError(
            f"An artifact does not take {', '.join(unknown)}. It takes input_ids, attention_mask, position_ids and "
            "past_key_values, and returns what it was exported with."
        )


def check_counted(mask: Tensor, positions: Tensor | None, cached: int) -> None:
    """Refuse what a graph without `position_ids` would compute wrongly: it counts from the cache's length on.

    Args:
        mask: `[B, P+S]` of 0 and 1.
        positions: `[B, S]` that were asked for, or None.
        cached: P.

    Raises:
        InvalidInputError: a row has padding between tokens, or positions that are not one after another.
    """
    beginnings = mask[:, 0] + (mask[:, 1:] > mask[:, :-1]).sum(dim=-1)
    if (parted := beginnings > 1).any():
        raise InvalidInputError(
            f"Row {int(parted.nonzero()[0])} of attention_mask holds a 0 between tokens, as of a prompt that was "
            "padded on the right and goes on. This artifact was grafted from a file without position_ids, which counts "
            "padding as it counts tokens: pad on the left."
        )
    new = mask[:, cached:].bool()
    if positions is not None and (positions.diff(dim=-1) != 1)[new[:, 1:] & new[:, :-1]].any():
        raise InvalidInputError(
            "position_ids are not one after another; this artifact was grafted from a file without position_ids, which "
            "counts them itself. Leave them out."
        )


def check_group_query(mask: Tensor, cached: int) -> None:
    """Refuse what GroupQueryAttention would compute wrongly: it counts a row's ones, and takes them to stand first.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention

    Args:
        mask: `[B, P+S]` of 0 and 1.
        cached: P.

    Raises:
        InvalidInputError: a row has padding before a token, or several rows continue by several tokens.
    """
    new = mask[:, cached:]
    if cached and len(new) > 1 and new.shape[1] > 1:
        raise InvalidInputError(
            f"{len(new)} rows continue by {new.shape[1]} tokens; the GroupQueryAttention of this artifact continues "
            "several rows by one token each. Give one token at a time, or one row."
        )
    fits = (mask[:, 0] == 1) & (new.diff(dim=-1) <= 0).all(dim=-1)
    if cached:
        fits &= new.all(dim=-1)
    if not bool(fits.all()):
        row = int(fits.long().argmin())
        raise InvalidInputError(
            f"Row {row} of attention_mask holds a 0 before a token of the prompt, or in place of one after it. This "
            "artifact's GroupQueryAttention takes the tokens of a row to stand first. Pad prompts on the right, where "
            "`generate` needs positions='last', or run texts of one length together."
        )


def check_kind(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what is no tensor of one of the dtypes."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInputError(f"{name} is {found}; it must be a tensor of {' or '.join(map(str, dtypes))}.")


def check_mask(mask: Tensor, shape: list[int], cached: int) -> None:
    """Refuse what is no tensor of that shape, of 1 for tokens and 0 for padding."""
    check_kind("attention_mask", mask, (*INTEGERS, torch.bool, torch.float32))
    if list(mask.shape) != shape:
        raise InvalidInputError(
            f"attention_mask has shape {list(mask.shape)}; with {cached} cached and {shape[1] - cached} new tokens it "
            f"must be {shape}."
        )
    wrong = (mask != 0) & (mask != 1)
    if bool(wrong.any()):
        raise InvalidInputError(
            f"attention_mask holds {mask[wrong][0].item()}; it must be 1 for tokens and 0 for padding."
        )


def _check_positions(positions: Tensor, shape: list[int], context: int | None) -> None:
    check_kind("position_ids", positions, INTEGERS)
    if list(positions.shape) != shape:
        raise InvalidInputError(
            f"position_ids has shape {list(positions.shape)}; it must be that of input_ids, {shape}."
        )
    low, high = int(positions.min()), int(positions.max())
    if low < 0:
        raise InvalidInputError(f"position_ids holds {low}; positions begin at 0.")
    if context is not None and high >= context:
        raise InvalidInputError(
            f"A token stands at position {high}; the model's context is {context} tokens. Shorten the prompt or "
            "generate fewer tokens."
        )


def check_targets(
    config: PreTrainedConfig, positions: str, targets: Tensor | None, input_ids: Tensor
) -> dict[str, Tensor]:
    """The tokens to score `[B, S]` int64, negative for none: what an artifact that scores takes, and no other.

    Returns:
        They by name, or nothing.

    Raises:
        InvalidInputError: they are missing or not wanted, or do not fit the tokens.
    """
    if (targets is not None) != (positions == "score"):
        raise InvalidInputError(
            f"This artifact was made with positions={positions!r}, which takes "
            f"{'targets' if positions == 'score' else 'no targets'}. Only one made with positions='score' scores, and "
            "it does nothing else."
        )
    if targets is None:
        return {}
    check_kind("targets", targets, INTEGERS)
    vocabulary = config.get_text_config().vocab_size
    if targets.shape != input_ids.shape or int(targets.max()) >= vocabulary:
        raise InvalidInputError(
            f"targets has shape {list(targets.shape)} and ids up to {int(targets.max())}; it must have the shape of "
            f"input_ids, {list(input_ids.shape)}, and ids up to {vocabulary - 1}, negative for none."
        )
    return {"targets": targets.long()}
