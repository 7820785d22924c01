"""An artifact's folder: whole or absent, described by its manifest, refused when it is not what it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from artifacts import LOOKBACK, Client, artifact, wrapped
from families import tiny_model, token_ids
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import cdsurgery
from benchmarks import machine
from cdsurgery import ArtifactError, InvalidInputError, UnsupportedModelError, export
from cdsurgery.export import onnx as onnx_module
from cdsurgery.export.artifact import manifest as manifest_module
from cdsurgery.export.artifact.clients import write_client_files
from cdsurgery.export.artifact.manifest import check_files, describe_files, read_manifest


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact("llama"), tmp_path / "copy"))


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "cdsurgery.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_manifest_describes_the_artifact() -> None:
    fields = json.loads((artifact("llama") / "cdsurgery.json").read_text())
    assert fields["schema_version"] == 2
    assert (fields["model_type"], fields["layers"], fields["dtype"]) == ("llama", 4, "float32")
    options = {"lookback": LOOKBACK, "probability": 1.0, "seed": None, "measure": "entropy", "scan": "full"}
    assert fields["confident"] == options
    assert fields["options"] == {"positions": "last", "target": "portable", "upcast": False, "scan": "static"}
    assert fields["versions"]["torch"] == version("torch")  # torch.__version__ may name a build too
    assert fields["parity"]["passed"]
    assert fields["parity"]["rows"] > 100
    on_disk = {path.name for path in artifact("llama").iterdir()} - {"cdsurgery.json"}
    assert set(fields["files"]) == on_disk
    assert {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json"} <= on_disk
    client = Client(artifact("llama"))
    assert [spec["name"] for spec in fields["signature"]["inputs"]] == client.inputs
    assert [spec["name"] for spec in fields["signature"]["outputs"]] == client.outputs


def test_a_moved_folder_runs_and_gives_the_same(copy: Path, tmp_path: Path) -> None:
    moved = copy.rename(tmp_path / "elsewhere")
    ids = token_ids(1, 5)
    assert torch.equal(export.load(moved)(ids).logits, export.load(artifact("llama"))(ids).logits)


def test_tokenizer_files_name_a_class_that_transformers_4_knows(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    signature = read_manifest(artifact("llama")).signature
    write_client_files(tmp_path, wrapped("llama"), signature, tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_all_chat_templates_of_a_tokenizer_are_described_and_read_again(tmp_path: Path) -> None:
    """transformers writes one into the folder, and the others into a folder of it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    made = read_manifest(artifact("llama"))
    write_client_files(tmp_path, wrapped("llama"), made.signature, tokenizer)
    files = describe_files(tmp_path)
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} < files.keys()
    check_files(tmp_path, replace(made, files=files), needed=())
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ fools }}")
    with pytest.raises(ArtifactError, match=r"tool_use\.jinja was changed"):
        check_files(tmp_path, replace(made, files=files), needed=())


def test_onnxruntime_under_another_name_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu brings the module onnxruntime, and no distribution of that name."""

    def installed(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return version(name)

    for module in (manifest_module, machine):
        monkeypatch.setattr(module, "version", installed)
    assert manifest_module.maker_versions()["onnxruntime"] == onnxruntime.__version__
    assert machine.description(machine.Limits(1.0, 1.0), "float32")["onnxruntime"] == onnxruntime.__version__


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        export.to_onnx(wrapped("llama"), tmp_path / "old")
    with pytest.raises(ArtifactError, match="does not exist"):
        export.to_onnx(wrapped("llama"), tmp_path / "no" / "such" / "parent")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "mine"


def test_a_graph_that_disagrees_with_the_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter is made to write a graph in which one weight is another."""
    model = wrapped("mistral")
    norm = model.get_submodule("model.norm")
    name = onnx_module._name

    def spoil(graph: Any, signature: Any) -> None:
        name(graph, signature)
        for initializer in graph.graph.initializers.values():
            if initializer.const_value.shape == [64] and np.array_equal(
                initializer.const_value.numpy(), norm.weight.detach().numpy()
            ):
                initializer.const_value = onnx_module.onnx_ir.tensor(initializer.const_value.numpy() * 1.001)

    monkeypatch.setattr(onnx_module, "_name", spoil)
    with pytest.raises(ArtifactError, match="does not agree"):
        export.to_onnx(model, tmp_path / "spoiled")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is not wrapped"):
        export.to_onnx(tiny_model("llama"), tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="'last', 'all', 'score'"):
        export.to_onnx(wrapped("llama"), tmp_path / "a", positions="first")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="probability=0"):
        export.to_onnx(cdsurgery.wrap(tiny_model("llama"), probability=0), tmp_path / "a")
    with pytest.raises(
        UnsupportedModelError,
        match=r"bfloat16, for which ONNX Runtime has no kernels on the CPU.*upcast=True.*parity=False",
    ):
        export.to_onnx(cdsurgery.wrap(tiny_model("llama", torch.bfloat16)), tmp_path / "a")
    with pytest.raises(UnsupportedModelError, match="target='cuda' has operators that only the CUDA provider has"):
        export.to_onnx(wrapped("llama"), tmp_path / "a", target="cuda")
    with pytest.raises(InvalidInputError, match=r"upcast was asked for, but the model is in torch\.float32"):
        export.to_onnx(wrapped("llama"), tmp_path / "a", upcast=True)
    with pytest.raises(InvalidInputError, match=r"tokenizer is 'examples/tiny_lm'; it must be a loaded one"):
        export.to_onnx(wrapped("llama"), tmp_path / "a", tokenizer="examples/tiny_lm")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_one_changed_byte_of_a_weight_is_noticed(copy: Path) -> None:
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data was changed"):
        export.load(copy)


def test_a_truncated_a_missing_and_a_linked_file_are_refused(copy: Path, tmp_path: Path) -> None:
    data = copy / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:1000])
    with pytest.raises(ArtifactError, match="its size is 1000 bytes"):
        export.load(copy)
    data.unlink()
    with pytest.raises(ArtifactError, match="missing or not a plain file"):
        export.load(copy)
    (tmp_path / "outside").write_bytes(whole)
    data.symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="missing or not a plain file"):
        export.load(copy)


@pytest.mark.parametrize(
    "path",
    ["../outside/secret", "{outside}/secret", "model.onnx/../../outside/secret", "in/secret"],
)
def test_a_manifest_that_points_out_of_the_folder_is_refused(path: str, copy: Path) -> None:
    outside = copy.parent / "outside"
    outside.mkdir()
    save_file({"x": torch.zeros(1)}, outside / "secret")
    (copy / "in").symlink_to(outside)
    described = describe_files(outside)["secret"]  # its hash is right: the path alone is what is wrong
    files = json.loads((copy / "cdsurgery.json").read_text())["files"]
    edit_manifest(copy, files=files | {path.format(outside=outside): described})
    with pytest.raises(ArtifactError, match="not a plain file of the artifact"):
        export.load(copy)


def test_an_artifact_may_be_reached_by_a_link(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    assert export.load(tmp_path / "link").manifest.layers == 4


def test_a_newer_schema_a_broken_and_a_missing_manifest_are_refused(copy: Path, tmp_path: Path) -> None:
    edit_manifest(copy, schema_version=3)
    with pytest.raises(ArtifactError, match="schema version 3; this cdsurgery reads version 2"):
        export.load(copy)
    for broken in ("{", "[]", '{"schema_version": 2}', '{"schema_version": 2, "signature": {}}'):
        (copy / "cdsurgery.json").write_text(broken)
        with pytest.raises(ArtifactError, match="is not a manifest"):
            export.load(copy)
    with pytest.raises(ArtifactError, match="is not an artifact"):
        export.load(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("dtype",), "float99", "is not a manifest .*its dtype is 'float99'"),
        (("not_for",), ["genai"], "is not a manifest .*its not_for is \\['genai'\\]"),
        (("files", "config.json"), {"size": 1}, "is not a manifest .*sha256"),
        (("files", "config.json", "size"), "1", "is not a manifest .*of the file config.json it says"),
        (("signature", "inputs", 0, "dtype"), None, "is not a manifest .*is no input or output"),
        (("signature", "inputs", 0, "axes", 0), "rows", "is not a manifest .*is no input or output"),
        (("signature", "inputs", 1, "name"), "mask", "is not a manifest .*its signature has no attention_mask"),
        (("signature", "outputs", 0, "name"), "scores", r"model.onnx returns logits.* its manifest says scores"),
        (
            ("signature", "inputs", 3, "name"),
            "past.0",
            r"model.onnx takes .*past_key_values.0.key.* and its manifest says",
        ),
        (("signature", "outputs", 0, "dtype"), "float16", r"returns logits as tensor\(float\) .* says float16"),
        (("signature", "outputs", 3, "axes", 2), 99, r"returns entropy as .* says float32, \['batch', 1, 99\]"),
        (("signature", "outputs", 3, "axes"), ["batch"], r"returns entropy as .* says float32, \['batch'\]"),
    ],
    ids=str,
)
def test_a_manifest_that_is_damaged_or_of_another_graph_is_refused(
    place: tuple[Any, ...], value: Any, message: str, copy: Path
) -> None:
    manifest = json.loads((copy / "cdsurgery.json").read_text())
    entry = manifest
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    (copy / "cdsurgery.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        export.load(copy)


def test_a_file_is_refused_where_an_artifact_is_wanted() -> None:
    graph = artifact("llama") / "model.onnx"
    for use in (export.load, lambda path: export.to_triton(path, "repository", name="a")):
        with pytest.raises(InvalidInputError, match=r"model\.onnx is a file; give the folder of an artifact"):
            use(graph)
