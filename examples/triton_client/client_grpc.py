"""Ask a model of a Triton server for a stream of text over gRPC. Needs `pip install tritonclient[grpc]`.

python examples/triton_client/client_grpc.py my-llm "def read(self, size=None):" [127.0.0.1:8001]
"""

import queue
import sys

import numpy as np
from tritonclient import grpc


def tensor(name: str, kind: str, value: object, dtype: object) -> grpc.InferInput:
    """One value, in the shape [1, 1] that the model takes."""
    data = np.array([[value]], dtype)
    given = grpc.InferInput(name, [1, 1], kind)
    given.set_data_from_numpy(data)
    return given


model, prompt, *rest = sys.argv[1:]
arrived: queue.Queue = queue.Queue()
with grpc.InferenceServerClient(rest[0] if rest else "127.0.0.1:8001") as client:
    client.start_stream(lambda result, error: arrived.put((result, error)))
    inputs = [
        tensor("text_input", "BYTES", prompt.encode(), object),
        tensor("stream", "BOOL", True, bool),
        tensor("max_tokens", "INT32", 32, np.int32),
        tensor("temperature", "FP32", 0.8, np.float32),
        tensor("seed", "UINT64", 1, np.uint64),
    ]
    client.async_stream_infer(model, inputs, enable_empty_final_response=True)
    print(prompt, end="")
    while True:
        result, error = arrived.get(timeout=60)
        if error is not None:
            sys.exit(f"\n{error}")
        print(result.as_numpy("text_output").item().decode(), end="", flush=True)
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
print()
