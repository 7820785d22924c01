#!/bin/sh
# Ask a model of a Triton server for text with curl: in one piece, as a stream, from the final layer, and in the form of
# KServe's unary protocol.
#   sh examples/triton_client/client.sh my-llm [127.0.0.1:8000]
set -e
models=http://${2:-127.0.0.1:8000}/v2/models

curl -sS "$models/$1/generate" -d '{"text_input": "def read(self, size=None):", "max_tokens": 32}'
echo
curl -sSN "$models/$1/generate_stream" \
    -d '{"text_input": "import ", "max_tokens": 16, "stream": true, "stop_words": ["\n"]}'
curl -sS "$models/$1/generate" \
    -d '{"text_input": "def read(self, size=None):", "max_tokens": 32, "confident": false, "return_layers": true}'
echo
curl -sS "$models/$1_unary/infer" -d '{"inputs": [
    {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["def read(self, size=None):"]},
    {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "data": [32]}]}'
echo
