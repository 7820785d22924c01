"""Tokens, one after another -> text, piece by piece: no half characters, and nothing of a stop word.

A token may hold a part of a character, and its text may depend on the token before it. So the newest tokens are decoded
together with those of the last piece, and text that ends in U+FFFD waits for more, the way of Hugging Face's TGI:
https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/models/model.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens of the prompt that the first piece is decoded with.
BEFORE = 6
BYTES = 4  # of a character at most, each maybe a token


class Detokenizer:
    """The text of one answer."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        """Begin after a prompt.

        Args:
            decode: ids -> text, special tokens left out.
            prompt: its ids.
        """
        self._decode = decode
        self._ids = self._context(prompt)
        self._start, self._read = 0, len(self._ids)

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, from where a character begins.

        Of tokens that are single bytes, as the ByteFallback of Llama 2 makes them, a decoder gives up a whole run of
        them where one character in it is not whole.
        """
        first = max(0, len(prompt) - BEFORE)
        starts = range(first, max(-1, first - BYTES), -1)
        whole = (start for start in starts if not self._decode(prompt[start:]).startswith(INCOMPLETE))
        return list(prompt[next(whole, first) :])

    def push(self, token: int) -> str:
        """Take one token; return the text that it completes, maybe none."""
        self._ids.append(token)
        before, text = self._texts()
        if len(text) <= len(before) or text.endswith(INCOMPLETE):
            return ""
        self._ids = self._ids[self._read :]
        self._start, self._read = 0, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """The text that still waits: the answer ends within a character, or with a real U+FFFD."""
        before, text = self._texts()
        self._read = len(self._ids)
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])


class StopWords:
    """Text that ends before the first stop word, wherever pieces begin and end."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take a piece; return the text that cannot be part of a stop word any more, and whether one has come."""
        if not self._words:
            return piece, False
        text = self._held + piece
        ends = [(text.index(word) + len(word), -len(word)) for word in self._words if word in text]
        if ends:
            end, length = min(ends)  # the one that is complete first, and of those the longest
            self._held = ""
            return text[: end + length], True
        waiting = max(_overlap(text, word) for word in self._words)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting], False

    def flush(self) -> str:
        """The text that waited for the rest of a stop word."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of the text that begins the word."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)
