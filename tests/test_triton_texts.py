"""Texts of a running tritonserver, asked for in every way that it has, are those of `export.load(..).generate`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from triton_server import PYTHON, ROOT, Server, job, joined, needs_server, own_texts, serving

import cdsurgery
from cdsurgery import export
from cdsurgery.trace import trace_generation

TINY = ROOT / "examples" / "tiny_lm"
BEGINNINGS = ("def ", "class ", "import ", "    return ", "self.", "# ", "raise ", "for i in ", "if ", "with ")
ENDINGS = ("get", "_name", "None", "read(", "x", "value", "os", "test", "self", "error", "str", "is ", "len(", "data")
PROMPTS = [f"{beginning}{ending}" for beginning in BEGINNINGS[:6] for ending in ENDINGS[:4]]
NEW, ALONE = 32, 4  # tokens an answer; prompts that go one at a time, for which the others would wait
if "TRITON_ALL_PROMPTS" in os.environ:  # what the documentation reports: minutes
    PROMPTS = [f"{b}{e}" for b in BEGINNINGS for e in (*ENDINGS, "a", "1", "_", "i", "open(", "[")]
    NEW, ALONE = 64, len(PROMPTS)

pytestmark = needs_server


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.fixture(scope="module")
def wanted(tiny_lm: Path) -> dict[str, str]:
    texts = own_texts(tiny_lm, PROMPTS, NEW)
    assert len(set(texts.values())) > len(PROMPTS) // 2, "equal answers would hide mixed streams"
    return texts


@pytest.fixture(scope="module")
def lazy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that does not measure the entropies of layers that the scan does not reach."""
    model = cdsurgery.wrap(folder, lookback=3)
    place = tmp_path_factory.mktemp("lazy") / "artifact"
    return export.to_onnx(model, place, scan="lazy", tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def repository(tiny_lm: Path, lazy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("triton") / "repository"
    options = export.ServingOptions
    export.to_triton(tiny_lm, place, name="tiny", options=options(slots=16, chunk=32, queue=64))
    export.to_triton(tiny_lm, place, name="through", options=options(step="onnxruntime", bls=True, unary=False))
    export.to_triton(lazy, place, name="lazy", options=options(unary=False))
    return place


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    loaded = (f"--load-model={name}" for name in ("tiny", "tiny_unary", "lazy"))
    with serving(repository, log, "--model-control-mode=explicit", *loaded) as running:
        yield running


def generate(server: Server, prompts: list[str], at_once: int) -> list[str]:
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(lambda prompt: server.generate("tiny", prompt, max_tokens=NEW), prompts)
        return [answer["text_output"] for answer in answers]


def generate_stream(server: Server, prompts: list[str], at_once: int) -> list[str]:
    with ThreadPoolExecutor(at_once) as pool:
        streams = list(pool.map(lambda prompt: server.stream("tiny", prompt, max_tokens=NEW), prompts))
    assert sum(map(len, streams)) > len(prompts) * NEW // 2, "text must come as it is made"
    return [joined(pieces) for pieces in streams]


def grpc_stream(server: Server, prompts: list[str], at_once: int) -> list[str]:
    jobs = [job(prompt, max_tokens=NEW, stream=True) for prompt in prompts]
    answers = server.client(*jobs, at_once=at_once)
    assert all(answer["done"] for answer in answers)
    return ["".join(answer["texts"]) for answer in answers]


def unary(server: Server, prompts: list[str], at_once: int, way: str = "unary") -> list[str]:
    answers = server.client(*(job(p, model="tiny_unary", max_tokens=NEW) for p in prompts), way=way, at_once=at_once)
    assert [len(answer["texts"]) for answer in answers] == [1] * len(prompts), answers
    return [answer["texts"][0] for answer in answers]


def infer(server: Server, prompts: list[str], at_once: int) -> list[str]:
    return unary(server, prompts, at_once, way="http")


def openai_form(server: Server, prompts: list[str], at_once: int) -> list[str]:
    """Every other one streams. Each answer is asked for with temperature 0 and a seed, as an OpenAI client may."""
    fields = {"max_tokens": NEW, "temperature": 0.0, "seed": 7}
    jobs = [job(prompt, "openai", stream=bool(index % 2), **fields) for index, prompt in enumerate(prompts)]
    answers = server.client(*jobs, at_once=at_once)
    for one, answer in zip(jobs, answers, strict=True):
        assert sum(answer["counts"]) == NEW  # the frontend adds up what every response says
        assert one["fields"]["stream"] or len(answer["texts"]) == 1
    return ["".join(answer["texts"]) for answer in answers]


@pytest.mark.parametrize("at_once", [1, 16])
@pytest.mark.parametrize("way", [generate, generate_stream, grpc_stream, unary, infer, openai_form])
def test_texts_equal_those_of_our_runner(
    server: Server, wanted: dict[str, str], way: Callable[[Server, list[str], int], list[str]], at_once: int
) -> None:
    prompts = PROMPTS if at_once > 1 else PROMPTS[:ALONE]
    assert dict(zip(prompts, way(server, prompts, at_once), strict=True)) == {one: wanted[one] for one in prompts}


@pytest.mark.skipif("TRITON_SERVER_SOURCE" not in os.environ, reason="TRITON_SERVER_SOURCE: a checkout of the server")
def test_the_openai_frontends_own_code_makes_requests_that_are_answered(server: Server, wanted: dict[str, str]) -> None:
    frontend = Path(os.environ["TRITON_SERVER_SOURCE"]) / "python" / "openai" / "openai_frontend"
    fields = {"model": "tiny", "max_tokens": NEW, "temperature": 0, "stop": ["never comes"], "seed": 3, "echo": False}
    jobs = [fields | {"prompt": prompt, "stream": stream} for prompt in PROMPTS for stream in (False, True)]
    script = ROOT / "tests" / "clients" / "openai_frontend.py"
    document = {"url": f"127.0.0.1:{server.grpc}", "jobs": jobs}
    for one, answer in zip(jobs, json.loads(server.run(PYTHON, "-I", script, frontend, give=document)), strict=True):
        assert "".join(answer["texts"]) == wanted[one["prompt"]]
        assert answer["count"] == NEW
        assert {"frequency_penalty", "seed", "stop_words", "top_p"} <= set(answer["fields"])


def test_layers_are_those_of_the_trace_and_plain_decoding_is_that_of_the_plain_model(
    server: Server, tiny_lm: Path, tokenizer: Any
) -> None:
    prompt = "def read(self, size=None):"
    inputs = dict(tokenizer(prompt, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    trace = trace_generation(export.load(tiny_lm), inputs, max_new_tokens=NEW, do_sample=False)
    assert trace.moved and trace.changed, "nothing to see in this text"
    fields = {"max_tokens": NEW, "return_layers": True, "return_num_input_tokens": True}
    found = server.generate("tiny", prompt, **fields)
    twin = server.generate("tiny_unary", prompt, **fields)
    assert {name: value for name, value in twin.items() if name != "model_name"} == {
        name: value for name, value in found.items() if name != "model_name"
    }
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


def test_an_artifact_with_a_lazy_scan_is_served_as_it_decodes(server: Server, lazy: Path) -> None:
    """Entropies that the scan did not reach are NaN in the graph's output: no reason to refuse, and never shown."""
    prompts, runner = ("def f(x):", "class A", "import os", "x"), export.load(lazy)
    with ThreadPoolExecutor(len(prompts)) as pool:
        fields = {"max_tokens": NEW, "return_layers": True}
        bodies = [{"text_input": prompt, **fields} for prompt in prompts]
        answers = list(pool.map(lambda body: server.send("/v2/models/lazy/generate", body), bodies))
    unmeasured, layers = 0, set()
    for (prompt, text), (_, raw) in zip(own_texts(lazy, prompts, NEW).items(), answers, strict=True):
        found = json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert found["text_output"] == text
        assert all(0 <= entropy < np.log(runner.config.vocab_size) for entropy in found["entropy"])
        layers |= set(found["selected_layer"])
        ids = AutoTokenizer.from_pretrained(lazy)(prompt, return_tensors="pt").input_ids
        unmeasured += int(runner(ids).entropy.isnan().sum())
    assert unmeasured, "every entropy was measured: nothing was shown"
    assert len(layers) > 1, "no token of an earlier layer"


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


def test_the_example_clients_print_what_they_are_there_to_show(server: Server, tiny_lm: Path) -> None:
    prompt = "def read(self, size=None):"
    examples = ROOT / "examples" / "triton_client"
    text = prompt + own_texts(tiny_lm, [prompt], 32)[prompt]
    printed = server.run(PYTHON, "-I", examples / "client_http.py", "tiny", prompt, f"127.0.0.1:{server.http}")
    assert printed.count(text) == 2, "in one piece and as a stream"
    assert "layers: [" in printed
    printed = server.run(PYTHON, "-I", examples / "client_grpc.py", "tiny", prompt, f"127.0.0.1:{server.grpc}")
    sampled = server.generate("tiny", prompt, max_tokens=32, temperature=0.8, seed=1)["text_output"]
    assert printed == f"{prompt}{sampled}\n"
    printed = server.run("sh", examples / "client.sh", "tiny", f"127.0.0.1:{server.http}")
    whole, *events, plain, unary = (line.removeprefix("data: ") for line in printed.splitlines() if line)
    assert prompt + json.loads(whole)["text_output"] == text
    stopped = server.generate("tiny", "import ", max_tokens=16, stop_words=["\n"])["text_output"]
    assert joined([json.loads(event) for event in events]) == stopped
    assert set(json.loads(plain)["selected_layer"]) == {12}
    assert prompt + json.loads(unary)["outputs"][0]["data"][0] == text


def test_the_load_generator_finds_no_error_and_no_answer_that_differs(server: Server) -> None:
    command = [PYTHON, "-I", ROOT / "examples" / "triton_client" / "load.py", "--model", "tiny", "--cancel", "16"]
    arguments = ["--address", f"127.0.0.1:{server.http}", "--seconds", "1", "--concurrency", "16", "--tokens", "5"]
    cancelled, report = map(json.loads, server.run(*command, *arguments).splitlines())
    assert cancelled["cancelled"] == 16
    assert (report["errors"], report["different"]) == ([], [])
    assert report["tokens"] == 5 * report["requests"] > 0
