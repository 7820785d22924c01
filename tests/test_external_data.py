"""`export/artifact/external_data.py`: weights are plain files beside the graph, whatever graph and manifest say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from artifacts import artifact
from families import token_ids
from onnx import TensorProto, helper

from cdsurgery import ArtifactError, export
from cdsurgery.export.artifact.manifest import describe_files

DATA = "model.onnx.data"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """An artifact in a folder of its own, beside a file that is not its business and has as many bytes."""
    folder = Path(shutil.copytree(artifact("llama"), tmp_path / "copy"))
    shutil.copy(folder / DATA, tmp_path / "outside")
    return folder


def sign(folder: Path) -> None:
    """Make the manifest list what is in the folder now, as whoever changed the graph would."""
    path = folder / "cdsurgery.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": describe_files(folder)}))


def edit(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def move_weights_to(**entries: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        external = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
        assert external
        for entry in external[-1].external_data:
            entry.value = entries.get(entry.key, entry.value)

    return change


@pytest.mark.parametrize("location", ["../outside", "{parent}/outside", "./model.onnx.data", "..", "", "a\\b"])
def test_a_location_that_is_not_a_name_beside_the_graph_is_refused(copy: Path, location: str) -> None:
    edit(copy, move_weights_to(location=location.format(parent=copy.parent)))
    sign(copy)
    with pytest.raises(ArtifactError, match=r"reads weights from .*allowed is the name of a plain file|is missing"):
        export.load(copy)


def test_a_location_inside_of_an_attribute_is_seen_too(copy: Path) -> None:
    """A constant's value may lie in a file as an initializer's may, and in a subgraph and a function as well."""

    def add_constant(model: onnx.ModelProto) -> None:
        tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="../outside")
        node = helper.make_node("Constant", [], ["unused"], value=tensor)
        branch = helper.make_graph([node], "branch", [], [])
        model.functions.append(helper.make_function("local", "F", [], [], [helper.make_node("If", [], [])], []))
        model.functions[0].node[0].attribute.append(helper.make_attribute("then_branch", branch))

    edit(copy, add_constant)
    sign(copy)
    with pytest.raises(ArtifactError, match=r"reads weights from '\.\./outside'"):
        export.load(copy)


def test_a_link_is_refused_even_if_the_manifest_does_not_list_it(copy: Path) -> None:
    edit(copy, move_weights_to(location="linked"))
    sign(copy)
    (copy / "linked").symlink_to(copy.parent / "outside")
    with pytest.raises(ArtifactError, match="reads weights from 'linked'"):
        export.load(copy)


def test_weights_that_were_cut_short_or_are_missing_are_told_apart(copy: Path) -> None:
    size = (copy / DATA).stat().st_size
    (copy / DATA).write_bytes((copy / DATA).read_bytes()[:-1])
    sign(copy)
    with pytest.raises(ArtifactError, match=f"has {size - 1} bytes and model.onnx reads {size} .* cut short"):
        export.load(copy)
    (copy / DATA).unlink()
    sign(copy)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data, in which model\.onnx keeps weights, is missing"):
        export.load(copy)


@pytest.mark.parametrize("entries", [{"offset": "-64"}, {"length": "many"}, {"offset": "\u0663"}])
def test_an_offset_or_length_that_is_no_number_of_bytes_is_refused(copy: Path, entries: dict[str, str]) -> None:
    edit(copy, move_weights_to(**entries))
    sign(copy)
    with pytest.raises(ArtifactError, match="must be a number of bytes"):
        export.load(copy)


def test_a_manifest_that_leaves_files_out_is_refused(copy: Path) -> None:
    """What it does not list, nothing was compared with."""
    path = copy / "cdsurgery.json"
    fields = json.loads(path.read_text())
    for name in ("model.onnx", "config.json"):
        files = {other: entry for other, entry in fields["files"].items() if other != name}
        path.write_text(json.dumps(fields | {"files": files}))
        with pytest.raises(ArtifactError, match=f"does not list {name}"):
            export.load(copy)


def test_an_artifact_that_was_signed_again_without_a_change_still_runs(copy: Path) -> None:
    """The checks above fail for what was changed, and not for how these tests change it."""
    edit(copy, lambda model: None)
    sign(copy)
    ids = token_ids(1, 4)
    assert torch.equal(export.load(copy)(ids).logits, export.load(artifact("llama"))(ids).logits)
