"""Graphs with scan="lazy": deeper layers are projected for the rows that get that far, and for no other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from artifacts import wrapped
from engines import RTX, TARGETS, needs_rtx
from families import mostly, tiny_model, token_ids

import cdsurgery
from cdsurgery import ConfidentHead, InvalidInputError, export
from cdsurgery.errors import ArtifactError
from cdsurgery.zoo import VOCABULARY

LOOKBACK = 2
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
# A tied head, and a hybrid with recurrent states.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 3, "tie_word_embeddings": True},
    "qwen3_5_text": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}


def model_of(family: str, **options: Any) -> ConfidentHead:
    return cdsurgery.wrap(tiny_model(family, **FAMILIES[family]), lookback=LOOKBACK, **options)


@pytest.fixture(scope="module", params=mostly(["qwen3"], list(FAMILIES)))
def lazy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfidentHead, Path]:
    """A model and its artifact, which `to_onnx` has compared with it."""
    model = model_of(request.param)
    return model, export.to_onnx(model, tmp_path_factory.mktemp(request.param) / "lazy", scan="lazy")


def test_it_selects_what_the_model_does_and_leaves_out_only_what_the_scan_did_not_reach(
    lazy: tuple[ConfidentHead, Path],
) -> None:
    model, folder = lazy
    runner = export.load(folder)
    behind, moved = [], 0
    for seed in range(24):
        ids = token_ids(1, 5, seed)
        with torch.no_grad():
            truth = model(ids, logits_to_keep=1)
        out = runner(ids)
        assert torch.equal(out.selected_layer, truth.selected_layer)
        # ONNX Runtime is 1e-5 of the largest logit from PyTorch, also in nats.
        tolerance = {"rtol": 0, "atol": 1e-5 * float(truth.final_logits.abs().max())}
        torch.testing.assert_close(out.logits, truth.logits, **tolerance)
        torch.testing.assert_close(out.final_logits, truth.final_logits, **tolerance)
        depth = len(model.anatomy.layers) - int(out.selected_layer)
        behind.append(int(out.entropy.isnan().sum()))
        # The graph knows two kinds of rows: of two candidates, and of all.
        assert behind[-1] == (LOOKBACK - 1 if depth == 0 else 0)
        measured = ~out.entropy.isnan()
        torch.testing.assert_close(out.entropy[measured], truth.entropy[measured], **tolerance)
        moved += depth > 0
    assert 0 < moved < 24


def products(session: onnxruntime.InferenceSession) -> list[int]:
    """Of how many rows each product with the unembedding was, over all runs of a session that ends here."""
    events = json.loads(Path(session.end_profiling()).read_text())
    shapes = [
        event["args"]["output_type_shape"] for event in events if event.get("args", {}).get("op_name") in PRODUCTS
    ]
    sizes = [size for (shape,) in shapes for size in shape.values()]
    return [math.prod(rows) for *rows, columns in sizes if columns == VOCABULARY]


def test_deeper_layers_are_projected_for_the_rows_that_descend(
    lazy: tuple[ConfidentHead, Path], tmp_path: Path
) -> None:
    _, folder = lazy
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    runner = export.load(folder)
    runner.session._session = session
    layers, expected, moving = runner.manifest.layers, [], set()
    for seed in range(12):
        batch = 1 + seed % 4
        moved = int((runner(token_ids(batch, 5, seed)).selected_layer < layers).sum())
        expected += [2 * batch, (LOOKBACK - 1) * moved]
        moving.add(moved)
    assert products(session) == expected
    assert {0, 1, 2} <= moving


def test_its_weights_are_stored_once_and_multiplied_as_they_stand(lazy: tuple[ConfidentHead, Path]) -> None:
    model, folder = lazy
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert "If" not in {node.op_type for node in graph.node}
    turned = {name for node in graph.node if node.op_type == "Transpose" for name in node.input}
    assert not turned & {initializer.name for initializer in graph.initializer}
    shared = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    assert (folder / "model.onnx.data").stat().st_size < sum(shared.values()) * 1.05 + 65536


@needs_rtx
def test_tensorrt_rtx_says_what_it_lacks_for_it(lazy: tuple[ConfidentHead, Path], tmp_path: Path) -> None:
    _, folder = lazy
    with pytest.raises(ArtifactError, match="NonZero"):
        export.to_tensorrt(folder, tmp_path / "engine", package=RTX, targets=TARGETS)


def test_rows_of_a_batch_go_their_own_ways_and_one_without_leave_stays(tmp_path: Path) -> None:
    model = model_of("qwen3", probability=0.5, seed=3)
    runner = export.load(export.to_onnx(model, tmp_path / "half", scan="lazy", parity=False))
    ids = token_ids(12, 5)
    with torch.no_grad():
        truth = model(ids, logits_to_keep=1)
    out = runner(ids)
    assert torch.equal(out.selected_layer, truth.selected_layer)
    stays = out.selected_layer == runner.manifest.layers
    assert 0 < stays.sum() < 12
    assert not out.entropy[..., :2].isnan().any()
    assert torch.equal(out.entropy[..., 2:].isnan(), stays[..., None].expand(-1, -1, LOOKBACK - 1))


@pytest.mark.thorough
@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_it_is_quantised_as_any_other(quantization: Any, tmp_path: Path) -> None:
    """`to_onnx` compares the artifact with its own weights, which head and candidates share."""
    model = model_of("qwen3")
    sizes = []
    for scan in ("lazy", "static"):
        folder = export.to_onnx(model, tmp_path / scan, scan=scan, quantization=quantization)  # type: ignore[arg-type]
        sizes.append((folder / "model.onnx.data").stat().st_size)
    assert sizes[0] == sizes[1]


def test_one_layer_of_lookback_leaves_no_further_layer(tmp_path: Path) -> None:
    model = cdsurgery.wrap(tiny_model("llama", num_hidden_layers=2), lookback=1)
    folder = export.to_onnx(model, tmp_path / "one", scan="lazy", parity=False)
    assert "NonZero" not in {
        node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan": "eager"}, "scan is 'eager'; it must be one of 'static', 'lazy'"),
        ({"scan": "lazy", "positions": "score"}, "one candidate after another"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        export.to_onnx(wrapped("llama"), tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
