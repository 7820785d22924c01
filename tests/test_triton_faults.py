"""What breaks under a running tritonserver, files, processes, a reload, its end: clients are told, no text is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from triton_server import Server, joined, needs_server, own_texts, serving

from cdsurgery import export

PROMPTS = [f"{beginning}{ending}" for beginning in ("def ", "class ") for ending in ("get", "_name", "None", "read(")]
NEW = 32

pytestmark = needs_server


@pytest.fixture(scope="module")
def wanted(tiny_lm: Path) -> dict[str, str]:
    return own_texts(tiny_lm, PROMPTS, NEW)


@pytest.fixture(scope="module")
def repository(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "repository"
    export.to_triton(tiny_lm, folder, name="tiny", options=export.ServingOptions(slots=16))
    export.to_triton(tiny_lm, folder, name="broken", options=export.ServingOptions(step="onnxruntime", unary=False))
    with (folder / "broken" / "1" / "artifact" / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x01\x02\x03\x04")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    models = ("--load-model=tiny", "--load-model=tiny_unary")
    with serving(repository, log, "--model-control-mode=explicit", *models) as running:
        yield running


def test_a_corrupted_artifact_does_not_load_and_the_log_says_why(server: Server) -> None:
    status, answer = server.post("/v2/repository/models/broken/load")
    assert status == 400, answer
    assert "model.onnx.data was changed: its sha256 is not" in server.text()
    assert server.generate("tiny", "def ", max_tokens=2)["text_output"]


def test_the_step_model_is_accepted_up_to_the_backend_that_this_server_lacks(server: Server) -> None:
    status, answer = server.post("/v2/repository/models/broken_step/load")
    assert status == 400
    assert "unable to find backend library for backend 'onnxruntime'" in answer["error"]


def test_a_reload_under_load_loses_no_request(server: Server, repository: Path, wanted: dict[str, str]) -> None:
    (repository / "tiny" / "config.pbtxt").touch()  # else Triton sees nothing to load again
    stub = server.stub()
    with ThreadPoolExecutor(9) as pool:
        running = [pool.submit(server.generate, "tiny", prompt, max_tokens=NEW) for prompt in PROMPTS * 4]
        time.sleep(0.2)
        status, answer = server.post("/v2/repository/models/tiny/load")
        assert status == 200, answer
        for prompt, one in zip(PROMPTS * 4, running, strict=True):
            assert one.result()["text_output"] == wanted[prompt]
    assert server.stub() != stub


@pytest.mark.xfail(
    raises=OSError,
    strict=False,
    reason="twice Triton 2.51 was gone after this, and in 230 tries it was not; see docs/triton.md",
)
def test_after_its_process_was_killed_the_model_says_so_until_it_is_loaded_again(
    server: Server, wanted: dict[str, str]
) -> None:
    status, _ = server.post("/v2/repository/models/tiny/unload")
    assert status == 200
    status, _ = server.post("/v2/repository/models/tiny/load")  # now it is the newest stub
    os.kill(server.stub(), signal.SIGKILL)
    for model in ("tiny", "tiny_unary"):
        status, answer = server.post(f"/v2/models/{model}/generate", {"text_input": PROMPTS[0]}, timeout=10)
        assert status in (400, 500)
        assert answer["error"] == "Stub process 'tiny_0_0' is not healthy."
    assert server.post("/v2/repository/models/tiny/unload")[0] == 200
    status, answer = server.post("/v2/models/tiny_unary/generate", {"text_input": PROMPTS[0]}, timeout=10)
    assert (status, answer["error"].rpartition(". ")[2]) == (400, "Model 'tiny' is not ready.")
    assert server.post("/v2/repository/models/tiny/load")[0] == 200
    for model in ("tiny", "tiny_unary"):
        assert server.generate(model, PROMPTS[0], max_tokens=NEW)["text_output"] == wanted[PROMPTS[0]]


def test_sigterm_lets_streams_end(repository: Path, tmp_path: Path) -> None:
    with serving(repository, tmp_path / "log", "--model-control-mode=explicit", "--load-model=tiny") as short_lived:
        with ThreadPoolExecutor(2) as pool:
            streams = [pool.submit(short_lived.stream, "tiny", "import ", max_tokens=300) for _ in range(2)]
            short_lived.settle("cdsurgery_running_requests", 2)
            short_lived.process.send_signal(signal.SIGTERM)
            first, second = (joined(stream.result()) for stream in streams)
        assert first == second
        assert len(first) > 300
        assert short_lived.process.wait(timeout=20) == 0
