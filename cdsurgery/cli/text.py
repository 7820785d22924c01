"""Prompts -> token ids a model can take; token ids -> the pieces of text they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdsurgery.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def check_prompt(prompt: str) -> None:
    """Refuse what is no prompt, before anything is loaded for it."""
    if not prompt:
        raise InvalidInputError("The prompt is empty. Give the beginning of a text, for example 'def '.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python keeps the bytes of a command line that it cannot decode
        raise InvalidInputError(f"The prompt is not UTF-8: {prompt!r}. Give a text, in UTF-8.") from error


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, config: PreTrainedConfig, max_new_tokens: int
) -> dict[str, Tensor]:
    """The prompt as `input_ids` and `attention_mask`, `[1, S]` each.

    Raises:
        InvalidInputError: nothing to start from, ids the model does not have, or more than its context holds.
    """
    check_prompt(prompt)
    encoded = tokenizer(prompt, return_tensors="pt", return_attention_mask=True)
    ids: Any = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise InvalidInputError(f"The prompt {prompt!r} has no tokens for this tokenizer. Give another beginning.")
    check_known(int(ids.max()), config)
    context = context_of(config)
    if context is not None and ids.shape[1] + max_new_tokens > context:
        raise InvalidInputError(
            f"The prompt has {ids.shape[1]} tokens; with {max_new_tokens} new ones that is "
            f"{ids.shape[1] + max_new_tokens}, and the model's context holds {context}. Shorten the prompt or lower "
            "--max-new-tokens."
        )
    return {"input_ids": ids, "attention_mask": encoded["attention_mask"]}


def check_known(largest: int, config: PreTrainedConfig) -> None:
    """Refuse ids that the model does not have, told by the largest one."""
    vocabulary = config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise InvalidInputError(
            f"The tokenizer made token id {largest}, but the model has ids 0 to {vocabulary - 1}. They do not belong "
            "together: save the model's own tokenizer into its folder."
        )


def context_of(config: PreTrainedConfig) -> int | None:
    """How many tokens the model's context holds; None where its config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of these tokens, special ones left out."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def pieces(tokenizer: PreTrainedTokenizerBase, before: int, said: list[int], ids: list[int]) -> tuple[str, ...]:
    """The text of each of `ids` if it stood in the place of the token of the same index in `said`.

    Each is decoded after the token before it, because some tokenizers drop the space before a token that stands alone.

    Args:
        before: the last token of the prompt.
        said, ids: as long as each other.
    """
    texts: list[str] = []
    for previous, token in zip([before, *said], ids, strict=False):
        first, pair = (str(tokenizer.decode(part)) for part in ([previous], [previous, token]))
        texts.append(pair[len(first) :])
    return tuple(texts)
