"""Graphs with scan="lazy": the branch that projects deeper layers runs only where a row gets that far."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from artifacts import wrapped
from engines import RTX, TARGETS, needs_rtx
from families import mostly, tiny_model, token_ids
from torch._dynamo import trace_rules

import cdsurgery
from cdsurgery import ConfidentHead, InvalidInputError, export

LOOKBACK = 2
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
        # The graph knows two ways: two candidates, or all.
        assert behind[-1] == (LOOKBACK - 1 if depth == 0 else 0)
        measured = ~out.entropy.isnan()
        torch.testing.assert_close(out.entropy[measured], truth.entropy[measured], **tolerance)
        moved += depth > 0
    assert 0 < moved < 24


@needs_rtx
def test_tensorrt_takes_its_branch_for_a_conditional(lazy: tuple[ConfidentHead, Path], tmp_path: Path) -> None:
    _, folder = lazy
    built = export.to_tensorrt(folder, tmp_path / "engine", package=RTX, targets=TARGETS)
    assert (built / "model.engine").stat().st_size > 0


def test_the_branch_runs_only_when_a_row_descends(lazy: tuple[ConfidentHead, Path], tmp_path: Path) -> None:
    _, folder = lazy
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    runner = export.load(folder)
    runner.session._session = session
    depths = [runner.manifest.layers - int(runner(token_ids(1, 5, seed)).selected_layer) for seed in range(24)]
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = Counter(event["args"]["op_name"] for event in events if event.get("cat") == "Node")
    # Every scan ends in an ArgMax of each entropy: one for the two last layers, another in the branch.
    assert ran["ArgMax"] == 24 + sum(depth > 0 for depth in depths)
    assert ran["If"] == 24


def test_its_weights_are_stored_once_and_multiplied_as_they_stand(lazy: tuple[ConfidentHead, Path]) -> None:
    model, folder = lazy
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    (branching,) = [node for node in graph.node if node.op_type == "If"]
    for branch in (attribute.g for attribute in branching.attribute):
        assert not branch.initializer
        turned = {name for node in branch.node if node.op_type == "Transpose" for name in node.input}
        assert not turned & {initializer.name for initializer in graph.initializer}
    shared = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    assert (folder / "model.onnx.data").stat().st_size < sum(shared.values()) * 1.05 + 65536


@pytest.fixture
def odd_table() -> Iterator[None]:
    """What another export leaves that was the first of its process to use dynamo: it has replaced torch.where then."""
    where, table = torch.where, trace_rules.get_torch_obj_rule_map
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "where", lambda *args, **options: where(*args, **options))
        table.cache_clear()
        table()
    yield
    table.cache_clear()


@pytest.mark.usefixtures("odd_table")
def test_a_batch_takes_the_branch_together_and_a_row_without_leave_stays_out(tmp_path: Path) -> None:
    model = model_of("qwen3", probability=0.5, seed=3)
    runner = export.load(export.to_onnx(model, tmp_path / "half", scan="lazy", parity=False))
    ids = token_ids(12, 5)
    with torch.no_grad():
        truth = model(ids, logits_to_keep=1)
    out = runner(ids)
    assert torch.equal(out.selected_layer, truth.selected_layer)
    assert not out.entropy.isnan().any()
    assert 0 < (truth.selected_layer < 3).sum() < 12
    assert {torch.where, torch.chunk} <= trace_rules.get_torch_obj_rule_map().keys()


def test_one_layer_of_lookback_leaves_nothing_to_branch_to(tmp_path: Path) -> None:
    model = cdsurgery.wrap(tiny_model("llama", num_hidden_layers=2), lookback=1)
    folder = export.to_onnx(model, tmp_path / "one", scan="lazy", parity=False)
    assert "If" not in {node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan": "eager"}, "scan is 'eager'; it must be one of 'static', 'lazy'"),
        ({"scan": "lazy", "positions": "score"}, "one candidate after another"),
        ({"scan": "lazy", "quantization": "int4"}, "quantization must be None"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        export.to_onnx(wrapped("llama"), tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
