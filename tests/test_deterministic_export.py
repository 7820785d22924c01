"""The same model exported twice: the same bytes, in whatever order sets and dictionaries of objects come out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from artifacts import EXPORTED, artifact

CHILD = """
import sys
import torch
torch.set_num_threads(1)
import cdsurgery
from cdsurgery import export
from families import tiny_model

model = cdsurgery.wrap(tiny_model("qwen3", num_hidden_layers=2, tie_word_embeddings=True), lookback=1)
export.to_onnx(model, f"{sys.argv[1]}/int4", quantization="int4")
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    runs = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", CHILD, str(tmp_path / seed)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        options: dict[str, Any] = {"cwd": Path(__file__).parent, "env": environment, "text": True}
        runs.append(subprocess.Popen(command, stderr=subprocess.PIPE, **options))
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors[-2000:]
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").glob("*/*"))
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


@pytest.mark.parametrize("family", EXPORTED)
def test_checker_and_strict_shape_inference_are_clean_on_the_files(family: str, tmp_path: Path) -> None:
    """By path, so that the weights in the file beside it are read as well."""
    path = artifact(family) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    inferred = tmp_path / "inferred.onnx"
    onnx.shape_inference.infer_shapes_path(str(path), str(inferred), check_type=True, strict_mode=True, data_prop=True)
    graph = onnx.load(inferred, load_external_data=False).graph
    typed = {value.name for value in (*graph.value_info, *graph.output)}
    assert {name for node in graph.node for name in node.output} <= typed
