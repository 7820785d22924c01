"""What Triton's Python backend calls: requests in, responses out whenever there is text. All else is the scheduler's.

https://github.com/triton-inference-server/python_backend#decoupled-mode
"""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # the server brings it
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .decoder import Decoder, OrtDecoder
from .errors import RequestError
from .metrics import TritonMetrics
from .request import encode_prompt, parse_request
from .scheduler import Scheduler
from .sequence import Sequence
from .settings import TOKENIZER, check_files, read_settings
from .step import StepDecoder

LOG = logging.getLogger(__name__)

# A message to the server for every number that changed.
METRICS_SECONDS = 0.5


class TritonPythonModel:
    """One instance of the model: a process with the graph, a thread that runs the batch, and a thread that listens."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load what lies beside this file, after comparing it with its hashes. Errors keep the model from loading."""
        folder = Path(__file__).resolve().parent
        self._settings = settings = read_settings(folder)
        check_files(folder, settings)
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._longest_entry = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))
        decoder: Decoder
        if settings.step_model is None:
            kind = "cuda" if args["model_instance_kind"] == "GPU" else "cpu"
            decoder = OrtDecoder(folder, settings, (kind, int(args["model_instance_device_id"])))
        else:
            decoder = StepDecoder(pb_utils, settings)
        self._scheduler = Scheduler(decoder, settings)
        labels = {
            "model": args["model_name"],
            "version": args["model_version"],
            "instance": args["model_instance_name"],
        }
        self._metrics = TritonMetrics(pb_utils, labels)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue requests. They are answered from the scheduler's thread."""
        for request in requests:
            reply = TritonReply(request.get_response_sender())
            try:
                self._scheduler.submit(self._sequence(request, reply))
            except RequestError as error:
                self._refuse(reply, error)
            except Exception as error:
                self._refuse(reply, RequestError("INTERNAL", f"{type(error).__name__}: {error}"))

    def finalize(self) -> None:
        """Stop. Triton has waited for the requests that were under way."""
        self._stopped.set()
        self._thread.join()
        self._scheduler.close()

    def _refuse(self, reply: TritonReply, error: RequestError) -> None:
        self._scheduler.counts.refused += 1  # which no other thread writes
        reply.fail(error)

    def _sequence(self, request: Any, reply: TritonReply) -> Sequence:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        parameters = json.loads(request.parameters() or "{}")
        settings = self._settings
        asked = parse_request(tensors, parameters, settings, request.requested_output_names())
        prompt = encode_prompt(asked, self._encode, self._longest_entry, settings)
        now = time.monotonic()
        times = [settings.request_timeout_seconds, request.timeout() / 1e6 or None]  # KServe's timeout: microseconds
        ends = [now + seconds for seconds in times if seconds is not None]
        waits = settings.queue_timeout_seconds
        return Sequence(
            asked,
            prompt,
            reply,
            self._decode,
            settings.end_tokens,
            deadline=min(ends, default=None),
            queue_deadline=None if waits is None else now + waits,
        )

    def _encode(self, text: str) -> list[int]:
        # A batch of one: `encode` would keep Python's lock, and with it every running answer, for as long as it takes.
        return list(self._tokenizer.encode_batch([text])[0].ids)

    def _decode(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _loop(self) -> None:
        shown = 0.0
        while not self._stopped.is_set():
            more = self._scheduler.step()
            if not more or time.monotonic() >= shown + METRICS_SECONDS:
                self._show_metrics()
                shown = time.monotonic()
            if not more:
                self._scheduler.wait(METRICS_SECONDS)

    def _show_metrics(self) -> None:
        try:
            self._metrics.show(self._scheduler.counts)
        except Exception:  # without this thread no request would be answered any more
            LOG.exception("The metrics could not be shown.")


class TritonReply:
    """The response sender of one request."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, outputs: dict[str, NDArray[Any]], final: bool) -> None:
        """See `Reply`."""
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._respond(pb_utils.InferenceResponse(output_tensors=tensors), final)

    def fail(self, error: RequestError) -> None:
        """See `Reply`."""
        code = getattr(pb_utils.TritonError, error.code)
        self._respond(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code)), True)

    def cancelled(self) -> bool:
        """See `Reply`."""
        return bool(self._sender.is_cancelled())

    def _respond(self, response: Any, final: bool) -> None:
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
