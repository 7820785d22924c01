"""The code that runs in the server, here without it: batches against rows alone, text against whole decodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import artifact, wrapped
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from triton_server import ROOT

from cdsurgery import export
from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.triton.repository import ARTIFACT
from cdsurgery.export.triton.serving.cache import Rows, mask_and_positions, regroup
from cdsurgery.export.triton.serving.decoder import OrtDecoder
from cdsurgery.export.triton.serving.detokenizer import Detokenizer, StopWords
from cdsurgery.export.triton.serving.errors import FolderError, RequestError
from cdsurgery.export.triton.serving.request import parse_request
from cdsurgery.export.triton.serving.sampling import Sampler, SamplingOptions
from cdsurgery.export.triton.serving.scheduler import Scheduler
from cdsurgery.export.triton.serving.sequence import Sequence as Request
from cdsurgery.export.triton.serving.settings import Settings, check_files, read_settings
from cdsurgery.export.triton.settings import tensors

FAMILIES = ("llama", "qwen3_5_text")  # keys and values; a hybrid, whose other states have no axis of tokens
NEW = 12


def settings_of(family: str, **changes: Any) -> Settings:
    manifest = read_manifest(artifact(family))
    signature = manifest.signature
    vocabulary = int(next(spec.axes[-1] for spec in signature.results if spec.name == "logits"))
    fields: dict[str, Any] = {
        "layers": manifest.layers,
        "vocabulary": vocabulary,
        "context": 128,
        "end_tokens": (),
        "tokens": tensors(signature.tokens),
        "past": tensors(signature.past),
        "present": tensors(signature.present),
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "default_max_tokens": 16,
        "slots": 4,
        "chunk": 5,
        "queue": 100,
        "queue_timeout_seconds": None,
        "request_timeout_seconds": None,
        "threads": 1,
        "providers": {},
        "cache": None,
        "step_model": None,
        "files": {},
    }
    return Settings(**(fields | changes))


class Reply:
    """Keeps what would go to a client."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.error: RequestError | None = None
        self.gone = self.ended = False

    def send(self, outputs: dict[str, Any], final: bool) -> None:
        assert not self.ended, "a response after the last"
        self.outputs.append(outputs)
        self.ended = final

    def fail(self, error: RequestError) -> None:
        assert not self.ended
        self.error, self.ended = error, True

    def cancelled(self) -> bool:
        return self.gone

    @property
    def tokens(self) -> list[int]:
        return [int(word) for answer in self.outputs for word in answer["text_output"].item().split()]


def numbers(ids: Sequence[int]) -> str:
    """A tokenizer's decode whose text is the ids themselves."""
    return "".join(f"{token} " for token in ids)


def request(config: Settings, prompt: list[int], reply: Reply, **fields: Any) -> Request:
    tensors = {"text_input": np.array([b"a"], object), "max_tokens": np.array([NEW], np.int32)}
    given_fields = {name: np.asarray([value]) for name, value in fields.items()}
    times = {name: fields.pop(name) for name in ("deadline", "queue_deadline") if name in fields}
    given_fields = {name: value for name, value in given_fields.items() if name not in times}
    asked = parse_request(tensors | given_fields, {}, config)
    return Request(asked, prompt, reply, numbers, config.end_tokens, **times)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(family: str, tmp_path: Path) -> Path:
    """A version folder, as far as the decoder looks."""
    (tmp_path / ARTIFACT).symlink_to(artifact(family))
    return tmp_path


def prompts(vocabulary: int, count: int = 9) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, vocabulary, length).tolist() for length in generator.integers(1, 14, count)]


def truth(model: Any, prompt: list[int], length: int) -> list[int]:
    """What PyTorch generates after a prompt by itself."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else every id that is that of padding would be masked
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
    return answer[0, len(prompt) :].tolist()


def test_requests_that_join_and_leave_get_the_tokens_that_they_get_alone_from_pytorch(family: str, place: Path) -> None:
    """Prompts of 1 to 13 tokens in chunks of 5, answers of 3 to 20 tokens, four slots for nine requests."""
    config = settings_of(family)
    scheduler = Scheduler(OrtDecoder(place, config, ("cpu", 0)), config)
    asked = prompts(config.vocabulary)
    lengths = [3 + 2 * index for index in range(len(asked))]
    replies = [Reply() for _ in asked]
    for prompt, length, reply in zip(asked, lengths, replies, strict=True):
        scheduler.submit(request(config, prompt, reply, max_tokens=length, return_layers=True))
    while scheduler.step():
        pass
    model, moved = wrapped(family), 0
    for prompt, length, reply in zip(asked, lengths, replies, strict=True):
        assert reply.tokens == truth(model, prompt, length)
        moved += int((reply.outputs[0]["selected_layer"] < config.layers).sum())
    assert moved, "no token of an earlier layer: final logits would pass too"
    assert (scheduler.counts.finished, scheduler.counts.moved) == (len(asked), moved)
    assert scheduler.counts.tokens == sum(lengths)
    assert scheduler.counts.prompt_tokens == sum(map(len, asked))


def test_who_goes_away_or_runs_out_of_time_leaves_the_others_their_tokens(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT).symlink_to(artifact("llama"))
    config = settings_of("llama", queue=2, slots=2, queue_timeout_seconds=1.0)
    now = [0.0]
    scheduler = Scheduler(OrtDecoder(tmp_path, config, ("cpu", 0)), config, clock=lambda: now[0])
    asked = prompts(config.vocabulary)
    stays, goes, waits, late = (Reply() for _ in range(4))
    scheduler.submit(request(config, asked[0], stays, max_tokens=20))
    scheduler.submit(request(config, asked[1], goes, max_tokens=20))
    for _ in range(6):
        scheduler.step()
    assert scheduler.counts.running == 2
    scheduler.submit(request(config, asked[2], waits, queue_deadline=5.0))
    scheduler.submit(request(config, asked[3], late, deadline=2.0))
    with pytest.raises(RequestError, match="2 requests wait already"):
        scheduler.submit(request(config, asked[4], Reply()))
    goes.gone, now[0] = True, 1.0
    scheduler.step()
    assert goes.error is not None and goes.error.code == "CANCELLED"
    now[0] = 2.0
    scheduler.step()
    assert late.error is not None and "time was over" in str(late.error)
    while scheduler.step():
        pass
    assert stays.tokens == truth(wrapped("llama"), asked[0], 20)
    assert waits.error is None and len(waits.tokens) == NEW
    scheduler.close()
    with pytest.raises(RequestError, match="being unloaded"):
        scheduler.submit(request(config, asked[0], Reply()))


def test_a_runtime_that_fails_ends_the_requests_in_slots_and_no_more(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT).symlink_to(artifact("llama"))
    config = settings_of("llama")
    decoder = OrtDecoder(tmp_path, config, ("cpu", 0))
    scheduler = Scheduler(decoder, config)
    unlucky, later = Reply(), Reply()
    scheduler.submit(request(config, [1, 2], unlucky))
    scheduler.step()
    run, decoder.run = decoder.run, lambda *arguments: 1 / 0  # type: ignore[method-assign]
    scheduler.step()
    assert unlucky.error is not None and "ZeroDivisionError" in str(unlucky.error)
    decoder.run = run  # type: ignore[method-assign]
    scheduler.submit(request(config, [1, 2], later))
    while scheduler.step():
        pass
    assert len(later.tokens) == NEW


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_a_regrouped_cache_is_what_loops_make_of_it(data: st.DataObject) -> None:
    """Two states: tokens along axis 2, and none. Every row is found again, at the right, behind zeros."""
    groups, rows = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
        width = max(lengths) + data.draw(st.integers(0, 2))
        keys = np.zeros((len(lengths), 2, width, 3))
        fixed = np.random.default_rng(0).normal(size=(len(lengths), 4))
        for row, length in enumerate(lengths):
            keys[row, :, width - length :] = np.random.default_rng(row).normal(size=(2, length, 3))
        kept = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
        groups.append(Rows([keys, fixed], kept, [lengths[row] for row in kept]))
        rows += [(keys[row, :, width - lengths[row] :], fixed[row]) for row in kept]
    keys, fixed = regroup(groups, [2, None])
    assert keys.shape[2] == max(tokens.shape[1] for tokens, _ in rows)
    for row, (tokens, state) in enumerate(rows):
        length = tokens.shape[1]
        assert np.array_equal(keys[row, :, keys.shape[2] - length :], tokens)
        assert not keys[row, :, : keys.shape[2] - length].any()
        assert np.array_equal(fixed[row], state)


def test_masks_and_positions() -> None:
    mask, positions = mask_and_positions([1, 3, 0], 3, 2)
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert positions.tolist() == [[1, 2], [3, 4], [0, 1]]


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


LOGITS = np.array([0.0, 3.0, 1.0, 2.0, -np.inf], np.float32)


def shares(count: int = 20_000, **options: Any) -> np.ndarray:
    sampler = Sampler(SamplingOptions(seed=1, **options))
    return np.bincount([sampler.choose(LOGITS) for _ in range(count)], minlength=5) / count


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 0.7}, [0, 1, 2, 3]),
        ({"temperature": 1.0, "top_k": 2}, [1, 3]),
        ({"temperature": 1.0, "top_p": 0.8}, [1, 3]),  # 0.64 and 0.24
        ({"temperature": 1.0, "top_p": 0.6}, [1]),
        ({"temperature": 1.0, "top_p": 0.0}, [1]),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.99}, [1, 2, 3]),
    ],
)
def test_samples_have_the_probabilities_of_what_is_kept(options: dict[str, Any], kept: list[int]) -> None:
    wanted = np.zeros(5)
    wanted[kept] = torch.softmax(torch.tensor(LOGITS[kept]).double() / options["temperature"], -1).numpy()
    # Five standard deviations of a share of 20,000 draws are at most 0.018.
    assert np.abs(shares(**options) - wanted).max() < 0.018


def test_penalties_are_those_of_the_formula() -> None:
    sampler = Sampler(SamplingOptions(frequency_penalty=0.5, presence_penalty=0.6))
    assert not sampler.plain
    # Token 1: 3, 1.9, 1.4, 0.9; token 3: 2, 0.9; token 2: 1, -0.1.
    assert [sampler.choose(LOGITS) for _ in range(5)] == [1, 3, 1, 1, 2]


def test_a_version_folder_that_was_changed_is_refused_with_the_reason(shown: tuple[Path, Any], tmp_path: Path) -> None:
    folder = export.to_triton(shown[0], tmp_path / "repository", name="tiny") / "1"
    known = read_settings(folder)
    check_files(folder, known)
    data = folder / ARTIFACT / "model.onnx.data"
    whole = data.read_bytes()
    for spoiled, message in ((whole[:-1], "bytes and should have"), (b"\x00" + whole[1:], "was changed")):
        data.write_bytes(spoiled)
        with pytest.raises(FolderError, match=message):
            check_files(folder, known)
    data.unlink()
    with pytest.raises(FolderError, match="is missing"):
        check_files(folder, known)
    (folder / "serving.json").write_text('{"schema_version": 99}')
    with pytest.raises(FolderError, match="schema version 99"):
        read_settings(folder)
    (folder / "serving.json").write_text("[]")
    with pytest.raises(FolderError, match="cannot be read"):
        read_settings(folder)
