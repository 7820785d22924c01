"""The same model exported in two processes: the same bytes, in whatever order sets of objects come out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from artifacts import EXPORTED, artifact
from families import mostly, tiny_model

import cdsurgery
from cdsurgery import export

CHILD = """
import sys
from pathlib import Path
import conftest  # what holds for a test
from test_deterministic_export import exported

exported(Path(sys.argv[1]))
"""


def exported(folder: Path) -> Path:
    model = cdsurgery.wrap(tiny_model("qwen3", num_hidden_layers=2, tie_word_embeddings=True), lookback=1)
    return export.to_onnx(model, folder, quantization="int4")


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "theirs")]
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # here it is random
    options: dict[str, Any] = {"cwd": Path(__file__).parent, "env": environment, "text": True}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    ours = exported(tmp_path / "ours")
    _, errors = child.communicate()
    assert child.returncode == 0, errors[-2000:]
    files = sorted(path.name for path in ours.iterdir())
    assert len(files) >= 6
    for file in files:
        assert (ours / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file


@pytest.mark.parametrize("family", mostly(["llama"], EXPORTED))
def test_checker_and_strict_shape_inference_are_clean_on_the_files(family: str, tmp_path: Path) -> None:
    """By path, so that the weights in the file beside it are read as well."""
    path = artifact(family) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    inferred = tmp_path / "inferred.onnx"
    onnx.shape_inference.infer_shapes_path(str(path), str(inferred), check_type=True, strict_mode=True, data_prop=True)
    graph = onnx.load(inferred, load_external_data=False).graph
    typed = {value.name for value in (*graph.value_info, *graph.output)}
    assert {name for node in graph.node for name in node.output} <= typed
