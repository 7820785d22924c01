"""Files, or standard input -> their texts; a text -> windows of token ids, in which each token follows once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdsurgery.cli.text import check_known, context_of
from cdsurgery.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

STANDARD_INPUT = "standard input"
# The logits of all candidates at 256 positions are 1.7 GB for a vocabulary of 152,000 in float32 and K = 10.
DEFAULT_TOKENS = 256


def read_texts(files: Sequence[str] | None) -> dict[str, str]:
    """Name -> text of each file, or of standard input where no file is named.

    Raises:
        InvalidInputError: one cannot be read, is not UTF-8 or is named twice, or standard input is a terminal.
    """
    if files is None and sys.stdin.isatty():
        raise InvalidInputError("There is no text. Name files with --text FILE, or pipe one in.")
    places = [Path(name).resolve() for name in files or []]
    if twice := sorted({name for name, place in zip(files or [], places, strict=True) if places.count(place) > 1}):
        raise InvalidInputError(f"{', '.join(twice)} is named more than once. Name each file once.")
    texts = {}
    for name in files or [STANDARD_INPUT]:
        try:
            content = Path(name).read_bytes() if files else sys.stdin.buffer.read()
            texts[name] = content.decode("utf-8-sig")  # a mark at its beginning is none of its text
        except OSError as error:
            raise InvalidInputError(f"{name} cannot be read: {error.strerror}. Give a file of text.") from error
        except UnicodeDecodeError as error:
            raise InvalidInputError(
                f"{name} is not UTF-8: byte {error.start} cannot be decoded. Give a text, in UTF-8."
            ) from error
    return texts


def window_tokens(asked: int | None, config: PreTrainedConfig) -> int:
    """How many tokens a window has: as many as asked for, else 256, or the model's context if that is shorter.

    Raises:
        InvalidInputError: the model's context does not hold that many.
    """
    context = context_of(config)
    if asked is None:
        return DEFAULT_TOKENS if context is None else min(DEFAULT_TOKENS, context)
    if context is not None and asked > context:
        raise InvalidInputError(f"--tokens is {asked}, and the model's context holds {context}. Lower --tokens.")
    return asked


def text_windows(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, config: PreTrainedConfig, tokens: int
) -> list[Tensor]:
    """The text as `[n]` int64 token ids each, n at most tokens + 1: those to read, and the one that follows them.

    A window begins with the token with which the one before it ended, so that each of the text's tokens but the first
    follows exactly once. Where the tokenizer puts a beginning-of-text token first, every window begins with that
    instead: models that were trained with one make little of a text without it.

    Raises:
        InvalidInputError: the text has no second token, or a token that the model does not know.
    """
    import torch

    ids: Any = tokenizer(text, verbose=False)["input_ids"]  # not verbose: a text may well be longer than the context
    if len(ids) < 2:
        raise InvalidInputError(
            f"The text of {name} has length {len(ids)} in tokens; it must be at least 2: one to read and the one that "
            "follows. Give a longer text."
        )
    check_known(max(ids), config)
    beginning = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    rest = ids[len(beginning) :]
    most = tokens + 1 - len(beginning)
    return [torch.tensor(beginning + rest[at : at + most]) for at in range(0, len(ids) - 1, tokens)]
