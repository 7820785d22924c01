"""TensorRT in the process of a served model: what ONNX Runtime is asked for, and where engines are kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from artifacts import artifact, wrapped
from served import SIGNATURE, Reply, prompts, request, truth
from triton_server import ROOT

from cdsurgery import export
from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.runtime.providers import TENSORRT, TENSORRT_RTX
from cdsurgery.export.triton.repository import ARTIFACT
from cdsurgery.export.triton.serving.decoder import OrtDecoder
from cdsurgery.export.triton.serving.engines import cache_folder
from cdsurgery.export.triton.serving.errors import FolderError
from cdsurgery.export.triton.serving.providers import providers_for
from cdsurgery.export.triton.serving.scheduler import Scheduler
from cdsurgery.export.triton.serving.settings import Settings, read_settings
from cdsurgery.export.triton.settings import serving_settings

TINY = ROOT / "examples" / "tiny_lm"
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
FILES = {"artifact/model.onnx": {"sha256": "a", "size": 1}}


def tensorrt_settings(cache: Path | None = None) -> Settings:
    """Four slots, chunks of 5, a context of 40."""
    options = export.ServingOptions(kind="gpu", providers="tensorrt", cache=cache, slots=4, chunk=5, context=40)
    manifest: Any = SimpleNamespace(signature=SIGNATURE, layers=3)
    made = serving_settings(TINY, manifest, options, files=FILES, step_model=None)
    return replace(made, end_tokens=())  # answers are as long as they are asked for


def sizes(shapes: str) -> dict[str, list[int]]:
    """ "input_ids:4x1,..." -> {"input_ids": [4, 1], ...}."""
    pairs = (one.split(":") for one in shapes.split(","))
    return {name: list(map(int, size.split("x"))) for name, size in pairs}


class Shapes:
    """A decoder that computes nothing, whose states are arrays, and that keeps the shapes of what it gets."""

    def __init__(self, config: Settings) -> None:
        self.config, self.seen = config, []

    def run(self, tokens: dict[str, Any], past: Any, wanted: Any) -> tuple[dict[str, Any], list[Any]]:
        names = (spec.name for spec in self.config.past)
        given = tokens | dict(zip(names, past, strict=True))
        self.seen.append({name: list(array.shape) for name, array in given.items()})
        batch, new = tokens["input_ids"].shape
        wide = [(0, 0), (0, 0), (0, new), (0, 0)]
        later = [
            np.pad(state, wide) if spec.growing else state for spec, state in zip(self.config.past, past, strict=True)
        ]
        results = {"logits": np.ones((batch, 1, 256)), "selected_layer": np.full((batch, 1), 3)}
        return {name: results[name] for name in wanted}, later

    def fetch(self, states: Any) -> list[Any]:
        return list(states)

    place = fetch


@pytest.mark.parametrize(("provider", "prefix"), [(TENSORRT, "trt"), (TENSORRT_RTX, "nv")])
def test_every_shape_that_the_scheduler_runs_is_one_that_the_engine_is_built_for(provider: str, prefix: str) -> None:
    """The longest prompt and the longest answer, all slots taken: the largest shapes are reached and not passed."""
    config = tensorrt_settings()
    smallest, tuned, largest = (
        sizes(config.providers[provider][f"{prefix}_profile_{size}_shapes"]) for size in ("min", "opt", "max")
    )
    decoder = Shapes(config)
    scheduler = Scheduler(decoder, config)
    for length in (37, 37, 3, 3):
        scheduler.submit(request(config, [1] * length, Reply(), max_tokens=40 - length))
    while scheduler.step():
        pass
    assert decoder.seen[0].keys() == smallest.keys() == tuned.keys() == largest.keys()
    reached = {name: np.array([shapes[name] for shapes in decoder.seen]) for name in smallest}
    for name, found in reached.items():
        assert (found >= smallest[name]).all() and (found <= largest[name]).all(), name
        assert tuned[name][0] == 4
    assert reached["input_ids"].max(0).tolist() == largest["input_ids"] == [4, 5]
    for spec in config.past:
        if spec.growing is not None:
            assert reached[spec.name][:, 2].max() == largest[spec.name][2] == 38


def kept_by(config: Settings) -> Path:
    """Where a model with these settings keeps its engines."""
    assert config.cache is not None
    return cache_folder(Path(config.cache), config.files)


class Opened:
    """Stands for a session: keeps what it was opened with, and says that it runs on some providers."""

    def __init__(self, runs: list[str]) -> None:
        self.runs, self.asked = runs, []

    def __call__(self, path: str, options: Any, providers: Any) -> Opened:
        self.asked = providers
        return self

    def get_providers(self) -> list[str]:
        return self.runs


def test_onnx_runtime_is_asked_for_tensorrt_with_shapes_and_caches_and_then_for_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tensorrt_settings(tmp_path / "cache")
    for provider, others in ((TENSORRT, []), (TENSORRT_RTX, []), (TENSORRT, [TENSORRT_RTX])):
        available = [*others, provider, CUDA, CPU]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda names=available: names)
        opened = Opened([provider, CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
        OrtDecoder(tmp_path, config, ("cuda", 3))
        (name, options), cuda = opened.asked
        assert (name, cuda) == (provider, (CUDA, {"device_id": 3}))
        assert options["device_id"] == 3
        assert config.providers[provider].items() <= options.items()
        kept = str(kept_by(config))
        expected = {
            TENSORRT: {
                "trt_engine_cache_enable": True,
                "trt_engine_cache_path": kept,
                "trt_timing_cache_enable": True,
                "trt_timing_cache_path": kept,
            },
            TENSORRT_RTX: {"nv_runtime_cache_path": kept},
        }[provider]
        assert {key: value for key, value in options.items() if "cache" in key} == expected
        OrtDecoder(tmp_path, replace(config, cache=None), ("cuda", 3))
        assert not [key for key in opened.asked[0][1] if "cache" in key]
    opened.runs = [CUDA, CPU]
    with pytest.raises(FolderError, match=f"could not start {TENSORRT} and would run on {CUDA}, {CPU}"):
        OrtDecoder(tmp_path, config, ("cuda", 3))
    assert providers_for(replace(config, providers={}), ("cuda", 1)) == [(CUDA, {"device_id": 1})]
    assert providers_for(replace(config, providers={}), ("cpu", 0)) == [(CPU, {})]


def test_without_a_tensorrt_provider_the_model_does_not_load_and_says_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(
        FolderError, match=f"wants {TENSORRT} or {TENSORRT_RTX}, and this ONNX Runtime has {CUDA}, {CPU}"
    ):
        providers_for(tensorrt_settings(), ("cuda", 0))


def test_what_a_served_model_is_told_survives_its_file(tmp_path: Path) -> None:
    config = tensorrt_settings(tmp_path)
    (tmp_path / "serving.json").write_text(config.to_json())
    assert read_settings(tmp_path) == config
    assert config.cache == str(tmp_path)


def test_engines_of_other_weights_have_another_folder_that_only_the_owner_can_write(tmp_path: Path) -> None:
    config = tensorrt_settings(tmp_path / "engines")
    other = replace(config, files={"artifact/model.onnx": {"sha256": "b", "size": 1}})
    folders = {kept_by(config), kept_by(other)}
    assert {folder.parent for folder in folders} == {tmp_path / "engines"}
    assert len(folders) == 2
    assert kept_by(config) in folders, "the next start must find what this one kept"
    for folder in (tmp_path / "engines", *folders):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_can_write_or_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tensorrt_settings(tmp_path / "open")
    (tmp_path / "open").mkdir()
    for mode in (0o770, 0o707):
        (tmp_path / "open").chmod(mode)
        with pytest.raises(FolderError, match=f"with mode {mode:o}.*nobody else may write"):
            kept_by(config)
    (tmp_path / "open").chmod(0o755)
    assert kept_by(config).is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(FolderError, match=r"must be user 12345's"):
            kept_by(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"cannot be used: .*Name another folder"):
        kept_by(tensorrt_settings(tmp_path / "file" / "below"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FolderError, match="cannot be written"):
        kept_by(config)


@pytest.mark.gpu
@pytest.mark.skipif(
    not {TENSORRT, TENSORRT_RTX} & set(onnxruntime.get_available_providers()) or not torch.cuda.is_available(),
    reason="needs a CUDA device and an ONNX Runtime with TensorRT",
)
def test_on_a_gpu_the_first_tokens_are_those_of_pytorch_and_the_second_start_finds_the_engine(tmp_path: Path) -> None:
    folder = artifact("llama")
    (tmp_path / ARTIFACT).symlink_to(folder)
    options = export.ServingOptions(kind="gpu", providers="tensorrt", cache=tmp_path / "cache", slots=4, context=40)
    made = serving_settings(folder, read_manifest(folder), options, files=FILES, step_model=None)
    config, kept = replace(made, end_tokens=()), []
    asked = prompts(config.vocabulary)
    for _ in range(2):
        scheduler, replies = Scheduler(OrtDecoder(tmp_path, config, ("cuda", 0)), config), [Reply() for _ in asked]
        for prompt, reply in zip(asked, replies, strict=True):
            scheduler.submit(request(config, prompt, reply))
        while scheduler.step():
            pass
        # Rounding may decide between two tokens, and then all that follow differ: the first of each answer is judged.
        first = [reply.tokens[:1] for reply in replies]
        wanted = [truth(wrapped("llama"), prompt, 1) for prompt in asked]
        assert sum(one == other for one, other in zip(first, wanted, strict=True)) >= len(asked) - 1
        files = [path for path in kept_by(config).iterdir() if path.suffix != ".timing"]
        kept.append({path.name: path.stat().st_mtime_ns for path in files})
    assert kept[0]
    assert kept[0] == kept[1]
