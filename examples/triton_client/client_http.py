"""Ask a model of a Triton server for text over HTTP: in one piece, then as a stream. Needs Python and nothing else.

python examples/triton_client/client_http.py my-llm "def read(self, size=None):" [127.0.0.1:8000]
"""

import json
import sys
import urllib.request

model, prompt, *rest = sys.argv[1:]
address = rest[0] if rest else "127.0.0.1:8000"


def post(path: str, **fields: object) -> urllib.request.Request:
    """A POST of JSON."""
    return urllib.request.Request(f"http://{address}/v2/models/{path}", json.dumps(fields).encode())


with urllib.request.urlopen(post(f"{model}/generate", text_input=prompt, max_tokens=32, return_layers=True)) as answer:
    document = json.load(answer)
print(prompt + document["text_output"])
print("layers:", document["selected_layer"])

print(prompt, end="")
with urllib.request.urlopen(post(f"{model}/generate_stream", text_input=prompt, max_tokens=32, stream=True)) as events:
    for line in events:
        if line.startswith(b"data: "):
            print(json.loads(line[6:])["text_output"], end="", flush=True)
print()
