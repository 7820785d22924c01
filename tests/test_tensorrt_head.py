"""`export.head_to_tensorrt`: the confident head alone, as a graph in ONNX Runtime, as an engine, and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from artifacts import wrapped
from engines import RTX, TARGETS, needs_gpu, needs_rtx
from families import algorithm_1, token_ids
from torch import Tensor

from cdsurgery import ArtifactError, ConfidentHead, InvalidInputError, export
from cdsurgery.export.tensorrt.head import write_head
from cdsurgery.export.tensorrt.manifest import read_engine_manifest
from cdsurgery.zoo import tiny_model

RESULTS = ("logits", "final_logits", "selected_layer", "entropy")


def states_of(model: ConfidentHead, ids: Tensor) -> Tensor:
    """`[M, B, S, D]`, by hooks on the plain layers and not by ours."""
    caught: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: caught.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(caught[::-1][: model.confident.lookback + 1])


def run(path: Path, **feed: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == list(RESULTS)
    return session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})


def test_the_graph_gives_what_the_wrapped_model_gives_from_its_states_alone(tmp_path: Path) -> None:
    model = wrapped("llama")
    write_head(model, tmp_path / "model.onnx")
    for batch, length in ((1, 1), (2, 7), (5, 1)):
        ids = token_ids(batch, length)
        truth: Any = model(ids)
        found = run(tmp_path / "model.onnx", states=states_of(model, ids))
        for name, value in zip(RESULTS, found, strict=True):
            wanted = truth[name].detach().numpy()
            assert value.shape == wanted.shape
            assert value.dtype == wanted.dtype
            # Sums in another order: 1e-5 of the row's largest logit, as for whole graphs.
            scale = 0 if name == "selected_layer" else 1e-5 * float(truth.final_logits.detach().abs().max())
            assert np.abs(value - wanted).max() <= scale, name
    assert int(truth.selected_layer.min()) < 4  # some row moved


def test_a_draw_takes_tokens_and_positions(tmp_path: Path) -> None:
    model = wrapped("llama", probability=0.5, seed=3)
    write_head(model, tmp_path / "model.onnx")
    ids = token_ids(4, 8)
    truth: Any = model(ids)
    positions = torch.arange(8).expand(4, 8).contiguous()
    found = run(tmp_path / "model.onnx", states=states_of(model, ids), input_ids=ids, position_ids=positions)
    assert (found[2] == truth.selected_layer.numpy()).all()
    everywhere: Any = wrapped("llama")(ids)
    assert not torch.equal(truth.selected_layer, everywhere.selected_layer)


@needs_rtx
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_engine_of_the_head_is_built_and_describes_itself(tmp_path: Path, dtype: torch.dtype) -> None:
    model = wrapped("llama") if dtype == torch.float32 else wrapped("mistral", dtype)
    folder = export.head_to_tensorrt(model, tmp_path / "head", package=RTX, targets=TARGETS, batch=(1, 2, 4))
    made = read_engine_manifest(folder)
    assert [(one.name, {axis: str(size) for axis, size in one.axes.items()}) for one in made.profiles] == [
        ("head", {"batch": "1 to 4", "sequence": "1 to 1"})
    ]
    (states,) = made.signature.inputs
    assert (states.name, states.dtype, states.axes) == (
        "states",
        str(dtype)[6:],
        (model.confident.lookback + 1, "batch", "sequence", 64),
    )
    assert [spec.name for spec in made.signature.outputs] == list(RESULTS)
    assert {path.name for path in folder.iterdir()} == {"model.engine", "engine.json", "build.log"}
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInputError, match="sees none"):
            export.tensorrt.EngineSession(str(folder))
    with pytest.raises(ArtifactError, match=r"a head alone, which takes states .*EngineSession"):
        export.load(folder)


def test_what_has_no_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="This LlamaForCausalLM has no confident head"):
        export.head_to_tensorrt(tiny_model("llama"), tmp_path / "head")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="with a probability above 0"):
        export.head_to_tensorrt(wrapped("llama", probability=0.0), tmp_path / "head")
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="exists already"):
        export.head_to_tensorrt(wrapped("llama"), tmp_path)


def broken_states(model: ConfidentHead) -> Tensor:
    """`[M, 5, 1, D]`: as they are; NaN in a candidate; inf in a candidate; NaN in the final state; two alike."""
    states = states_of(model, token_ids(5, 1))
    states[1, 1, 0, 3] = float("nan")
    states[1, 2, 0, 3] = float("inf")
    states[0, 3, 0, 3] = float("nan")
    states[1, 4] = states[0, 4]  # a tie is no improvement
    return states


def assert_broken_layers_never_speak(found: list[Any]) -> None:
    """NaN and infinity have entropy NaN and stop the scan; a tie keeps the later layer."""
    logits, final_logits, layer, entropy = (np.asarray(field)[:, 0] for field in found)
    assert np.isfinite(entropy[0]).all()
    for row, candidate in ((1, 1), (2, 1), (3, 0)):
        assert np.isnan(entropy[row, candidate])
    assert layer[:, None].tolist() == [[4 - algorithm_1(row)] for row in entropy.tolist()]
    assert layer[1:].tolist() == [4, 4, 4, 4]
    assert np.isfinite(logits[[0, 1, 2, 4]]).all()
    assert entropy[4, 0] == entropy[4, 1]
    for row in (1, 2, 4):
        assert (logits[row] == final_logits[row]).all()


def test_broken_candidates_never_speak(tmp_path: Path) -> None:
    write_head(wrapped("llama"), tmp_path / "model.onnx")
    assert_broken_layers_never_speak(run(tmp_path / "model.onnx", states=broken_states(wrapped("llama"))))


@pytest.mark.gpu
@needs_gpu
@needs_rtx
def test_on_a_gpu_the_head_gives_what_the_model_gives_and_broken_candidates_never_speak(tmp_path: Path) -> None:
    model = wrapped("llama")
    session = export.tensorrt.EngineSession(export.head_to_tensorrt(model, tmp_path / "head", package=RTX, batch=8))
    ids = token_ids(8, 1)
    truth: Any = model(ids)
    found = session.run({"states": states_of(model, ids)})
    assert torch.equal(found["selected_layer"].cpu(), truth.selected_layer)
    for name in ("logits", "final_logits", "entropy"):
        assert torch.allclose(
            found[name].cpu(), truth[name], rtol=0, atol=1e-5 * float(truth.final_logits.detach().abs().max())
        )
    outputs = session.run({"states": broken_states(model)})
    assert_broken_layers_never_speak([outputs[name].cpu().numpy() for name in RESULTS])
