"""A signature and options -> the text of `config.pbtxt`, for the text model, its unary twin and the bare graph.

Triton's protobuf classes come in `tritonclient[grpc]`, which needs protobuf below 7 while onnx here runs with 7, so the
text is written as such. Tests parse it with those classes in the server's own environment, where a field that does not
exist is an error, and start the server on it.
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from cdsurgery.errors import UnsupportedModelError
from cdsurgery.export.signature import Signature, TensorSpec
from cdsurgery.export.triton.options import ServingOptions
from cdsurgery.export.triton.serving.request import INPUTS, OUTPUTS

TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}
WARM_UP_FILE = "text_input"  # below the folder `warmup` of the model
STEP_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}


class Word(str):
    """A name of an enum, which protobuf's text form writes without quotes."""


def text_config(name: str, options: ServingOptions) -> str:
    """The config of the model that takes text and returns it.

    Shapes are `[1, 1]` or `[1, n]`: the batch of one that Triton's OpenAI frontend sends. Requests are batched inside.
    """
    fields = _text_fields(name, decoupled=True) | {"instance_group": [_instances(options)]}
    if options.first_request:
        text = {"data_type": Word("TYPE_STRING"), "dims": [1], "input_data_file": WARM_UP_FILE}
        first = {"name": "first request", "batch_size": 1, "inputs": {"key": "text_input", "value": text}}
        fields["model_warmup"] = [first]
    return _message(fields)


def unary_config(name: str) -> str:
    """The config of the twin that hands requests on to that model: the same inputs and outputs, and one process."""
    return _message(_text_fields(name, decoupled=False) | {"instance_group": [{"count": 1, "kind": Word("KIND_CPU")}]})


def step_config(name: str, signature: Signature, options: ServingOptions) -> str:
    """The config of the bare graph: its own inputs and outputs with every axis, the batch included.

    Raises:
        UnsupportedModelError: a tensor has a dtype that Triton does not know.
    """
    assert options.step is not None
    fields: dict[str, Any] = {
        "name": name,
        "backend": options.step,
        "default_model_filename": STEP_FILES[options.step],
        "max_batch_size": 0,
        "input": [_tensor(spec) for spec in signature.inputs],
        "output": [_tensor(spec) for spec in signature.outputs],
        "instance_group": [_instances(options)],
    }
    return _message(fields)


def _text_fields(name: str, *, decoupled: bool) -> dict[str, Any]:
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": 1,
        "model_transaction_policy": {"decoupled": decoupled},
        "input": [
            {"name": key, "data_type": Word(kind), "dims": [size]} | ({} if key == "text_input" else {"optional": True})
            for key, (kind, size) in INPUTS.items()
        ],
        "output": [{"name": key, "data_type": Word(kind), "dims": [size]} for key, (kind, size) in OUTPUTS.items()],
    }


def _instances(options: ServingOptions) -> dict[str, Any]:
    group: dict[str, Any] = {"count": options.instances, "kind": Word(f"KIND_{options.kind.upper()}")}
    if options.gpus:
        group["gpus"] = list(options.gpus)
    if options.rate_limit:
        resources = [{"name": key, "count": count} for key, count in sorted(options.rate_limit.items())]
        group["rate_limiter"] = {"resources": resources}
    return group


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    if spec.dtype not in TYPES:
        raise UnsupportedModelError(f"{spec.name} is {spec.dtype}; Triton's tensors are {', '.join(TYPES)}.")
    dims = [size if isinstance(size, int) else -1 for size in spec.axes]
    return {"name": spec.name, "data_type": Word(TYPES[spec.dtype]), "dims": dims}


def _message(fields: Mapping[str, Any], indent: str = "") -> str:
    return "".join(line for key, value in fields.items() for line in _field(key, value, indent))


def _field(key: str, value: Any, indent: str) -> Iterable[str]:
    """A field in protobuf's text form; a list of messages is one field for each."""
    if isinstance(value, Mapping):
        yield f"{indent}{key} {{\n{_message(value, indent + '  ')}{indent}}}\n"
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for entry in value:
            yield from _field(key, entry, indent)
    elif isinstance(value, list):
        yield f"{indent}{key}: [{', '.join(map(_scalar, value))}]\n"
    else:
        yield f"{indent}{key}: {_scalar(value)}\n"


def _scalar(value: object) -> str:
    return value if isinstance(value, Word) else json.dumps(value)
