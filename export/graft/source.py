"""A path -> the ONNX model there, its weights read only from files beside it and proven to be whole."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir

from cdsurgery.errors import ArtifactError, InvalidInputError


def open_model(path: str | os.PathLike[str]) -> onnx_ir.Model:
    """Read a graph; weights in other files stay there until they are needed.

    Args:
        path: an ONNX file.

    Raises:
        InvalidInputError: there is no such file, or it is not an ONNX model.
        ArtifactError: weights lie outside of its folder, behind a link, or not at all.
    """
    file = Path(path)
    if file.is_dir():
        found = sorted(p.name for p in file.glob("*.onnx"))
        raise InvalidInputError(f"{path} is a folder; give the ONNX file in it ({', '.join(found) or 'it has none'}).")
    if not file.is_file():
        raise InvalidInputError(f"There is no file {path}. Give the ONNX file of an exported decoder.")
    try:
        model = onnx_ir.load(file)
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own kinds
        raise InvalidInputError(f"{path} cannot be read as an ONNX model ({type(error).__name__}: {error}).") from error
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, onnx_ir.ExternalTensor):
                _check_external(file, value.const_value)
    return model


def _check_external(file: Path, tensor: onnx_ir.ExternalTensor) -> None:
    """Refuse a weight that is not in a plain file of the model's own folder, or beyond that file's end.

    Names that lead elsewhere read foreign files into the artifact (CVE-2022-25882, CVE-2024-27318).
    """
    name = f"The weight '{tensor.name}' of {file}"
    location = os.fspath(tensor.location)
    if not isinstance(location, str):  # bytes, where a file is damaged
        raise ArtifactError(f"{name} is stored at {location!r}, which is no name of a file. Get the file again.")
    place = file.parent / location
    if os.path.isabs(location) or Path(location).name != location or location in ("", ".", ".."):
        raise ArtifactError(f"{name} is stored at '{location}'; weights may lie only in files beside the model.")
    if not place.exists() and not place.is_symlink():
        raise ArtifactError(f"{name} is stored in {place}, which does not exist. Put the model's weights beside it.")
    if place.is_symlink() or not place.is_file() or place.stat().st_nlink > 1:
        raise ArtifactError(
            f"{name} is stored in {place}, which is a link or no plain file. Links are not followed, as a foreign file "
            "may be behind them. If it is a cache of yours, copy the folder with its contents first (cp -rL)."
        )
    size = place.stat().st_size
    end = (tensor.offset or 0) + (tensor.nbytes if tensor.length is None else tensor.length)
    if end > size or (tensor.length is not None and tensor.length < tensor.nbytes):
        raise ArtifactError(
            f"{name} needs {tensor.nbytes} bytes up to byte {end} of {place}, which has {size}: the file is truncated "
            "or of another model. Copy it again."
        )
