"""A unary request -> one to the decoupled model of the same inputs, and its answer: KServe's `/infer` and `ModelInfer`.

Triton refuses unary requests to a decoupled model. This one is not decoupled and hands them on inside the server (BLS),
so they join the batch that runs there. A thread waits for each answer and gives it to the response sender, which a
model may do after `execute` has returned since Triton 24.06: one process has many requests under way.
https://github.com/triton-inference-server/python_backend#using-bls-with-decoupled-models
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # the server brings it

SETTINGS = "unary.json"
# Asking Triton whether a client has gone costs a message to the server, for each request.
CANCEL_CHECK_SECONDS = 0.1


class TritonPythonModel:
    """The instance. It has neither weights nor tokenizer; what it does not refuse itself, the other model checks."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read which model to ask."""
        told = json.loads((Path(__file__).resolve().parent / SETTINGS).read_text(encoding="utf-8"))
        self._name, self._model = args["model_name"], told["model"]
        self._waiting: dict[Any, Any] = {}  # response sender -> the responses of which it is to get one
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._watch = threading.Thread(target=self._pass_on_cancellations, daemon=True)
        self._watch.start()

    def execute(self, requests: list[Any]) -> None:
        """Hand requests on. Each is answered from a thread of its own; the model refuses those that are too many."""
        for request in requests:
            sender = request.get_response_sender()
            stream = pb_utils.get_input_tensor_by_name(request, "stream")
            if stream is not None and stream.as_numpy().any():
                message = f"stream is true, and {self._name} answers once. Ask {self._model} for a stream."
                _answer(sender, _failure(message, pb_utils.TritonError.INVALID_ARG))
                continue
            # The model takes none and names those that came; as text, since there is no way to hand on a float.
            parameters = {name: str(value) for name, value in json.loads(request.parameters() or "{}").items()}
            call = pb_utils.InferenceRequest(
                model_name=self._model,
                requested_output_names=sorted(request.requested_output_names()),
                inputs=request.inputs(),
                request_id=request.request_id(),
                parameters=parameters,
                timeout=request.timeout(),
                preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            )
            threading.Thread(target=self._forward, args=(call, sender), daemon=True).start()

    def finalize(self) -> None:
        """Stop. Triton has waited for the requests that were under way."""
        self._stopped.set()
        self._watch.join()

    def _forward(self, call: Any, sender: Any) -> None:
        try:
            response = self._ask(call, sender)
        except Exception as error:  # the model is not loaded, or its process has died
            response = _failure(str(error))
        with self._lock:  # nobody may ask Triton about a request that has been answered
            self._waiting.pop(sender, None)
        _answer(sender, response)

    def _ask(self, call: Any, sender: Any) -> Any:
        responses = call.exec(decoupled=True)
        with self._lock:
            self._waiting[sender] = responses
        # A request that asks for no stream gets one response; the model may close with an empty one.
        told = next((one for one in responses if one.has_error() or one.output_tensors()), None)
        if told is None:
            return _failure(f"{self._model} sent no answer.")
        if told.has_error():
            return pb_utils.InferenceResponse(error=told.error())
        return pb_utils.InferenceResponse(output_tensors=told.output_tensors())

    def _pass_on_cancellations(self) -> None:
        """Cancel the request to the other model when the client of the one here has gone."""
        while not self._stopped.wait(CANCEL_CHECK_SECONDS):
            with self._lock:
                for sender, responses in self._waiting.items():
                    # Triton 2.51 has no way to do so: there the answer is computed to its end.
                    if hasattr(responses, "cancel") and sender.is_cancelled():
                        responses.cancel()


def _failure(message: str, *code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, *code))


def _answer(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
