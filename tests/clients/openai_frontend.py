"""Run by the Python of `.venv-triton`: Triton's own OpenAI frontend makes the requests, tritonclient carries them.

    python openai_frontend.py SERVER/python/openai/openai_frontend < jobs

The frontend runs inside the server's process, through a package `tritonserver` that no index carries. A stand-in takes
its place, whose model hands back the request; everything else is the frontend's own: its schema with its defaults, and
the conversion that it chooses for this backend. A job is the JSON of a POST to /v1/completions.
"""

import json
import sys
import types
from unittest.mock import MagicMock

import numpy as np
from tritonclient import grpc
from tritonclient.utils import np_to_triton_dtype

sys.path.insert(0, sys.argv[1])
sys.modules["tritonserver"] = MagicMock()

from engine.utils.triton import _create_trtllm_generate_request as make_request  # noqa: E402
from schemas.openai import CreateCompletionRequest  # noqa: E402

MODEL = types.SimpleNamespace(create_request=lambda inputs: inputs)


def array(value):
    """What the frontend leaves as nested lists of text, `tritonserver` turns into bytes."""
    if isinstance(value, np.ndarray):
        return value
    return np.array([[word.encode() for word in row] for row in value], object)


def ask(client, document):
    body = CreateCompletionRequest(**document)
    made = make_request(MODEL, body.prompt, body, None, "exclude_input_in_output", 16)
    inputs = []
    for name, value in made.items():
        data = array(value)
        inputs.append(grpc.InferInput(name, list(data.shape), np_to_triton_dtype(data.dtype)))
        inputs[-1].set_data_from_numpy(data)
    responses = []
    client.start_stream(lambda result, error: responses.append((result, error)))
    client.async_stream_infer(document["model"], inputs)
    client.stop_stream()  # waits for the answers
    texts, count = [], 0
    for result, error in responses:
        assert error is None, error
        texts.append(result.as_numpy("text_output").item().decode())
        count += int(result.as_numpy("num_output_tokens").item())
    return {"fields": sorted(made), "texts": texts, "count": count}


jobs = json.load(sys.stdin)
with grpc.InferenceServerClient(jobs["url"]) as client:
    json.dump([ask(client, job) for job in jobs["jobs"]], sys.stdout)
