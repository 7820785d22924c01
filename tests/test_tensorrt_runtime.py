"""Engines at run time: what may be opened, and on a GPU what they say; ONNX Runtime's TensorRT provider."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from artifacts import artifact, wrapped
from engines import engine, needs_gpu, needs_rtx, needs_tensorrt, runs_here
from families import token_ids

from cdsurgery import ArtifactError, InvalidInputError, export
from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.runtime.providers import TENSORRT, TENSORRT_RTX
from cdsurgery.export.tensorrt.admission import check_version, checked_gpu
from cdsurgery.export.tensorrt.manifest import EngineManifest
from cdsurgery.export.triton.serving.engines import cache_folder


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(needs_gpu(needs_rtx(test)))


@needs_rtx
def test_an_engine_is_opened_only_as_it_was_built(tmp_path: Path) -> None:
    if runs_here():
        assert export.load(engine("llama")).device.type == "cuda"
    elif torch.cuda.is_available():
        with pytest.raises(ArtifactError, match=r"cannot open .*TensorRT said:\n.*compute capability"):
            export.load(engine("llama"))
    else:
        with pytest.raises(InvalidInputError, match=r"runs on an NVIDIA GPU, and this PyTorch .* sees none"):
            export.load(engine("llama"))
    with pytest.raises(InvalidInputError, match="is an engine, which takes no providers"):
        export.load(engine("llama"), providers=["CPUExecutionProvider"])
    with pytest.raises(InvalidInputError, match="is an engine already"):
        export.to_tensorrt(engine("llama"), tmp_path / "engine")
    plan = (engine("llama") / "model.engine").read_bytes()
    flipped = bytearray(plan)
    flipped[len(plan) // 2] ^= 1
    for content in (plan[:-1], bytes(flipped), b""):
        folder = shutil.copytree(engine("llama"), tmp_path / str(len(content)), dirs_exist_ok=True)
        (folder / "model.engine").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"model\.engine was changed after"):
            export.load(folder)
        with pytest.raises(ArtifactError, match=r"model\.engine was changed after it was built"):
            export.tensorrt.session.EngineSession(folder)  # which a head's folder is opened with
    (folder / "model.engine").unlink()
    with pytest.raises(ArtifactError, match=r"model\.engine, which the manifest lists, is missing"):
        export.load(folder)


@needs_rtx
def test_manifests_of_another_schema_or_none_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(engine("llama"), tmp_path / "engine")
    said = json.loads((folder / "engine.json").read_text())
    for content, message in (
        (json.dumps(said | {"schema_version": 99}), "has schema version 99; this cdsurgery reads version 1"),
        (json.dumps({"schema_version": 1}), "is not an engine's manifest"),
        ("{", "is not an engine's manifest"),
    ):
        (folder / "engine.json").write_text(content)
        with pytest.raises(ArtifactError, match=message):
            export.tensorrt.session.EngineSession(folder)
    (folder / "engine.json").unlink()
    with pytest.raises(ArtifactError, match="holds no engine"):
        export.tensorrt.session.EngineSession(folder)


def manifest(**changes: Any) -> EngineManifest:
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(EngineManifest)}
    said = {"package": "tensorrt", "version": "10.9.0", "targets": (), "flags": (), "portable": False, "gpu": "A (8.0)"}
    return EngineManifest(**(fields | said | changes))


def test_another_version_of_tensorrt_is_refused_unless_it_is_later_and_may_be() -> None:
    lasting = manifest(flags=("VERSION_COMPATIBLE",))
    check_version(manifest(), "10.9.0")
    check_version(lasting, "10.9.0")
    check_version(lasting, "10.10.0", Path(__file__))
    with pytest.raises(
        InvalidInputError, match=r"10\.10\.0 runs it in that version's .* libnvinfer_lean\.so\.10\.9\.0,"
    ):
        check_version(manifest(version="10.9.0.34", flags=("VERSION_COMPATIBLE",)), "10.10.0")
    with pytest.raises(InvalidInputError, match="lean_runtime is nowhere, which is no file"):
        check_version(lasting, "10.10.0", Path("nowhere"))
    with pytest.raises(InvalidInputError, match="was not built with version_compatible"):
        check_version(manifest(), "10.9.0", Path(__file__))
    for made, version in ((manifest(), "10.10.0"), (manifest(), "10.8.0"), (lasting, "10.8.0")):
        with pytest.raises(ArtifactError, match=rf"built by tensorrt 10\.9\.0, and {version} is installed"):
            check_version(made, version)


def test_another_gpu_is_refused_where_the_engine_is_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as here:
        here.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(InvalidInputError, match="sees none"):
            checked_gpu(manifest())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for fine in (
        manifest(),
        manifest(gpu="B (8.9)", portable=True),
        manifest(gpu=None),
        manifest(package="tensorrt_rtx", gpu=None),
        manifest(package="tensorrt_rtx", gpu=None, targets=("SM80", "SM89")),
    ):
        assert checked_gpu(fine) == torch.device("cuda", 1)
    with pytest.raises(ArtifactError, match=r"tuned for a B \(8\.0\), and this GPU is a A \(8\.0\)"):
        checked_gpu(manifest(gpu="B (8.0)"))
    with pytest.raises(ArtifactError, match=r"built for SM89, and this GPU is a A \(8\.0\)\. .*\['SM80'\]"):
        checked_gpu(manifest(package="tensorrt_rtx", targets=("SM89",)))


def test_onnx_runtimes_tensorrt_provider_gets_shapes_and_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = artifact("llama"), []
    if TENSORRT not in onnxruntime.get_available_providers():
        with pytest.raises(InvalidInputError, match=r"providers is 'tensorrt', and this ONNX Runtime has .*CPU"):
            export.load(folder, providers="tensorrt")
    for options in ({"cache": tmp_path}, {"cuda_graphs": True}):
        with pytest.raises(
            InvalidInputError, match="is an ONNX artifact: cuda_graphs and lean_runtime are for engines"
        ):
            export.load(folder, **options)
    monkeypatch.setattr(export.runtime.runner, "OnnxRunner", lambda *arguments: given.append(arguments[2]))
    for provider, prefix in ((TENSORRT, "trt"), (TENSORRT_RTX, "nv")):
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda name=provider: [name, "CPUExecutionProvider"]
        )
        export.load(folder, providers="tensorrt", cache=tmp_path / prefix)
        (name, options), *others = given.pop()
        assert (name, others) == (provider, ["CPUExecutionProvider"])
        kept = cache_folder(tmp_path / prefix, read_manifest(folder).files)
        assert {value for key, value in options.items() if key.endswith("_path")} == {str(kept)}
        shapes = [options[f"{prefix}_profile_{size}_shapes"].split(",") for size in ("min", "opt", "max")]
        names = [spec.name for spec in read_manifest(folder).signature.inputs]
        for size in shapes:
            assert [entry.split(":")[0] for entry in size] == names
        assert [size[0] for size in shapes] == ["input_ids:1x1", "input_ids:8x1", "input_ids:8x128"]
        assert [size[1] for size in shapes] == [f"attention_mask:{of}" for of in ("1x1", "8x64", "8x255")]
        assert shapes[0][3] == "past_key_values.0.key:1x2x0x16"
    (tmp_path / "nv").chmod(0o777)
    with pytest.raises(InvalidInputError, match="nobody else may write there"):
        export.load(folder, providers="tensorrt", cache=tmp_path / "nv")
    export.load(folder, providers="tensorrt")
    assert not [key for key in given.pop()[0][1] if "cache" in key]


@gpu
def test_on_a_gpu_an_engine_agrees_with_the_model() -> None:
    report = export.verify(engine("llama"), copy.deepcopy(wrapped("llama")).to("cuda"))
    assert report.passed, str(report)


@gpu
def test_on_a_gpu_generate_gives_the_tokens_of_pytorch_and_the_cache_stays(tmp_path: Path) -> None:
    runner = export.load(engine("llama"), cache=tmp_path)
    ids = token_ids(2, 5)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        truth = wrapped("llama").generate(ids, max_new_tokens=12, **options)
        for _ in range(2):  # captured, then replayed
            assert torch.equal(runner.generate(ids.cuda(), max_new_tokens=12, **options).cpu(), truth)
    out = runner(ids.cuda())
    assert {layer.keys.device.type for layer in out.past_key_values.layers} == {"cuda"}
    with pytest.raises(InvalidInputError, match="batch is 5 and may be 1 to 4"):
        runner(token_ids(5, 2).cuda())
    del out, runner
    gc.collect()
    assert list(tmp_path.iterdir())  # the kernels that were compiled


@pytest.mark.gpu
@needs_tensorrt
def test_on_a_gpu_captured_steps_give_the_tokens_of_pytorch_and_overwrite_the_cache() -> None:
    runner = export.load(engine("llama", package="tensorrt", targets=()), cuda_graphs=True)
    ids = token_ids(2, 5)
    truth = wrapped("llama").generate(ids, max_new_tokens=12, do_sample=False)
    for _ in range(2):  # captured, then replayed
        assert torch.equal(runner.generate(ids.cuda(), max_new_tokens=12, do_sample=False).cpu(), truth)
    token = ids[:, :1].cuda()
    first = runner(token, past_key_values=runner(ids.cuda()).past_key_values)
    earlier = copy.copy(first.past_key_values)  # which the next run puts other layers into
    second = runner(token, past_key_values=first.past_key_values)
    assert math.isfinite(float(second.entropy.sum()))
    with pytest.raises(InvalidInputError, match="of an earlier step"):
        runner(token, past_key_values=earlier)
