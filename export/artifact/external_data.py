"""A graph file -> the check that its weights lie in plain files beside it, long enough, and nowhere else.

A location that leaves the folder, or a link, would let a graph from elsewhere read any file of this machine as weights
(CVE-2024-27318 and its successors). The manifest's hashes do not help: whoever writes a graph can write those too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto

from cdsurgery.errors import ArtifactError


def check_external_data(graph: Path) -> None:
    """Hold every location that the graph names against the files beside it.

    Raises:
        ArtifactError: the graph is not ONNX, or a weight is missing, cut short, linked, or outside of the folder.
    """
    try:
        model = onnx.load_model(graph, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ArtifactError(f"{graph} is not an ONNX file ({error}). Make the artifact again.") from error
    needed: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            end = _number(entries, "offset", tensor.name) + _number(entries, "length", tensor.name)
            location = entries.get("location", "")
            needed[location] = max(end, needed.get(location, 0))
    for location, size in needed.items():
        path = graph.parent / location
        # A backslash separates folders on Windows only; a name that has one is a path somewhere.
        if not location or Path(location).name != location or "\\" in location or path.is_symlink():
            raise ArtifactError(
                f"{graph} reads weights from {location!r}; allowed is the name of a plain file beside it. Do not use "
                "this artifact unless you know who made it."
            )
        if not path.is_file():
            raise ArtifactError(f"{path}, in which {graph.name} keeps weights, is missing. Copy the whole folder.")
        if path.stat().st_size < size:
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes and {graph.name} reads {size} from it: it was cut short. Copy "
                "the folder again."
            )


def _number(entries: dict[str, str], key: str, tensor: str) -> int:
    value = entries.get(key, "0")
    if not (value.isascii() and value.isdecimal()):
        raise ArtifactError(f"The weight {tensor!r} has the {key} {value!r}; it must be a number of bytes.")
    return int(value)


def _tensors(message: Message) -> Iterator[Any]:
    """Every tensor of a model, wherever it sits: initializers, attributes, subgraphs, functions."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                if isinstance(part, TensorProto):
                    yield part
                else:
                    yield from _tensors(part)
