"""Run by the Python of `.venv-triton`: jobs as JSON on stdin -> what tritonclient returned, on stdout.

A job is {"model", "form", "fields"} and maybe "timeout" in microseconds. The form "kserve" sends what is named and
nothing else; "openai" sends a request as Triton's OpenAI frontend makes it for every backend but vLLM's
(_create_trtllm_generate_request in python/openai/openai_frontend/engine/utils/triton.py): every value in an array
`[1, 1]`, both counts asked for. They go the way "stream" (gRPC's ModelStreamInfer), "unary" (gRPC's ModelInfer) or
"http" (KServe's /infer), at most `at_once` at a time.
"""

import json
import queue
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

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


def tensor(protocol, name, value):
    kind, dtype = TYPES[name]
    values = value if isinstance(value, list) else [value]
    data = np.array([[bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for v in values]], dtype)
    if dtype is object:
        data = np.array([[v if isinstance(v, bytes) else v.encode() for v in data[0]]], object)
    given = protocol.InferInput(name, list(data.shape), kind)
    given.set_data_from_numpy(data)
    return given


def tensors(protocol, job):
    fields = (OPENAI if job["form"] == "openai" else {}) | job["fields"]
    return [tensor(protocol, name, value) for name, value in fields.items()]


def failed(error):
    return {"texts": [], "counts": [], "error": {"status": str(error.status()), "message": error.message()}}


def answered(result):
    counts = result.as_numpy("num_output_tokens")
    return {
        "texts": [result.as_numpy("text_output").item().decode()],
        "counts": [] if counts is None else [int(counts.item())],
        "error": None,
    }


def streamed(url, jobs, at_once):
    answers = [{"texts": [], "counts": [], "error": None, "done": False} for _ in jobs]
    arrived, waiting, left = queue.Queue(), list(enumerate(jobs)), len(jobs)
    with grpc.InferenceServerClient(url) as client:

        def send():
            index, job = waiting.pop(0)
            told = {"request_id": str(index), "enable_empty_final_response": True, "timeout": job.get("timeout")}
            client.async_stream_infer(job["model"], tensors(grpc, job), **told)

        client.start_stream(lambda result, error: arrived.put((result, error)))
        for _ in range(min(at_once, left)):
            send()
        while left:
            result, error = arrived.get(timeout=60)
            if error is not None:  # a stream names no request with its error: jobs that fail come alone
                assert len(answers) == 1, error
                return [failed(error)]
            response = result.get_response()
            answer = answers[int(response.id)]
            if (text := result.as_numpy("text_output")) is not None:
                answer["texts"].append(text.item().decode())
            if (count := result.as_numpy("num_output_tokens")) is not None:
                answer["counts"].append(int(count.item()))
            if response.parameters["triton_final_response"].bool_param:
                answer["done"] = True
                left -= 1
                if waiting:
                    send()
        client.stop_stream()
    return answers


def unary(url, jobs, at_once):
    with grpc.InferenceServerClient(url) as client, ThreadPoolExecutor(at_once) as pool:

        def ask(job):
            try:
                return answered(client.infer(job["model"], tensors(grpc, job), timeout=job.get("timeout")))
            except InferenceServerException as error:
                return failed(error)

        return list(pool.map(ask, jobs))


def over_http(url, jobs, at_once):
    client = http.InferenceServerClient(url, concurrency=at_once)
    under_way = [client.async_infer(job["model"], tensors(http, job), timeout=job.get("timeout")) for job in jobs]
    answers = []
    for one in under_way:
        try:
            answers.append(answered(one.get_result()))
        except InferenceServerException as error:
            answers.append(failed(error))
    client.close()
    return answers


document = json.load(sys.stdin)
way = {"stream": streamed, "unary": unary, "http": over_http}[document["way"]]
json.dump(way(document["url"], document["jobs"], document["at_once"]), sys.stdout)
