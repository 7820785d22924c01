"""What `to_triton` refuses, with which words, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from artifacts import contents
from served import SIGNATURE

from cdsurgery import export
from cdsurgery.errors import ArtifactError, InvalidInputError, UnsupportedModelError
from cdsurgery.export.tensorrt.manifest import EngineManifest


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "", ".hidden", "a..b", "/abs", "x" * 200, "a\n", "é"])
def test_names_that_are_like_paths_are_refused(servable: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="model name"):
        export.to_triton(servable, tmp_path / "repository", name=name)
    assert not list(tmp_path.iterdir())


def test_what_somebody_else_wrote_is_not_replaced(servable: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "repository" / "tiny"
    (theirs / "1").mkdir(parents=True)
    (theirs / "config.pbtxt").write_text('name: "tiny"')
    with pytest.raises(ArtifactError, match="something else wrote"):
        export.to_triton(servable, tmp_path / "repository", name="tiny")
    assert contents(tmp_path / "repository") == {"tiny/config.pbtxt": b'name: "tiny"'}


def test_a_place_that_cannot_be_written_is_an_error_that_leaves_nothing(
    servable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is not a folder"):
        export.to_triton(servable, tmp_path / "file", name="tiny")
    with pytest.raises(ArtifactError, match=r"in which repository was to be made, does not exist"):
        export.to_triton(servable, tmp_path / "missing" / "repository", name="tiny")
    export.to_triton(servable, tmp_path / "repository", name="tiny")
    before = contents(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ArtifactError, match=r"nothing of it was kept: .*No space left on device.* bytes are free in"):
        export.to_triton(servable, tmp_path / "repository", name="tiny", options=export.ServingOptions(slots=3))
    assert contents(tmp_path) == before


def test_artifacts_that_cannot_serve_text_are_refused_with_the_reason(servable: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    mute = tmp_path / "mute"
    shutil.copytree(servable, mute)
    manifest = json.loads((mute / "cdsurgery.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (mute / "cdsurgery.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        export.to_triton(mute, repository, name="a")
    manifest = json.loads((servable / "cdsurgery.json").read_text())
    manifest["signature"]["outputs"][0]["name"] = "scores"
    (mute / "cdsurgery.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="names no output logits"):
        export.to_triton(mute, repository, name="a")
    manifest["options"]["positions"] = "score"
    for spec, name in zip(manifest["signature"]["outputs"], ("logprobs", "final_logprobs"), strict=False):
        spec["name"] = name
    (mute / "cdsurgery.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsupportedModelError, match="returns no logits"):
        export.to_triton(mute, repository, name="a")
    manifest = json.loads((servable / "cdsurgery.json").read_text()) | {"group_query_attention": True}
    (mute / "cdsurgery.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsupportedModelError, match=r"slots is 32; use slots=1, or export the model with to_onnx"):
        export.to_triton(mute, repository, name="a")
    broken = tmp_path / "broken"
    shutil.copytree(servable, broken)
    (broken / "model.onnx.data").write_bytes(b"cut short")
    with pytest.raises(ArtifactError, match="was changed after"):
        export.to_triton(broken, repository, name="a")
    manifest["files"]["model.engine"] = {"sha256": "0" * 64, "size": 1}
    (mute / "cdsurgery.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidInputError, match=r"is a TensorRT engine\. Give the ONNX artifact"):
        export.to_triton(mute, repository, name="a")
    assert not repository.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": 0}, "slots is 0; it must be a whole number of at least 1"),
        ({"chunk": True}, "chunk is True"),
        ({"kind": "tpu"}, "kind is 'tpu'; it must be one of 'cpu', 'gpu'"),
        ({"gpus": (0,)}, "Ask for kind='gpu'"),
        ({"bls": True}, "say for which backend"),
        ({"step": "tensorrt"}, "kind is 'cpu'. It runs on a GPU: kind='gpu'"),
        ({"providers": "cuda"}, "providers is 'cuda'; it must be one of None, 'tensorrt'"),
        ({"providers": "tensorrt"}, "needs kind='gpu' and no bls"),
        ({"providers": "tensorrt", "kind": "gpu", "step": "onnxruntime", "bls": True}, "needs kind='gpu' and no bls"),
        ({"cache": "/var/cache"}, "it is for providers='tensorrt'"),
        ({"providers": "tensorrt", "kind": "gpu", "cache": "cache"}, "must be an absolute path"),
        ({"queue_timeout_seconds": 0}, "must be a number of seconds above 0"),
        ({"request_timeout_seconds": "60"}, "is '60'; it must be a number of seconds above 0"),
        ({"kind": "gpu", "gpus": 0}, "gpus is 0; it must be a tuple"),
        ({"rate_limit": {"memory": 0}}, "whole number of at least 1"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        export.ServingOptions(**fields)


def test_a_context_beyond_the_models_and_a_plan_without_its_backend_are_refused(servable: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="the model has 128 positions"):
        export.to_triton(servable, tmp_path / "r", name="a", options=export.ServingOptions(context=129))
    with pytest.raises(InvalidInputError, match="belong together"):
        export.to_triton(servable, tmp_path / "r", name="a", engine=servable / "model.onnx")


def test_a_plan_is_one_of_tensorrt_and_of_this_graph(servable: Path, tmp_path: Path) -> None:
    files = json.loads((servable / "cdsurgery.json").read_text())["files"]
    engine, repository = tmp_path / "engine", tmp_path / "repository"
    engine.mkdir()
    (engine / "model.engine").write_bytes(b"plan")
    made = EngineManifest(
        schema_version=1,
        package="tensorrt",
        version="10.13.0.35",
        gpu=None,
        targets=(),
        portable=False,
        flags=(),
        profiles=(),
        signature=SIGNATURE,
        onnx={name: file["sha256"] for name, file in files.items() if name.startswith("model.onnx")},
        build_seconds=1.0,
        peak_memory_bytes=None,
        engine={},
    )

    def write() -> None:
        options = export.ServingOptions(kind="gpu", step="tensorrt")
        export.to_triton(servable, repository, name="a", options=options, engine=engine / "model.engine")

    for changes, message in (
        ({"package": "tensorrt_rtx"}, "built by tensorrt_rtx, whose engines Triton does not load"),
        ({"onnx": made.onnx | {"model.onnx.data": "0" * 64}}, "built of another graph than this artifact's"),
    ):
        replace(made, **changes).write(engine)
        with pytest.raises(InvalidInputError, match=message):
            write()
    assert not repository.exists()
    made.write(engine)
    write()
    assert (repository / "a_step" / "1" / "model.plan").read_bytes() == b"plan"
