"""A graph that cannot be grafted or proven is refused with what was found, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import exit_code
from grafts import copied, grafted, refused
from onnx import TensorProto, helper

from cdsurgery import ArtifactError, InvalidInputError, UnsupportedModelError
from cdsurgery.export.graft import decoder, rowwise
from cdsurgery.export.graft.tail import Tail

FINAL_NORM = "/model/norm/Mul_1_output_0"
FINAL_STATE = "/model/layers.3/Add_1_output_0"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return copied("optimum-llama", tmp_path / "theirs")


def edit(path: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return path


def insert_before_head(operator: str, *more: str, **attributes: Any) -> Callable[[Any], None]:
    """An operator between the final norm and the unembedding."""

    def change(graph: Any) -> None:
        (head,) = [node for node in graph.node if "logits" in node.output]
        head.input[0] = "inserted"
        node = helper.make_node(operator, [FINAL_NORM, *more], ["inserted"], name="stranger", **attributes)
        graph.node.insert(list(graph.node).index(head), node)

    return change


def no_logits(graph: Any) -> None:
    (logits,) = [value for value in graph.output if value.name == "logits"]
    graph.output.remove(logits)


def without_mask(graph: Any) -> None:
    (mask,) = [value for value in graph.input if value.name == "attention_mask"]
    mask.name = "mask"
    for node in graph.node:
        node.input[:] = ["mask" if name == "attention_mask" else name for name in node.input]


def one_cache_output_less(graph: Any) -> None:
    del graph.output[-1]


def a_cache_by_other_names(graph: Any) -> None:
    (past,) = [value for value in graph.input if value.name == "past_key_values.0.key"]
    past.name = "past_key_0"
    for node in graph.node:
        node.input[:] = [past.name if name == "past_key_values.0.key" else name for name in node.input]


def a_cache_in_8_bits(graph: Any) -> None:
    (past,) = [value for value in graph.input if value.name == "past_key_values.0.key"]
    past.type.tensor_type.elem_type = TensorProto.INT8


def weights_from_tokens(graph: Any) -> None:
    """A head whose weights depend on the input: what it multiplies with is no constant."""
    (head,) = [node for node in graph.node if "logits" in node.output]
    index = list(graph.node).index(head)
    graph.node.insert(index, helper.make_node("Mul", [head.input[1], "one"], ["moving"]))
    graph.node.insert(index, helper.make_node("ReduceMax", ["ids"], ["one"], keepdims=0))
    graph.node.insert(index, helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT))
    head.input[1] = "moving"


def factor_before_the_norm(graph: Any) -> None:
    """A factor that may be the last layer's or the tail's: no other layer has one."""
    index = next(i for i, node in enumerate(graph.node) if FINAL_STATE in node.input)
    graph.initializer.append(helper.make_tensor("factor", TensorProto.FLOAT, (), [0.5]))
    graph.node[index].input[0] = "scaled"
    graph.node.insert(index, helper.make_node("Mul", [FINAL_STATE, "factor"], ["scaled"]))


def without_final_norm(graph: Any) -> None:
    (head,) = [node for node in graph.node if "logits" in node.output]
    head.input[0] = FINAL_STATE


def cut_vocabulary(graph: Any) -> None:
    """Logits of the first 90 tokens, as of a vocabulary that was padded."""
    (head,) = [node for node in graph.node if "logits" in node.output]
    head.output[0] = "wide"
    for name, value in (("begin", 0), ("end", 90), ("axis", -1)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    graph.node.append(helper.make_node("Slice", ["wide", "begin", "end", "axis"], ["logits"], name="cut"))
    (logits,) = [value for value in graph.output if value.name == "logits"]
    logits.type.tensor_type.shape.dim[-1].dim_value = 90


STRANGERS = {
    "a cut vocabulary": (cut_vocabulary, r"Slice \('cut'\), and it cuts the last axis"),
    "no logits": (no_logits, "no output named 'logits'.*present.0.key"),
    "no mask": (without_mask, "no input named 'attention_mask'.*input_ids, mask"),
    "a cache that does not close": (one_cache_output_less, "one numbered output for each input"),
    "a cache by other names": (a_cache_by_other_names, r"whose name ends in a layer's number and key or value"),
    "a cache in 8 bits": (a_cache_in_8_bits, r"past_key_values\.0\.key.* is of type INT8; an artifact can be float32"),
    "softmax": (
        insert_before_head("Softmax", axis=1),
        r"Softmax \('stranger'\), and it is not known to treat every row",
    ),
    "a sum over rows": (insert_before_head("CumSum", "axis"), "CumSum.*is not known to treat every row"),
    "a norm over rows": (
        insert_before_head("LayerNormalization", "model.norm.weight", axis=1),
        "does not norm over the axis -1",
    ),
    "tokens in the tail": (
        insert_before_head("Add", "position_ids"),
        "depend on the input 'position_ids' beside the residual stream",
    ),
    "moving weights": (weights_from_tokens, "its weights are not constant"),
    "an ambiguous factor": (factor_before_the_norm, "goes through 1 factors after its sum .* through 0"),
    "no final norm": (without_final_norm, "no final norm|not known to treat every row"),
}


@pytest.mark.parametrize(("change", "message"), STRANGERS.values(), ids=STRANGERS.keys())
def test_a_graph_that_cannot_be_followed_is_refused(theirs: Path, change: Callable[[Any], None], message: str) -> None:
    refused(edit(theirs, change), UnsupportedModelError, message)


def test_activations_quantised_by_the_range_of_all_rows_are_refused(theirs: Path) -> None:
    """Dynamic int8: a candidate's logits would depend on which others stand beside it."""

    def change(graph: Any) -> None:
        (head,) = [node for node in graph.node if "logits" in node.output]
        head.op_type = "MatMulInteger"
        head.input[:] = ["q", head.input[1], "q_zero"]
        node = helper.make_node("DynamicQuantizeLinear", [FINAL_NORM], ["q", "q_scale", "q_zero"], name="quantize")
        graph.node.insert(list(graph.node).index(head), node)

    refused(edit(theirs, change), UnsupportedModelError, "MatMulInteger.*not known to treat every row for itself")


def test_a_grafted_file_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(grafted("optimum-llama"), tmp_path / "theirs")
    refused(Path(folder) / "model.onnx", UnsupportedModelError, "selects layers already")


def test_a_graph_that_does_not_run_is_refused(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut along an axis that the graph does not show is found when the copies of the tail run."""
    monkeypatch.setattr(rowwise, "_wrong_move", lambda *_: None)
    config = json.loads((theirs.parent / "config.json").read_text())
    (theirs.parent / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    refused(edit(theirs, cut_vocabulary), UnsupportedModelError, "could not run a graph of the proof, on 1 rows of 1")


def test_a_path_that_is_no_model_is_refused(theirs: Path) -> None:
    refused(theirs.parent / "none.onnx", InvalidInputError, "There is no file")
    refused(theirs.parent, InvalidInputError, r"is a folder; give the ONNX file in it \(model.onnx\)")
    theirs.write_bytes(theirs.read_bytes()[:5000])
    refused(theirs, InvalidInputError, "cannot be read as an ONNX model")


def test_an_old_opset_is_refused_with_the_way_out(theirs: Path) -> None:
    model = onnx.load(theirs)
    model.opset_import[0].version = 14
    onnx.save(model, theirs)
    refused(theirs, UnsupportedModelError, r"opset 14; the head needs opset 18 .*convert_version\(model, 18\)")


def test_options_out_of_range_are_refused(theirs: Path) -> None:
    refused(theirs, InvalidInputError, r"Use an integer in \[1, 3\]", lookback=4)
    refused(theirs, InvalidInputError, "lookback is 0", lookback=0)
    refused(theirs, InvalidInputError, "probability is 0", probability=0)
    refused(theirs, InvalidInputError, "'last' or 'all'", positions="first")


def test_an_existing_folder_is_refused_and_left_alone(theirs: Path) -> None:
    (theirs.parent.parent / "artifact").mkdir()
    refused(theirs, ArtifactError, "exists already")


def test_a_copy_of_the_tail_that_differs_is_not_kept(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The surgeon is made to leave out the weight of the copied norm: the candidates alone would show it, and do."""
    copy_before = Tail.copy_before

    def slip(self: Tail, place: Any, rows: Any, flow: Any, prefix: str, *, summed: bool) -> Any:
        nodes = tuple(node for node in self.nodes if not (summed and node.outputs[0].name == FINAL_NORM))
        logits = copy_before(Tail(nodes, self.entries, self.logits), place, rows, flow, prefix, summed=summed)
        if summed:
            logits.producer().replace_input_with(0, place.graph.node(f"{prefix}/model/norm/Cast_1").outputs[0])
        return logits

    monkeypatch.setattr(Tail, "copy_before", slip)
    refused(theirs, UnsupportedModelError, "with layers left out", lookback=2)


def test_final_logits_that_are_not_the_files_own_are_not_kept(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the grafted file is the next float."""
    operate = decoder.ForeignDecoder.operate_

    def spoil(self: Any, *arguments: Any) -> None:
        operate(self, *arguments)
        weight = self.model.graph.initializers["model.norm.weight"]
        array = weight.const_value.numpy().copy()
        array[0] = np.nextafter(array[0], np.float32(9))
        weight.const_value = decoder.onnx_ir.tensor(array, name=weight.name)

    monkeypatch.setattr(decoder.ForeignDecoder, "operate_", spoil)
    refused(theirs, UnsupportedModelError, "not the file's own logits, bit for bit", positions="all")


def test_the_command_grafts_and_says_what_was_proven(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "artifact")
    assert exit_code(["export", "graft", str(theirs), place, "--lookback", "0.5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["layers"], document["lookback"], document["positions"]) == (4, 2, "last")
    assert document["proof"]["passed"]
    assert document["files"]["model.onnx"] == (tmp_path / "artifact" / "model.onnx").stat().st_size
    assert exit_code(["export", "graft", str(theirs), place]) == 2
    assert exit_code(["export", "graft", str(tmp_path / "none.onnx"), str(tmp_path / "other")]) == 2
    assert "There is no file" in capsys.readouterr().err
