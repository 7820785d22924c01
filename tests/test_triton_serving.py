"""The code that runs in the server, here without it: batches against rows alone, text against whole decodes."""

from __future__ import annotations

import copy
import importlib
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from artifacts import artifact, wrapped
from hypothesis import given, settings
from hypothesis import strategies as st
from served import NEW, Reply, numbers, prompts, request, settings_of, truth
from tokenizers import Tokenizer
from triton_server import ROOT

import cdsurgery
from cdsurgery import export
from cdsurgery.export.triton.repository import ARTIFACT
from cdsurgery.export.triton.serving.cache import Rows, mask_and_positions, regroup
from cdsurgery.export.triton.serving.decoder import OrtDecoder
from cdsurgery.export.triton.serving.errors import FolderError, RequestError
from cdsurgery.export.triton.serving.scheduler import Scheduler
from cdsurgery.export.triton.serving.settings import check_files, read_settings

FAMILIES = ("llama", "qwen3_5_text")  # keys and values; a hybrid, whose other states have no axis of tokens


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(family: str, tmp_path: Path) -> Path:
    """A version folder, as far as the decoder looks."""
    (tmp_path / ARTIFACT).symlink_to(artifact(family))
    return tmp_path


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
    with pytest.raises(RequestError, match="2 slots are taken and 2 requests wait already"):
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


def test_what_each_request_asked_for_is_its_own_in_a_batch_of_different_ones(tmp_path: Path) -> None:
    """Plain beside confident decoding, an echo in a stream, and a last piece that might have begun a stop word."""
    (tmp_path / ARTIFACT).symlink_to(artifact("llama"))
    config, model = settings_of("llama"), wrapped("llama")
    scheduler = Scheduler(OrtDecoder(tmp_path, config, ("cpu", 0)), config)
    prompt = next(one for one in prompts(config.vocabulary) if truth(model, one, NEW) != plain_truth(one))
    confident, plain, echoed, held = (Reply() for _ in range(4))
    scheduler.submit(request(config, prompt, confident))
    scheduler.submit(request(config, prompt, plain, confident=False))
    scheduler.submit(request(config, prompt, echoed, stream=True, exclude_input_in_output=False))
    last = truth(model, prompt, NEW)[-1]
    scheduler.submit(request(config, prompt, held, stop_words=f"{last} and what never comes".encode()))
    while scheduler.step():
        pass
    assert confident.tokens == truth(model, prompt, NEW)
    assert plain.tokens == plain_truth(prompt)
    texts = [answer["text_output"].item().decode() for answer in echoed.outputs]
    assert len(texts) > NEW // 2
    assert "".join(texts) == "a" + numbers(truth(model, prompt, NEW))  # the text of every request here is "a"
    assert held.tokens == truth(model, prompt, NEW)


def plain_truth(prompt: list[int]) -> list[int]:
    """What the same model generates without the wrapper."""
    return truth(cdsurgery.unwrap(copy.deepcopy(wrapped("llama"))), prompt, NEW)


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


def test_other_threads_run_on_while_a_long_prompt_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    served = importlib.import_module("cdsurgery.export.triton.serving.model").TritonPythonModel()
    served._tokenizer = Tokenizer.from_file(str(ROOT / "examples" / "tiny_lm" / "tokenizer.json"))
    turns, ended = [0], threading.Event()

    def run() -> None:
        while not ended.wait(0.001):
            turns[0] += 1

    thread = threading.Thread(target=run)
    thread.start()
    before = turns[0]
    served._encode("for x in y: z(x)\n" * 60_000)  # half a second
    found = turns[0] - before
    ended.set()
    thread.join()
    assert found > 20  # none, or one, where Python's lock is kept
