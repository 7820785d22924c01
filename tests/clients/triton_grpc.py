"""Run by the Python of `.venv-triton`: jobs as JSON on stdin -> what tritonclient's gRPC stream returned, on stdout.

A job is {"model", "form", "fields"}. The form "kserve" sends what is named and nothing else; "openai" sends a request
as Triton's OpenAI frontend makes it for every backend but vLLM's (_create_trtllm_generate_request in
python/openai/openai_frontend/engine/utils/triton.py): every value in an array `[1, 1]`, both counts asked for. All jobs
are sent before the first answer is read.
"""

import json
import queue
import sys

import numpy as np
from tritonclient import grpc

TYPES = {
    "text_input": ("BYTES", object),
    "stream": ("BOOL", bool),
    "max_tokens": ("INT32", np.int32),
    "stop_words": ("BYTES", object),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "top_k": ("INT32", np.int32),
    "frequency_penalty": ("FP32", np.float32),
    "presence_penalty": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
    "exclude_input_in_output": ("BOOL", bool),
    "return_num_input_tokens": ("BOOL", bool),
    "return_num_output_tokens": ("BOOL", bool),
}
# What the frontend's schema fills in where the user of its HTTP API says nothing.
OPENAI = {
    "stream": False,
    "max_tokens": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "exclude_input_in_output": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}


def tensor(name, value):
    kind, dtype = TYPES[name]
    values = value if isinstance(value, list) else [value]
    data = np.array([[bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for v in values]], dtype)
    if dtype is object:
        data = np.array([[v if isinstance(v, bytes) else v.encode() for v in data[0]]], object)
    given = grpc.InferInput(name, list(data.shape), kind)
    given.set_data_from_numpy(data)
    return given


def main():
    document = json.load(sys.stdin)
    answers = [{"texts": [], "counts": [], "error": None, "done": False} for _ in document["jobs"]]
    arrived = queue.Queue()
    with grpc.InferenceServerClient(document["url"]) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        for index, job in enumerate(document["jobs"]):
            fields = (OPENAI if job["form"] == "openai" else {}) | job["fields"]
            inputs = [tensor(name, value) for name, value in fields.items()]
            client.async_stream_infer(job["model"], inputs, request_id=str(index), enable_empty_final_response=True)
        left = len(answers)
        while left:
            result, error = arrived.get(timeout=60)
            if error is not None:  # a stream names no request with its error: jobs that fail come alone
                assert len(answers) == 1, error
                answers[0]["error"] = {"status": str(error.status()), "message": error.message()}
                break
            response = result.get_response()
            answer = answers[int(response.id)]
            if (text := result.as_numpy("text_output")) is not None:
                answer["texts"].append(text.item().decode())
            if (count := result.as_numpy("num_output_tokens")) is not None:
                answer["counts"].append(int(count.item()))
            if response.parameters["triton_final_response"].bool_param:
                answer["done"] = True
                left -= 1
        client.stop_stream()
    json.dump(answers, sys.stdout)


main()
