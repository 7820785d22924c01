"""The unary twin without a server: who answers, what is handed on, and whose cancellation ends whose request."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton_server import ROOT

CODE = ROOT / "export" / "triton" / "unary" / "model.py"


class Error(Exception):
    """TritonError: a message and a code."""

    INVALID_ARG = "INVALID_ARG"

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        super().__init__(message)
        self.code = code


class Response:
    """InferenceResponse, of either kind."""

    def __init__(self, output_tensors: list[Any] | None = None, error: Error | None = None) -> None:
        self.tensors, self.failed = output_tensors or [], error

    def output_tensors(self) -> list[Any]:
        return self.tensors

    def has_error(self) -> bool:
        return self.failed is not None

    def error(self) -> Error | None:
        return self.failed


class Responses:
    """The iterator that BLS returns: it ends when it is told what to say, or is cancelled."""

    def __init__(self) -> None:
        self.told: list[Response] = []
        self.ready, self.cancelled = threading.Event(), False

    def say(self, *responses: Response) -> None:
        self.told = list(responses)
        self.ready.set()

    def cancel(self) -> None:
        self.cancelled = True
        self.say(Response(error=Error("cancelled", "CANCELLED")))

    def __iter__(self) -> Iterator[Response]:
        assert self.ready.wait(10)
        yield from self.told


class Sender:
    """The response sender of a request; one response may be sent, and it must be the last."""

    def __init__(self) -> None:
        self.sent: list[Response] = []
        self.done, self.gone = threading.Event(), False

    def send(self, response: Response, flags: int) -> None:
        assert flags == "FINAL"
        self.sent.append(response)
        self.done.set()

    def is_cancelled(self) -> bool:
        assert not self.sent, "Triton may have forgotten the request"
        return self.gone

    def answer(self) -> Response:
        assert self.done.wait(10)
        (only,) = self.sent
        return only


def tensor(name: str, value: Any) -> Any:
    return SimpleNamespace(name=lambda: name, as_numpy=lambda: np.array([[value]]))


class Request:
    """What Triton hands to `execute`."""

    def __init__(self, *tensors: Any, parameters: str = "", timeout: int = 0) -> None:
        self.tensors, self.told, self.time, self.sender = list(tensors), parameters, timeout, Sender()

    def get_response_sender(self) -> Sender:
        return self.sender

    def inputs(self) -> list[Any]:
        return self.tensors

    def parameters(self) -> str:
        return self.told

    def timeout(self) -> int:
        return self.time

    def request_id(self) -> str:
        return "seven"

    def requested_output_names(self) -> set[str]:
        return {"text_output"}


@pytest.fixture
def calls() -> list[SimpleNamespace]:
    """The requests to the other model, in the order in which they were made."""
    return []


@pytest.fixture
def twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[SimpleNamespace]) -> Iterator[Any]:
    utils: Any = ModuleType("triton_python_backend_utils")

    def call(**fields: Any) -> SimpleNamespace:
        responses = Responses()
        calls.append(SimpleNamespace(fields=fields, responses=responses, exec=lambda decoupled: responses))
        return calls[-1]

    utils.TritonError, utils.InferenceResponse, utils.InferenceRequest = Error, Response, call
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL, utils.TRITONSERVER_MEMORY_CPU = "FINAL", "CPU"
    utils.PreferredMemory = lambda *place: place
    utils.get_input_tensor_by_name = lambda request, name: next((t for t in request.inputs() if t.name() == name), None)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    shutil.copy(CODE, tmp_path)
    (tmp_path / "unary.json").write_text(json.dumps({"model": "tiny", "requests": 2}))
    spec = importlib.util.spec_from_file_location("twin", tmp_path / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_name": "tiny_unary"})
    yield model
    for one in calls:
        one.responses.say(Response(error=Error("the test is over")))
    model.finalize()


def text(value: str) -> Response:
    return Response([tensor("text_output", value)])


def test_each_request_is_handed_on_whole_and_gets_its_own_answer_whoever_comes_first(twin: Any, calls: Any) -> None:
    first = Request(tensor("text_input", "a"), parameters='{"odd": 0.5}', timeout=700)
    second = Request(tensor("text_input", "b"), tensor("stream", False))
    assert twin.execute([first, second]) is None, "Triton takes answers from the senders then"
    assert calls[0].fields == {
        "model_name": "tiny",
        "requested_output_names": ["text_output"],
        "inputs": first.tensors,
        "request_id": "seven",
        "parameters": {"odd": "0.5"},
        "timeout": 700,
        "preferred_memory": ("CPU", 0),
    }
    assert calls[1].fields["inputs"] == second.tensors
    calls[1].responses.say(text("of b"), Response())  # a model may close with an empty response
    assert second.sender.answer().tensors[0].as_numpy().item() == "of b"
    assert not first.sender.sent
    calls[0].responses.say(Response(), text("of a"))
    assert first.sender.answer().tensors[0].as_numpy().item() == "of a"


def test_a_stream_is_refused_without_a_call(twin: Any, calls: Any) -> None:
    streams = Request(tensor("text_input", "a"), tensor("stream", True))
    twin.execute([streams])
    error = streams.sender.answer().failed
    assert (str(error), error and error.code) == (
        "stream is true, and tiny_unary answers once. Ask tiny for a stream.",
        "INVALID_ARG",
    )
    assert not calls


def test_errors_come_back_as_they_are_and_silence_is_one(twin: Any, calls: Any) -> None:
    refused, silent, broken = (Request(tensor("text_input", "a")) for _ in range(3))
    twin.execute([refused])
    wrong = Error("max_tokens is 0; it must be at least 1.", "INVALID_ARG")
    calls[0].responses.say(Response(error=wrong))
    assert refused.sender.answer().failed is wrong
    twin.execute([silent])
    calls[1].responses.say(Response())
    assert str(silent.sender.answer().failed) == "tiny sent no answer."
    twin.execute([broken])
    calls[2].responses.say(None)  # type: ignore[arg-type]
    assert "has no attribute 'has_error'" in str(broken.sender.answer().failed)


def test_who_goes_away_cancels_the_request_to_the_model_and_no_other(twin: Any, calls: Any) -> None:
    goes, stays = Request(tensor("text_input", "a")), Request(tensor("text_input", "b"))
    twin.execute([goes, stays])
    goes.sender.gone = True
    assert str(goes.sender.answer().failed) == "cancelled"
    time.sleep(0.2)  # twice the time between two looks
    assert calls[0].responses.cancelled
    assert not calls[1].responses.cancelled
    calls[1].responses.say(text("of b"))
    assert stays.sender.answer().tensors[0].as_numpy().item() == "of b"


def test_a_triton_that_cannot_cancel_is_left_to_finish(twin: Any, calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 2.51: its iterator has no `cancel`."""
    monkeypatch.delattr(Responses, "cancel")
    goes = Request(tensor("text_input", "a"))
    twin.execute([goes])
    goes.sender.gone = True
    time.sleep(0.2)
    assert not goes.sender.sent
    calls[0].responses.say(text("late"))
    assert goes.sender.answer().tensors[0].as_numpy().item() == "late"
    time.sleep(0.2)
