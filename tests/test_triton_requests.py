"""Requests to a running tritonserver that are bad, late, too many or given up get a reason, and others their text."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer
from triton_server import Server, job, needs_server, own_texts, serving

from cdsurgery import export
from cdsurgery.export.artifact.manifest import describe_files

PROMPT, NEW = "def get", 32
LONG = "def f(x):\n    return x\n" * 60  # several chunks of prompt

pytestmark = needs_server


@pytest.fixture(scope="module")
def wanted(tiny_lm: Path) -> str:
    return own_texts(tiny_lm, [PROMPT], NEW)[PROMPT]


def changed_artifact(artifact: Path, place: Path, change: Callable[[Path], None]) -> Path:
    """A copy with other files, and a manifest that says so."""
    shutil.copytree(artifact, place)
    change(place)
    manifest = json.loads((place / "cdsurgery.json").read_text())
    manifest["files"] = describe_files(place)
    (place / "cdsurgery.json").write_text(json.dumps(manifest))
    return place


def add_token(folder: Path) -> None:
    """A tokenizer with an entry more than the model has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(folder)


def spoil_weights(folder: Path) -> None:
    weights = np.fromfile(folder / "model.onnx.data", np.float32)
    weights[:] = np.nan
    weights.tofile(folder / "model.onnx.data")


@pytest.fixture(scope="module")
def server(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("triton")
    beyond = changed_artifact(tiny_lm, place / "beyond", add_token)
    spoiled = changed_artifact(tiny_lm, place / "nan", spoil_weights)
    models: dict[str, tuple[Path, dict[str, Any]]] = {
        "tiny": (tiny_lm, {"slots": 16, "chunk": 32, "queue": 64, "unary": True}),
        "narrow": (tiny_lm, {"slots": 1, "queue": 1, "queue_timeout_seconds": 0.3}),
        "hasty": (tiny_lm, {"request_timeout_seconds": 0.2, "warm_up": False}),
        "beyond": (beyond, {}),
        "nan": (spoiled, {"warm_up": False}),
    }
    for name, (artifact, options) in models.items():
        export.to_triton(
            artifact, place / "repository", name=name, options=export.ServingOptions(**{"unary": False} | options)
        )
    with serving(place / "repository", place / "triton.log") as running:
        yield running


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"tempreature": 0.5}, "Unknown fields: tempreature"),
    "type": ({"max_tokens": "ten"}, "Unable to parse"),
    "many": ({"max_tokens": 10**9}, "the context holds 1024"),
    "none": ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    "negative temperature": ({"temperature": -0.5}, "temperature is -0.5"),
    "top_p": ({"top_p": 1.5}, "it must be from 0 to 1"),
    "top_k": ({"top_k": -3}, "top_k is -3"),
    "penalty": ({"presence_penalty": 9}, "it must be from -2 to 2"),
    "seed": ({"seed": -1}, "Unable to parse"),
    "empty": ({"text_input": ""}, "text_input is empty"),
    "megabyte": ({"text_input": "x" * 1_000_000}, "text_input has 1000000 characters"),
    "too long": ({"text_input": LONG * 2}, "the context holds 1024"),
    "two texts": ({"text_input": ["a", "b"]}, ""),
    "empty stop word": ({"stop_words": ["a", ""]}, "stop_words holds an empty text"),
    "many stop words": ({"stop_words": ["a"] * 65}, "stop_words holds 65 texts; it may hold 64"),
    "long stop words": ({"stop_words": ["a" * 4000, "b" * 97]}, "stop_words holds 4097 characters; it may hold 4096"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_an_error_and_its_neighbour_an_answer(server: Server, wanted: str, name: str) -> None:
    fields, message = BAD[name]
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(server.generate, "tiny", PROMPT, max_tokens=NEW)
        for model in ("tiny", "tiny_unary"):
            status, answer = server.post(f"/v2/models/{model}/generate", {"text_input": "def "} | fields)
            assert status in (400, 500)
            assert message in answer["error"]
        assert neighbour.result()["text_output"] == wanted


@pytest.mark.parametrize("model", ["tiny", "tiny_unary"])
def test_what_only_binary_protocols_can_send_gets_an_error(server: Server, model: str) -> None:
    bad = {
        "text_input is not UTF-8": job({"hex": "66ff00"}, model=model),
        "temperature is nan": job("a", temperature=float("nan"), model=model),
        "max_tokens": job("a", max_tokens=[1, 2], model=model),
        "The request's time was over before its answer was.": job("import ", max_tokens=1000, timeout=1, model=model),
    }
    if model == "tiny":  # a stream names no request with its error
        answers = [server.client(one)[0] for one in bad.values()]
    else:
        answers = server.client(*bad.values(), way="unary")
    for message, answer in zip(bad, answers, strict=True):
        assert message in answer["error"]["message"]


def test_an_output_that_is_asked_for_by_name_needs_its_flag(server: Server) -> None:
    def asked(*outputs: str, **flags: bool) -> tuple[int, Any]:
        fields = {"text_input": ("BYTES", PROMPT)} | {name: ("BOOL", value) for name, value in flags.items()}
        inputs = [{"name": n, "datatype": kind, "shape": [1, 1], "data": [v]} for n, (kind, v) in fields.items()]
        body = {"inputs": inputs, "outputs": [{"name": name} for name in outputs]}
        return server.post("/v2/models/tiny_unary/infer", body)

    for output, flag in (("entropy", "return_layers"), ("num_input_tokens", "return_num_input_tokens")):
        status, answer = asked("text_output", output)
        assert status in (400, 500)
        assert f"{output} is asked for, and comes with {flag}: true. Set it." in answer["error"]
        status, answer = asked("text_output", output, **{flag: True})
        assert status == 200
        assert {one["name"] for one in answer["outputs"]} == {"text_output", output}


def test_the_twin_refuses_a_stream_and_says_who_has_one(server: Server) -> None:
    status, answer = server.post("/v2/models/tiny_unary/generate", {"text_input": "def ", "stream": True})
    assert (status, answer["error"]) == (400, "stream is true, and tiny_unary answers once. Ask tiny for a stream.")
    status, answer = server.post("/v2/models/tiny/infer", {"inputs": []})
    assert status == 501, "Triton takes unary requests to decoupled models now: the twin has nothing to do"


def test_16_unary_requests_are_in_slots_at_the_same_time(server: Server) -> None:
    server.settle("cdsurgery_running_requests", 0)
    with ThreadPoolExecutor(16) as pool:
        fields = {"max_tokens": 200, "return_num_output_tokens": True}  # longer than the gauge takes to be shown
        asked = [pool.submit(server.generate, "tiny_unary", "import ", **fields) for _ in range(16)]
        server.settle("cdsurgery_running_requests", 16)
        assert {one.result()["num_output_tokens"] for one in asked} == {200}


def test_ids_beyond_the_model_and_weights_that_are_no_numbers_end_their_request(server: Server) -> None:
    assert server.generate("beyond", "def ", max_tokens=2)["text_output"]
    status, answer = server.post("/v2/models/beyond/generate", {"text_input": "def <beyond>"})
    assert (status, "token id 4096" in answer["error"]) == (400, True)
    status, answer = server.post("/v2/models/nan/generate", {"text_input": "def "})
    assert (status, answer["error"]) == (400, "The model's logits are NaN or infinite.")


def test_a_full_queue_and_waiting_too_long_are_errors_with_reasons(server: Server) -> None:
    def ask(number: int) -> str:
        time.sleep(0.05 * number)
        status, answer = server.post("/v2/models/narrow/generate", {"text_input": "import ", "max_tokens": 500})
        return "answer" if status == 200 else answer["error"]

    with ThreadPoolExecutor(3) as pool:
        found = sorted(pool.map(ask, range(3)))
    assert found == [
        "All 1 slots are taken and 1 requests wait already, which is this model's limit. Send it again later.",
        "No slot became free within 0.3 seconds.",
        "answer",
    ]
    status, answer = server.post("/v2/models/hasty/generate", {"text_input": "import ", "max_tokens": 1000})
    assert (status, answer["error"]) == (400, "The request's time was over before its answer was.")


def test_clients_that_go_away_free_their_slots(server: Server, wanted: str) -> None:
    before = server.counter("cdsurgery_cancelled_requests_total")
    sockets = []
    body = json.dumps({"text_input": "import ", "max_tokens": 1000, "stream": True}).encode()
    for _ in range(40):  # more than there are slots
        client = socket.create_connection(("127.0.0.1", server.http))
        head = f"POST /v2/models/tiny/generate_stream HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        sockets.append(client)
    server.settle("cdsurgery_queued_requests", 40 - 16)
    for client in sockets:
        client.close()
    server.settle("cdsurgery_running_requests", 0)
    assert server.counter("cdsurgery_queued_requests") == 0
    assert server.counter("cdsurgery_cancelled_requests_total") == before + 40
    assert server.generate("tiny", PROMPT, max_tokens=NEW)["text_output"] == wanted


def test_metrics_count_what_the_answers_say(server: Server) -> None:
    names = ("tokens", "moved_tokens", "depth", "prompt_tokens", "finished_requests", "refused_requests")
    server.settle("cdsurgery_running_requests", 0)
    time.sleep(1)  # twice what may pass until Triton is told of the last request of the test before
    before = {name: server.counter(f"cdsurgery_{name}_total") for name in names}
    server.post("/v2/models/tiny/generate", {"text_input": ""})
    answer = server.generate("tiny", "import ", max_tokens=NEW, return_layers=True, return_num_input_tokens=True)
    depths = [12 - layer for layer in answer["selected_layer"]]
    more = [NEW, sum(depth > 0 for depth in depths), sum(depths), answer["num_input_tokens"], 1, 1]
    for name, grown in zip(names, more, strict=True):
        server.settle(f"cdsurgery_{name}_total", before[name] + grown)


def test_a_long_prompt_does_not_hold_up_a_stream_that_runs(server: Server) -> None:
    """With chunks of 32, a prompt of 540 tokens is 17 steps, in which the other stream must go on."""
    order: list[str] = []

    def read(name: str, text: str, tokens: int) -> None:
        body = {"text_input": text, "max_tokens": tokens, "stream": True}
        with closing(http.client.HTTPConnection("127.0.0.1", server.http)) as connection:
            connection.request("POST", "/v2/models/tiny/generate_stream", json.dumps(body))
            with connection.getresponse() as response:
                while line := response.readline():
                    if line.startswith(b"data:"):
                        order.append(name)
                        if name == "short" and order.count("short") == 5:
                            late.start()

    late = threading.Thread(target=read, args=("long", LONG, 4))
    read("short", "import ", 200)
    late.join()
    before = order.index("long")
    assert before - 5 >= 5, f"the long prompt's first token came after {before - 5} tokens of the running stream"
    assert order.count("short") > before, "the short stream had ended before"
