"""`serving.json` of a version folder -> settings: what is served, its names and axes, its limits, and file hashes.

It repeats what the model needs of the artifact, so that the server reads one file whose form is this module's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import FolderError

NAME = "serving.json"
SCHEMA_VERSION = 1
GRAPH, TOKENIZER = "artifact/model.onnx", "artifact/tokenizer.json"


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph: name, numpy's name of its dtype, and axes that are names or lengths."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    @property
    def growing(self) -> int | None:
        """The axis of tokens in the cache, or None for a state of fixed size."""
        return next((axis for axis, size in enumerate(self.axes) if size in ("past", "total")), None)


@dataclass(frozen=True)
class Settings:
    """All that the serving code is told.

    Attributes:
        layers: L, the decoder layers.
        vocabulary: V; token ids are in [0, V).
        context: tokens that prompt and answer may have together.
        end_tokens: ids that end an answer.
        tokens, past, present: the graph's inputs of tokens, its cache inputs, and its cache outputs in the same order.
        temperature, top_p, top_k, min_p, repetition_penalty: for requests that name none; temperature 0 is greedy,
            top_k and min_p 0 are no limit, and a penalty of 1 is none.
        default_max_tokens: for requests that name none.
        slots: requests that decode at the same time.
        chunk: prompt tokens that are taken in between two steps of the running requests.
        queue: requests that wait for a slot; more are refused.
        queue_timeout_seconds, request_timeout_seconds: after which a request gets an error while it waits, and in all;
            None for never.
        threads: of ONNX Runtime, 0 for one a core.
        providers: TensorRT's provider as ONNX Runtime may have it -> the options that give it the graph's shapes; empty
            for no TensorRT.
        cache: a folder of the server's machine where TensorRT keeps engines and timings; None keeps nothing.
        step_model: the Triton model that runs the graph, or None for ONNX Runtime in the process of this model.
        files: path below the version folder -> {"sha256": hex, "size": bytes}.
    """

    layers: int
    vocabulary: int
    context: int
    end_tokens: tuple[int, ...]
    tokens: tuple[Tensor, ...]
    past: tuple[Tensor, ...]
    present: tuple[Tensor, ...]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    default_max_tokens: int
    slots: int
    chunk: int
    queue: int
    queue_timeout_seconds: float | None
    request_timeout_seconds: float | None
    threads: int
    providers: Mapping[str, Mapping[str, Any]]
    cache: str | None
    step_model: str | None
    files: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> str:
        """The contents of `serving.json`, the same bytes for the same settings."""
        return json.dumps({"schema_version": SCHEMA_VERSION} | asdict(self), indent=1) + "\n"


def read_settings(folder: Path) -> Settings:
    """Read the settings of a version folder.

    Raises:
        FolderError: there are none, or they are of another schema.
    """
    try:
        fields = json.loads((folder / NAME).read_text(encoding="utf-8"))
        found = fields.pop("schema_version")
        if found == SCHEMA_VERSION:
            for group in ("tokens", "past", "present"):
                fields[group] = tuple(
                    Tensor(entry["name"], entry["dtype"], tuple(entry["axes"])) for entry in fields[group]
                )
            fields["end_tokens"] = tuple(fields["end_tokens"])
            return Settings(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(
            f"{folder / NAME} cannot be read ({type(error).__name__}: {error}). Write the model folder again with "
            "cdsurgery export triton."
        ) from error
    raise FolderError(
        f"{folder / NAME} has schema version {found} and this code reads {SCHEMA_VERSION}. Write the model folder "
        "again with cdsurgery export triton."
    )


def check_files(folder: Path, settings: Settings) -> None:
    """Compare every file with its hash.

    Raises:
        FolderError: one is missing, was cut short or was changed.
    """
    for name, expected in settings.files.items():
        path = folder / name
        if not path.is_file():
            raise FolderError(f"{path} is missing. Copy the whole model folder.")
        if (size := path.stat().st_size) != expected["size"]:
            raise FolderError(f"{path} has {size} bytes and should have {expected['size']}. Copy the folder again.")
        if sha256(path) != expected["sha256"]:
            raise FolderError(f"{path} was changed: its sha256 is not {expected['sha256']}. Copy the folder again.")


def sha256(path: Path) -> str:
    """The hash of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
