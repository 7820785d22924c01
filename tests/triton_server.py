"""A Triton repository -> a running `tritonserver` of the environment that `make test` builds, and its log.

The wheel nvidia-pytriton carries the server. It wants its own libraries on LD_LIBRARY_PATH, the stub of this Python
beside the Python backend, and, for the stub to find numpy and tokenizers, its environment first on PATH.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cdsurgery import export

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = Path(os.environ.get("TRITON_ENVIRONMENT", ROOT / ".venv-triton"))
PYTHON = ENVIRONMENT / "bin" / "python"
needs_server = pytest.mark.skipif(not PYTHON.exists(), reason="make test builds the environment .venv-triton")
START_SECONDS = 60.0


class Server:
    """A server under way.

    Attributes:
        http, grpc, metrics: ports of this machine.
        log: what it has printed so far goes there.
        process: the server; the stub of every model instance is a child of it, in the same process group.
    """

    def __init__(self, repository: Path, log: Path, *arguments: str) -> None:
        self.http, self.grpc, self.metrics = free_ports(3)
        self.log, self._backends = log, tempfile.TemporaryDirectory(prefix="backends-")
        packages = next(ENVIRONMENT.glob("lib/python3.*/site-packages"))
        home = packages / "pytriton" / "tritonserver"
        python = Path(self._backends.name) / "python"
        python.mkdir()
        for path in (home / "backends" / "python").iterdir():
            (python / path.name).symlink_to(path)
        stub = python / "triton_python_backend_stub"
        stub.unlink(missing_ok=True)
        stub.symlink_to(home / "python_backend_stubs" / packages.parent.name.removeprefix("python") / stub.name)
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(ENVIRONMENT),
        }
        for name in ("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS"):
            environment.pop(name, None)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [
                    str(home / "bin" / "tritonserver"),
                    f"--model-repository={repository}",
                    f"--backend-directory={self._backends.name}",
                    f"--http-port={self.http}",
                    f"--grpc-port={self.grpc}",
                    f"--metrics-port={self.metrics}",
                    "--http-address=127.0.0.1",
                    "--grpc-address=127.0.0.1",
                    "--metrics-address=127.0.0.1",
                    "--disable-auto-complete-config",
                    "--metrics-interval-ms=100",
                    *arguments,
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def wait_ready(self) -> Server:
        """Return when all models are ready, or raise with the end of the log."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"tritonserver ended with {self.process.returncode}:\n{self.text()[-4000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5)
                return self
            time.sleep(0.1)
        raise TimeoutError(f"tritonserver was not ready after {START_SECONDS} s:\n{self.text()[-4000:]}")

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stub(self) -> int:
        """The process of the newest model instance."""
        found = subprocess.run(
            ["pgrep", "-n", "-g", str(self.process.pid), "-f", "triton_python_backend_stub"],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(found.stdout)

    def send(self, path: str, body: bytes | dict[str, Any] | None = None, timeout: float = 60) -> tuple[int, bytes]:
        """POST; return the status and what came back."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            ended = self.process.poll()
            raise ConnectionError(
                f"{error!r}; tritonserver: {'runs' if ended is None else ended}; {self.text()[-4000:]}"
            ) from error

    def post(self, path: str, body: bytes | dict[str, Any] | None = None, timeout: float = 60) -> tuple[int, Any]:
        """POST; return the status and what came back, parsed if it is JSON."""
        status, raw = self.send(path, body, timeout)
        try:
            return status, json.loads(raw)
        except ValueError:
            return status, raw.decode("utf-8", errors="replace")

    def generate(self, model: str, text: str, **fields: Any) -> dict[str, Any]:
        """The answer of `/generate`, which must be good."""
        status, answer = self.post(f"/v2/models/{model}/generate", {"text_input": text, **fields})
        assert status == 200 and "error" not in answer, (status, answer)
        return answer

    def stream(self, model: str, text: str, **fields: Any) -> list[dict[str, Any]]:
        """All events of `/generate_stream`."""
        body = {"text_input": text, "stream": True, **fields}
        status, raw = self.post(f"/v2/models/{model}/generate_stream", body)
        assert status == 200, (status, raw)
        return [json.loads(line.removeprefix("data: ")) for line in str(raw).splitlines() if line.startswith("data: ")]

    def counter(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def settle(self, name: str, value: float, seconds: float = 5) -> None:
        """Wait until a metric has a value; Triton is told of it twice a second."""
        end = time.monotonic() + seconds
        while self.counter(name) != value:
            assert time.monotonic() < end, f"{name} is {self.counter(name)}, not {value}"
            time.sleep(0.05)

    def client(self, *jobs: dict[str, Any], way: str = "stream", at_once: int = 16) -> list[dict[str, Any]]:
        """What tritonclient makes of the jobs, in a process of its own environment; see clients/triton_client.py."""
        url = f"127.0.0.1:{self.http if way == 'http' else self.grpc}"
        document = {"url": url, "jobs": jobs, "way": way, "at_once": at_once}
        return json.loads(self.run(PYTHON, "-I", ROOT / "tests" / "clients" / "triton_client.py", give=document))

    @staticmethod
    def run(*command: str | Path, give: Any = None) -> str:
        """What a command prints that gets JSON; it must end well."""
        done = subprocess.run(command, input=json.dumps(give), capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout[-1000:], done.stderr[-3000:])
        return done.stdout

    def stop(self) -> None:
        """End the server and every process it started, and free the memory that they shared: nobody else would."""
        shared = self._shared_memory()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in shared:
            region.unlink(missing_ok=True)
        self._backends.cleanup()

    def _shared_memory(self) -> set[Path]:
        with contextlib.suppress(OSError):  # it has ended already
            maps = Path(f"/proc/{self.process.pid}/maps").read_text().split()
            return {Path(word) for word in maps if word.startswith("/dev/shm/triton_python_backend_shm_region")}
        return set()


@contextlib.contextmanager
def serving(repository: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """A server that is ready, and gone afterwards whatever happens."""
    server = Server(repository, log, *arguments)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def job(
    text: Any, form: str = "kserve", model: str = "tiny", timeout: int | None = None, **fields: Any
) -> dict[str, Any]:
    """A job of clients/triton_client.py."""
    return {"model": model, "form": form, "timeout": timeout, "fields": {"text_input": text, **fields}}


def joined(events: list[dict[str, Any]]) -> str:
    """The text of a stream."""
    return "".join(event["text_output"] for event in events)


def own_texts(artifact: Path, prompts: Iterable[str], tokens: int) -> dict[str, str]:
    """What an artifact writes after every prompt, one at a time, in our own runner: greedy, without Triton."""
    runner, tokenizer, texts = export.load(artifact), AutoTokenizer.from_pretrained(artifact), {}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = runner.generate(ids, max_new_tokens=tokens, do_sample=False)[0]
        texts[prompt] = tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True)
    return texts


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
