"""What `to_triton` writes, in a running tritonserver: the texts are those of `export.load(..).generate`."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from triton_server import ENVIRONMENT, ROOT, Server, serving

import cdsurgery
from cdsurgery import export
from cdsurgery.export.artifact.manifest import describe_files
from cdsurgery.trace import trace_generation

TINY = ROOT / "examples" / "tiny_lm"
BEGINNINGS = ("def ", "class ", "import ", "    return ", "self.", "# ", "raise ", "for i in ")
ENDINGS = ("get", "_name", "None", "read(", "x", "value", "os", "test", "self", "error", "str", "is ", "len(", "data")
PROMPTS = [f"{beginning}{ending}" for beginning in BEGINNINGS[:6] for ending in ENDINGS[:4]]
NEW = 32
if "TRITON_ALL_PROMPTS" in os.environ:  # what the documentation reports: minutes
    PROMPTS = [f"{b}{e}" for b in (*BEGINNINGS, "if ", "with ") for e in (*ENDINGS, "a", "1", "_", "i", "open(", "[")]
    NEW = 64
LONG = "def f(x):\n    return x\n" * 60  # several chunks of prompt
PYTHON = ENVIRONMENT / "bin" / "python"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make test builds the environment .venv-triton")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_lm") / "artifact"
    return export.to_onnx(cdsurgery.wrap(TINY), folder, tokenizer=AutoTokenizer.from_pretrained(TINY))


@pytest.fixture(scope="module")
def tokenizer(artifact: Path) -> Any:
    return AutoTokenizer.from_pretrained(artifact)


@pytest.fixture(scope="module")
def runner(artifact: Path) -> export.OnnxRunner:
    return export.load(artifact)


@pytest.fixture(scope="module")
def wanted(runner: export.OnnxRunner, tokenizer: Any) -> dict[str, str]:
    """What the same artifact writes after every prompt, one at a time, in our own runner."""
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = runner.generate(ids, max_new_tokens=NEW, do_sample=False)[0]
        texts[prompt] = tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True)
    assert len(set(texts.values())) > len(PROMPTS) // 2, "equal answers would hide mixed streams"
    return texts


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
def repository(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("triton")
    folder = place / "repository"
    options = export.ServingOptions
    export.to_triton(artifact, folder, name="tiny", options=options(slots=16, chunk=32, queue=64))
    export.to_triton(artifact, folder, name="narrow", options=options(slots=1, queue=1, queue_timeout_seconds=0.3))
    export.to_triton(artifact, folder, name="hasty", options=options(request_timeout_seconds=0.2, warm_up=False))
    export.to_triton(artifact, folder, name="broken")
    data = folder / "broken" / "1" / "artifact" / "model.onnx.data"
    with data.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x01\x02\x03\x04")
    beyond = changed_artifact(artifact, place / "beyond", add_token)
    export.to_triton(beyond, folder, name="beyond")
    spoiled = changed_artifact(artifact, place / "nan", spoil_weights)
    export.to_triton(spoiled, folder, name="nan", options=options(warm_up=False))
    export.to_triton(artifact, folder, name="through", options=options(step="onnxruntime", bls=True))
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    models = ("tiny", "narrow", "hasty", "beyond", "nan")
    with serving(
        repository, log, "--model-control-mode=explicit", *(f"--load-model={name}" for name in models)
    ) as running:
        yield running


def grpc(server: Server, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """What tritonclient's stream makes of the jobs, in a process of its own environment."""
    script = ROOT / "tests" / "clients" / "triton_grpc.py"
    document = json.dumps({"url": f"127.0.0.1:{server.grpc}", "jobs": jobs})
    done = subprocess.run([PYTHON, "-I", script], input=document, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def job(text: Any, form: str = "kserve", model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return {"model": model, "form": form, "fields": {"text_input": text, **fields}}


def joined(events: list[dict[str, Any]]) -> str:
    return "".join(event["text_output"] for event in events)


def settle(server: Server, name: str, value: float, seconds: float = 5) -> None:
    """Wait until a gauge has a value; Triton is told of it twice a second."""
    end = time.monotonic() + seconds
    while server.counter(name) != value:
        assert time.monotonic() < end, f"{name} is {server.counter(name)}, not {value}"
        time.sleep(0.05)


def test_generate_alone_equals_our_runner(server: Server, wanted: dict[str, str]) -> None:
    found = {prompt: server.generate("tiny", prompt, max_tokens=NEW)["text_output"] for prompt in PROMPTS}
    assert found == wanted


def test_16_streams_at_a_time_equal_our_runner_and_come_in_pieces(server: Server, wanted: dict[str, str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        events = list(pool.map(lambda prompt: server.stream("tiny", prompt, max_tokens=NEW), PROMPTS))
    assert {prompt: joined(pieces) for prompt, pieces in zip(PROMPTS, events, strict=True)} == wanted
    assert sum(map(len, events)) > len(PROMPTS) * NEW // 2


def test_grpc_streams_all_at_once_equal_our_runner(server: Server, wanted: dict[str, str]) -> None:
    answers = grpc(server, *(job(prompt, max_tokens=NEW, stream=True) for prompt in PROMPTS))
    assert all(answer["done"] for answer in answers)
    assert {prompt: "".join(answer["texts"]) for prompt, answer in zip(PROMPTS, answers, strict=True)} == wanted


def test_requests_in_the_form_of_the_openai_frontend_equal_our_runner(server: Server, wanted: dict[str, str]) -> None:
    jobs = [
        job(prompt, "openai", max_tokens=NEW, temperature=0.0, seed=7, stream=stream)
        for prompt in PROMPTS[:8]
        for stream in (False, True)
    ]
    answers = grpc(server, *jobs)
    for one, answer in zip(jobs, answers, strict=True):
        assert "".join(answer["texts"]) == wanted[one["fields"]["text_input"]]
        assert sum(answer["counts"]) == NEW  # it adds up what every response says
        if not one["fields"]["stream"]:
            assert len(answer["texts"]) == 1


@pytest.mark.skipif("TRITON_SERVER_SOURCE" not in os.environ, reason="TRITON_SERVER_SOURCE: a checkout of the server")
def test_the_openai_frontends_own_code_makes_requests_that_are_answered(server: Server, wanted: dict[str, str]) -> None:
    frontend = Path(os.environ["TRITON_SERVER_SOURCE"]) / "python" / "openai" / "openai_frontend"
    fields = {"model": "tiny", "max_tokens": NEW, "temperature": 0, "stop": ["never comes"], "seed": 3, "echo": False}
    jobs = [fields | {"prompt": prompt, "stream": stream} for prompt in PROMPTS for stream in (False, True)]
    script = ROOT / "tests" / "clients" / "openai_frontend.py"
    done = subprocess.run(
        [PYTHON, "-I", script, frontend],
        input=json.dumps({"url": f"127.0.0.1:{server.grpc}", "jobs": jobs}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for one, answer in zip(jobs, json.loads(done.stdout), strict=True):
        assert "".join(answer["texts"]) == wanted[one["prompt"]]
        assert answer["count"] == NEW
        assert {"frequency_penalty", "seed", "stop_words", "top_p"} <= set(answer["fields"])


def test_layers_are_those_of_the_trace_and_plain_decoding_is_that_of_the_plain_model(
    server: Server, runner: export.OnnxRunner, tokenizer: Any
) -> None:
    prompt = "def read(self, size=None):"
    inputs = dict(tokenizer(prompt, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    trace = trace_generation(runner, inputs, layers=12, max_new_tokens=NEW, do_sample=False)
    assert trace.moved and trace.changed, "nothing to see in this text"
    found = server.generate("tiny", prompt, max_tokens=NEW, return_layers=True, return_num_input_tokens=True)
    assert found["selected_layer"] == [token.selected_layer for token in trace.tokens]
    assert found["changed"] == [token.changed for token in trace.tokens]
    entropies = [token.entropy[token.depth] for token in trace.tokens]
    np.testing.assert_allclose(found["entropy"], entropies, atol=1e-4)  # float32 through 12 layers, another batch shape
    assert found["num_input_tokens"] == inputs["input_ids"].shape[1]

    model = cdsurgery.unwrap(cdsurgery.wrap(TINY))
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0]
    plain = server.generate("tiny", prompt, max_tokens=NEW, confident=False, return_layers=True)
    assert plain["text_output"] == tokenizer.decode(ids[inputs["input_ids"].shape[1] :])
    assert plain["text_output"] != found["text_output"]
    assert set(plain["selected_layer"]) == {12}
    assert not any(plain["changed"])


def test_a_seed_gives_the_same_sample_alone_and_in_company(server: Server) -> None:
    def sample(seed: int) -> str:
        fields = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "seed": seed, "frequency_penalty": 0.5}
        return str(server.generate("tiny", "def ", max_tokens=NEW, **fields)["text_output"])

    alone = [sample(seed) for seed in range(6)]
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(sample, range(6))) == alone


def test_stop_words_end_the_answer_before_them_and_echo_repeats_the_prompt(
    server: Server, wanted: dict[str, str]
) -> None:
    prompt = next(prompt for prompt in PROMPTS if len(wanted[prompt].strip()) > 40)
    text = wanted[prompt]
    middle = len(text) // 2
    stop = text[middle : middle + 5]  # tokens begin and end elsewhere
    cut = text[: text.index(stop)]
    fields = {"max_tokens": NEW, "stop_words": [stop, "never comes"]}
    assert server.generate("tiny", prompt, **fields)["text_output"] == cut
    assert joined(server.stream("tiny", prompt, **fields)) == cut
    echoed = server.generate("tiny", prompt, exclude_input_in_output=False, **fields)
    assert echoed["text_output"] == prompt + cut


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
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_an_error_and_its_neighbour_an_answer(
    server: Server, wanted: dict[str, str], name: str
) -> None:
    fields, message = BAD[name]
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(server.generate, "tiny", PROMPTS[0], max_tokens=NEW)
        status, answer = server.post("/v2/models/tiny/generate", {"text_input": "def "} | fields)
        assert status in (400, 500)
        assert message in answer["error"]
        assert neighbour.result()["text_output"] == wanted[PROMPTS[0]]


def test_what_only_binary_protocols_can_send_gets_an_error(server: Server) -> None:
    (answer,) = grpc(server, job({"hex": "66ff00"}))
    assert "text_input is not UTF-8" in answer["error"]["message"]
    (answer,) = grpc(server, job("a", temperature=float("nan")))
    assert "temperature is nan" in answer["error"]["message"]
    (answer,) = grpc(server, job("a", max_tokens=[1, 2]))
    assert "max_tokens" in answer["error"]["message"]


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
        "1 requests wait already, which is this model's limit. Send it again later.",
        "No slot became free within 0.3 seconds.",
        "answer",
    ]
    status, answer = server.post("/v2/models/hasty/generate", {"text_input": "import ", "max_tokens": 1000})
    assert (status, answer["error"]) == (400, "The request's time was over before its answer was.")


def test_clients_that_go_away_free_their_slots(server: Server, wanted: dict[str, str]) -> None:
    before = server.counter("cdsurgery_cancelled_requests_total")
    sockets = []
    body = json.dumps({"text_input": "import ", "max_tokens": 1000, "stream": True}).encode()
    for _ in range(40):  # more than there are slots
        client = socket.create_connection(("127.0.0.1", server.http))
        head = f"POST /v2/models/tiny/generate_stream HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        sockets.append(client)
    settle(server, "cdsurgery_queued_requests", 40 - 16)
    for client in sockets:
        client.close()
    settle(server, "cdsurgery_running_requests", 0)
    assert server.counter("cdsurgery_queued_requests") == 0
    assert server.counter("cdsurgery_cancelled_requests_total") == before + 40
    assert server.generate("tiny", PROMPTS[0], max_tokens=NEW)["text_output"] == wanted[PROMPTS[0]]


def test_metrics_count_what_the_answers_say(server: Server) -> None:
    names = ("tokens", "moved_tokens", "depth", "prompt_tokens", "finished_requests")
    settle(server, "cdsurgery_running_requests", 0)
    before = {name: server.counter(f"cdsurgery_{name}_total") for name in names}
    answer = server.generate("tiny", "import ", max_tokens=NEW, return_layers=True, return_num_input_tokens=True)
    depths = [12 - layer for layer in answer["selected_layer"]]
    more = [NEW, sum(depth > 0 for depth in depths), sum(depths), answer["num_input_tokens"], 1]
    for name, grown in zip(names, more, strict=True):
        settle(server, f"cdsurgery_{name}_total", before[name] + grown)


def test_a_corrupted_artifact_does_not_load_and_the_log_says_why(server: Server) -> None:
    status, answer = server.post("/v2/repository/models/broken/load")
    assert status == 400, answer
    assert "model.onnx.data was changed: its sha256 is not" in server.text()
    assert server.generate("tiny", "def ", max_tokens=2)["text_output"]


def test_the_step_model_is_accepted_up_to_the_backend_that_this_server_lacks(server: Server) -> None:
    status, answer = server.post("/v2/repository/models/through_step/load")
    assert status == 400
    assert "unable to find backend library for backend 'onnxruntime'" in answer["error"]


STEP = """
from pathlib import Path
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.session = onnxruntime.InferenceSession(str(Path(__file__).parent / "model.onnx"))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        feed = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        names = list(request.requested_output_names())
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(n, v) for n, v in zip(names, self.session.run(names, feed))]
        )
"""


def test_through_the_step_model_the_text_is_the_same(server: Server, repository: Path, wanted: dict[str, str]) -> None:
    """The onnxruntime backend is not here; a Python model with the same config and graph takes its place."""
    step = repository / "through_step"
    config = (step / "config.pbtxt").read_text()
    (step / "config.pbtxt").write_text(
        config.replace('"onnxruntime"', '"python"').replace('default_model_filename: "model.onnx"\n', "")
    )
    (step / "1" / "model.py").write_text(STEP)
    for name in ("through_step", "through"):
        status, answer = server.post(f"/v2/repository/models/{name}/load")
        assert status == 200, answer
    prompts = PROMPTS[:6]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda p: server.generate("through", p, max_tokens=NEW)["text_output"], prompts))
    assert found == [wanted[prompt] for prompt in prompts]


def test_a_reload_under_load_loses_no_request(server: Server, repository: Path, wanted: dict[str, str]) -> None:
    (repository / "tiny" / "config.pbtxt").touch()  # else Triton sees nothing to load again
    stub = server.stub()
    with ThreadPoolExecutor(9) as pool:
        running = [pool.submit(server.generate, "tiny", prompt, max_tokens=NEW) for prompt in PROMPTS[:8] * 4]
        time.sleep(0.2)
        status, answer = server.post("/v2/repository/models/tiny/load")
        assert status == 200, answer
        for prompt, one in zip(PROMPTS[:8] * 4, running, strict=True):
            assert one.result()["text_output"] == wanted[prompt]
    assert server.stub() != stub


def test_after_its_process_was_killed_the_model_says_so_until_it_is_loaded_again(
    server: Server, wanted: dict[str, str]
) -> None:
    status, _ = server.post("/v2/repository/models/tiny/unload")
    assert status == 200
    status, _ = server.post("/v2/repository/models/tiny/load")  # now it is the newest stub
    os.kill(server.stub(), signal.SIGKILL)
    status, answer = server.post("/v2/models/tiny/generate", {"text_input": PROMPTS[0]}, timeout=10)
    assert (status, answer["error"]) == (400, "Stub process 'tiny_0_0' is not healthy.")
    for verb in ("unload", "load"):
        assert server.post(f"/v2/repository/models/tiny/{verb}")[0] == 200
    assert server.generate("tiny", PROMPTS[0], max_tokens=NEW)["text_output"] == wanted[PROMPTS[0]]


def test_sigterm_lets_streams_end(repository: Path, tmp_path: Path) -> None:
    with serving(repository, tmp_path / "log", "--model-control-mode=explicit", "--load-model=tiny") as short_lived:
        with ThreadPoolExecutor(2) as pool:
            streams = [pool.submit(short_lived.stream, "tiny", "import ", max_tokens=300) for _ in range(2)]
            settle(short_lived, "cdsurgery_running_requests", 2)
            short_lived.process.send_signal(signal.SIGTERM)
            first, second = (joined(stream.result()) for stream in streams)
        assert first == second
        assert len(first) > 300
        assert short_lived.process.wait(timeout=20) == 0
