"""`cdsurgery.json`: what an artifact is, what made it, and the hash of every file in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, TypeVar

import onnxruntime
import torch

from cdsurgery.config import ConfidentConfig
from cdsurgery.errors import ArtifactError, InvalidInputError, UnsupportedModelError
from cdsurgery.export.artifact.clients import GRAPH_FILE, RUNNER
from cdsurgery.export.options import GraphOptions
from cdsurgery.export.signature import AXES, Signature, TensorSpec

NAME = "cdsurgery.json"
ENGINE_NAME = "engine.json"  # of `export.tensorrt.manifest`; the engine of a head has only this one
SCHEMA_VERSION = 2
Read = TypeVar("Read")

MAKERS = ("cdsurgery", "torch", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True)
class Manifest:
    """The manifest of an ONNX artifact.

    Attributes:
        schema_version: of this file; another than this code knows is refused.
        versions: of the packages that made the artifact.
        model_type, layers: as in the model's config; L.
        confident: the options in force when it was made.
        dtype: of the model's weights.
        options, opset: of the graph.
        signature: every input and output.
        files: path in the folder, with "/" -> {"sha256": hex, "size": bytes} for every other file.
        not_for: client -> why it cannot run this artifact.
        parity: the report of the comparison with PyTorch that the artifact passed; None where there was none.
        quantization: None, or {"scheme": "int8" or "int4", "head": whether the unembedding was quantised,
            "float": names of the matrices that were not}.
        group_query_attention: whether a grafted graph has ONNX Runtime's GroupQueryAttention, to which a mask is a
            number of tokens. Manifests from before it was known do not say.
    """

    schema_version: int
    versions: dict[str, str]
    model_type: str
    layers: int
    confident: ConfidentConfig
    dtype: str
    options: GraphOptions
    opset: int
    signature: Signature
    files: dict[str, dict[str, Any]]
    not_for: dict[str, str]
    parity: dict[str, Any] | None
    quantization: dict[str, Any] | None
    group_query_attention: bool = False

    def write(self, folder: Path) -> None:
        """Write it into the folder, with the same bytes for the same contents."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file in the folder, and in folders of it, but the manifest itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size} for path in paths
    }


def maker_versions() -> dict[str, str]:
    """The versions of the packages that make artifacts."""
    # onnxruntime's distribution has other names too: onnxruntime-gpu, onnxruntime-directml, ..
    return {name: version(name) for name in MAKERS} | {"onnxruntime": onnxruntime.__version__}


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read an artifact's manifest.

    Raises:
        InvalidInputError: it is a file that was given.
        ArtifactError: there is none, it cannot be read, or its schema is another.
    """
    path = Path(folder) / NAME
    if Path(folder).is_file():
        raise InvalidInputError(
            f"{folder} is a file; give the folder of an artifact. A decoder that another tool exported becomes one "
            "with export.graft, and a model with export.to_onnx."
        )
    if not path.is_file() and (Path(folder) / ENGINE_NAME).is_file():
        raise ArtifactError(
            f"{folder} is the engine of a head alone, which takes states and no tokens. Open it with "
            "cdsurgery.export.tensorrt.EngineSession."
        )
    if not path.is_file():
        raise ArtifactError(f"{folder} is not an artifact: it has no {NAME}. Make one with cdsurgery.export.to_onnx.")
    remedy = "Use the cdsurgery that made it, or make the artifact again."
    return read_versioned(path, SCHEMA_VERSION, _parsed, ("a manifest", "Make the artifact again."), remedy)


def read_versioned(
    path: Path, version: int, parse: Callable[[dict[str, Any]], Read], broken: tuple[str, str], other: str
) -> Read:
    """Read a JSON file that says its `schema_version`.

    Args:
        path: the file.
        version: that this code knows.
        parse: makes of the fields what is wanted.
        broken: what the file is not, if it cannot be parsed, and what to do then.
        other: what to do if its version is another.

    Raises:
        ArtifactError: it cannot be read, or its version is another.
    """
    what, remedy = broken
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        found = fields["schema_version"]
        if found == version:
            return parse(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not {what} ({type(error).__name__}: {error}). {remedy}") from error
    raise ArtifactError(f"{path} has schema version {found}; this cdsurgery reads version {version}. {other}")


def parsed_signature(fields: dict[str, Any]) -> Signature:
    """A signature from what `asdict` made of it."""
    return Signature(*(tuple(map(_parsed_spec, fields[side])) for side in ("inputs", "outputs")))


def _parsed_spec(fields: dict[str, Any]) -> TensorSpec:
    spec = TensorSpec(fields["name"], fields["dtype"], tuple(fields["axes"]))
    known = all(axis in AXES or (type(axis) is int and axis >= 0) for axis in spec.axes)
    if not (isinstance(spec.name, str) and _is_dtype(spec.dtype) and known):
        raise ValueError(f"{fields} is no input or output")
    return spec


def _parsed(fields: dict[str, Any]) -> Manifest:
    parsed: dict[str, Any] = {
        "signature": parsed_signature(fields["signature"]),
        "confident": ConfidentConfig(**fields["confident"]),
        "options": GraphOptions(**fields["options"]),
    }
    manifest = Manifest(**(fields | parsed))
    if not (_is_dtype(manifest.dtype) and isinstance(manifest.not_for, dict)):
        raise ValueError(f"its dtype is {manifest.dtype!r} and its not_for is {manifest.not_for!r}")
    for name, file in manifest.files.items():
        if not (isinstance(file["sha256"], str) and isinstance(file["size"], int)):
            raise ValueError(f"of the file {name} it says {file}")
    if absent := {"input_ids", "attention_mask"} - {spec.name for spec in manifest.signature.inputs}:
        raise ValueError(f"its signature has no {', '.join(sorted(absent))}")
    return manifest


def _is_dtype(name: object) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def check_files(
    folder: str | os.PathLike[str], manifest: Manifest, needed: Sequence[str] = (GRAPH_FILE, "config.json")
) -> None:
    """Compare every file with the manifest.

    Args:
        folder: of the artifact, or of an engine made from it.
        manifest: what it should hold.
        needed: what it is nothing without.

    Raises:
        ArtifactError: a file is missing, is not a plain file of this folder, or was changed; or the manifest leaves out
            what is needed.
    """
    if absent := [name for name in needed if name not in manifest.files]:
        raise ArtifactError(
            f"The manifest of {folder} does not list {', '.join(absent)}, so nothing says what should be there. Make "
            "the artifact again."
        )
    real = Path(folder).resolve()
    for name, expected in manifest.files.items():
        path = Path(folder) / name
        # A path that resolves to itself has no link and no ".." on its way.
        if PurePath(name).anchor or (real / name).resolve() != real / name or not path.is_file():
            raise ArtifactError(f"{path}, which the manifest lists, is missing or not a plain file of the artifact.")
        size = path.stat().st_size
        if size != expected["size"] or _sha256(path) != expected["sha256"]:
            raise ArtifactError(
                f"{path} was changed after the artifact was made: its size is {size} bytes and should be "
                f"{expected['size']}, or its sha256 is not {expected['sha256']}. Make the artifact again."
            )


def check_runner(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Refuse an artifact that only other clients can run.

    Raises:
        UnsupportedModelError: it is one.
    """
    if reason := manifest.not_for.get(RUNNER):
        raise UnsupportedModelError(f"{folder} is not for {RUNNER}: {reason}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
