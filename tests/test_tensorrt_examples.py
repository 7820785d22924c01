"""The scripts that measure engines: what of them needs no GPU, and that the table in the documents is theirs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from artifacts import Client, artifact, wrapped
from families import token_ids

from benchmarks.parts import tensorrt
from benchmarks.plain import plain_artifact
from cdsurgery import export

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.thorough
def test_the_plain_artifact_projects_one_row_and_says_the_same(tmp_path: Path) -> None:
    model = wrapped("llama")
    plain = plain_artifact(model, tmp_path / "plain")
    assert model.confident.lookback == 2
    whole, alone = Client(artifact("llama")), Client(plain)
    assert alone.outputs == [name for name in whole.outputs if name not in ("logits", "selected_layer", "entropy")]
    ids = token_ids(2, 5)
    found, truth = alone(ids, torch.ones_like(ids)), whole(ids, torch.ones_like(ids))
    # One row and three are summed in another order.
    assert abs(found["final_logits"] - truth["final_logits"]).max() <= 1e-5 * abs(truth["final_logits"]).max()
    graphs = [onnx.load(folder / "model.onnx", load_external_data=False).graph for folder in (plain, artifact("llama"))]
    counts = [[node.op_type for node in graph.node] for graph in graphs]
    assert counts[0].count("ArgMax") == 0 < counts[1].count("ArgMax")  # of the entropy
    assert len(counts[0]) < len(counts[1])
    export.load(plain)  # the manifest describes what was written


def test_a_decode_feed_is_one_token_on_a_cache() -> None:
    runner = export.load(artifact("llama"))
    outputs = runner.session.run(tensorrt.decode_feed(runner.manifest.signature, 3, 9, "cpu"))
    assert outputs["present.0.key"].shape[2] == 10
    assert torch.isfinite(outputs["entropy"]).all()


def test_the_table_of_families_is_whole_and_says_what_stopped_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from onnx_families import FAMILIES

    lines = (
        (ROOT / "docs" / "tensorrt.md").read_text().split("families: begin")[1].split("families: end")[0].splitlines()
    )
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "builds" not in line]
    assert [row[0] for row in rows] == list(FAMILIES)
    for row in rows:
        for cell in row[1::2]:
            assert " MB, " in cell or cell.startswith(("does not parse: ", "does not build: "))
