"""Tokens, one after another, as the server turns them into text: against whole decodes, whatever the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer
from triton_server import ROOT

from cdsurgery.export.triton.serving.detokenizer import Detokenizer, StopWords


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_lm")


TEXTS = [
    "def f(x):\n    return x\n",
    "na\u00efve \u2603 \U0001f600\U0001f600 caf\u00e9",
    "\u65e5\u672c\u8a9e",
    "a\ufffdb",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_text_are_whole_characters_and_together_the_text(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer.decode, tokenizer("prompt \u00e9").input_ids)
    ids = tokenizer(text).input_ids
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_of_many_bytes_does_not_spoil_the_first_character() -> None:
    """Tokens that are single bytes, as Llama 2 has them: the decoder gives up a run of them that is not all whole."""
    inner = Tokenizer(models.BPE(byte_fallback=True))
    inner.decoder = decoders.ByteFallback()
    inner.add_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    ids = [inner.token_to_id(f"<0x{byte:02X}>") for byte in "\U0001f44d".encode()]

    def decode(some: Sequence[int]) -> str:
        return str(inner.decode(list(some), skip_special_tokens=False))

    for before in range(4):
        detokenizer = Detokenizer(decode, ids * before)
        assert "".join(map(detokenizer.push, ids)) == "\U0001f44d"
    assert Detokenizer(decode, ids[1:] * 2).push(ids[0]) == ""  # what begins nowhere has no beginning to look for


def test_a_space_that_only_a_token_before_it_brings_out_is_there() -> None:
    """Of tokens that begin with a space, as those of Llama 2, the decoder drops the one that a text begins with."""
    words = ["\u2581" + word for word in ("one", "two", "three", "four", "five", "six", "seven")]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[0]))
    inner.decoder = decoders.Metaspace()
    for length in range(1, 7):
        detokenizer = Detokenizer(lambda some: str(inner.decode(list(some))), list(range(length)))
        assert detokenizer.push(length) == f" {words[length][1:]}"


def test_an_answer_that_ends_within_a_character_says_so(tokenizer: Any) -> None:
    ids = tokenizer("a\U0001f600").input_ids[:-1]
    detokenizer = Detokenizer(tokenizer.decode, [5])
    pieces = "".join(detokenizer.push(token) for token in ids)
    assert pieces == "a"
    assert pieces + detokenizer.flush() == tokenizer.decode([5, *ids])[len(tokenizer.decode([5])) :]


def stopped(pieces: Sequence[str], words: Sequence[str]) -> str:
    stop, text = StopWords(words), ""
    for piece in pieces:
        more, ended = stop.push(piece)
        text += more
        if ended:
            return text
    return text + stop.flush()


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_text_ends_before_the_first_whole_stop_word_however_it_is_cut(pieces: list[str], words: list[str]) -> None:
    text = "".join(pieces)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(word) for word in words)]
    wanted = text
    if ends:
        head = text[: ends[0]]
        wanted = head[: -max(len(word) for word in words if head.endswith(word))]
    assert stopped(pieces, words) == wanted
    assert stopped(list(text), words) == wanted


def test_nothing_of_a_stop_word_is_shown_before_it_is_complete() -> None:
    stop = StopWords(["END."])
    assert [stop.push(piece) for piece in ("on", "e E", "N", "D", "x")] == [
        ("on", False), ("e ", False), ("", False), ("", False), ("ENDx", False),
    ]  # fmt: skip
