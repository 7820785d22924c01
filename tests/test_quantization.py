"""Quantised artifacts: matrices once and in few bits, one head, and the same answers as PyTorch with those weights."""

from __future__ import annotations

import copy
import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from artifacts import Client, padded, shared
from families import algorithm_1, mostly, tiny_model, token_ids

import cdsurgery
from cdsurgery import ArtifactError, InvalidInputError, export
from cdsurgery.cli.main import main
from cdsurgery.entropy import entropy
from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.parity.noise import NoiseReport

LAYERS, LOOKBACK, RELATIVE = 4, 2, 1e-5


@dataclass(frozen=True)
class Case:
    """A tiny model and how it is quantised. 72 is no multiple of a block's 32; 64, 96 and 256 are."""

    family: str
    scheme: Any
    head: bool = True
    tied: bool = True
    hidden: int = 64

    def __str__(self) -> str:
        parts = self.family, self.scheme, "head" if self.head else "kept", "tied" if self.tied else "untied"
        return "-".join([*parts, str(self.hidden)])


INT4 = Case("llama", "int4")
INT8 = Case("llama", "int8")
CASES = [
    INT4,
    INT8,
    Case("qwen3", "int4", hidden=72),
    Case("qwen3", "int4", tied=False, head=False),
]
USUAL = CASES[:2]
every_case = pytest.mark.parametrize("case", mostly(USUAL, CASES), ids=str)
every_int4 = pytest.mark.parametrize("case", mostly(USUAL, [case for case in CASES if case.scheme == "int4"]), ids=str)
every_int8 = pytest.mark.parametrize("case", [case for case in CASES if case.scheme == "int8"], ids=str)


@functools.cache
def wrapped(case: Case) -> Any:
    options = {"num_hidden_layers": LAYERS, "tie_word_embeddings": case.tied, "hidden_size": case.hidden}
    return cdsurgery.wrap(tiny_model(case.family, **options), lookback=LOOKBACK)


@functools.cache
def artifact(case: Case) -> Path:
    options: dict[str, Any] = {"quantization": case.scheme, "quantize_head": case.head}
    return shared(str(case), lambda folder: export.to_onnx(wrapped(case), folder, **options))


def graph(case: Case) -> Any:
    return onnx.load(artifact(case) / "model.onnx").graph


def head_name(case: Case) -> str:
    return "model.embed_tokens.weight" if case.tied else "lm_head.weight"


def multiplied(case: Case, name: str) -> np.ndarray:
    """The matrix `[in, out]` that ONNX Runtime multiplies with: its own kernel on the rows of the identity."""
    weights = {tensor.name: tensor for tensor in graph(case).initializer if tensor.name.startswith(name)}
    if case.scheme == "int8":
        # One product of integers with nothing to round: DequantizeLinear is its definition.
        inputs = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
        node = onnx.helper.make_node("DequantizeLinear", inputs, ["y"], axis=1)
        depth = None
    else:
        (found,) = [node for node in graph(case).node if node.op_type == "MatMulNBits" and f"{name}_Q4" in node.input]
        node = onnx.helper.make_node("MatMulNBits", ["x", *found.input[1:]], ["y"], domain="com.microsoft")
        node.attribute.extend(found.attribute)
        depth = next(attribute.i for attribute in found.attribute if attribute.name == "K")
    inputs = [] if depth is None else [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    alone = onnx.helper.make_graph([node], "alone", inputs, outputs, list(weights.values()))
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(alone, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {} if depth is None else {"x": np.eye(depth, dtype=np.float32)})[0]


@functools.cache
def twin(case: Case) -> Any:
    """A copy of the model with the weights that ONNX Runtime multiplies with."""
    model = copy.deepcopy(wrapped(case))
    parameters = dict(model.named_parameters())
    for name in quantized_names(case):
        parameters[name].data = torch.from_numpy(multiplied(case, name).T.copy())
    return model


def quantized_names(case: Case) -> list[str]:
    left = read_manifest(artifact(case)).quantization["float"]  # type: ignore[index]
    return [name for name, weight in wrapped(case).named_parameters() if weight.ndim > 1 and name not in left]


@every_case
def test_the_manifest_says_what_was_quantised_and_what_was_not(case: Case) -> None:
    made = json.loads((artifact(case) / "cdsurgery.json").read_text())["quantization"]
    kept = [] if case.tied and case.head else ["model.embed_tokens.weight"]
    kept += ["lm_head.weight"] if not case.tied and not case.head else []
    assert made == {"scheme": case.scheme, "head": case.head, "float": kept}
    assert len(quantized_names(case)) == 7 * LAYERS + case.head


@every_case
def test_every_weight_stands_in_the_file_once(case: Case) -> None:
    names = [tensor.name for tensor in graph(case).initializer]
    for name, weight in wrapped(case).named_parameters():
        ending = {"int4": "_Q4", "int8": "_quantized"}[case.scheme] if name in quantized_names(case) else ""
        assert names.count(name + ending) == 1
        assert (name in names) == (not ending), "the float original is still there"
        assert weight.numel()
    of_float = sum(weight.nbytes for name, weight in wrapped(case).named_parameters() if name in names)
    bits = {"int4": 5, "int8": 8}[case.scheme]  # 4 and a float32 for each 32; a float32 and a byte for each output
    matrices = [weight for name, weight in wrapped(case).named_parameters() if name in quantized_names(case)]
    blocks = sum(weight.shape[0] * -(-weight.shape[1] // 32) * 32 for weight in matrices) * bits // 8
    scales = sum(weight.shape[0] * 5 for weight in matrices) if case.scheme == "int8" else 0
    size = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph(case).initializer)
    assert of_float < size < of_float + blocks + scales + 2048  # constants of a graph of 4 layers


@every_case
def test_scan_output_and_embedding_read_one_head(case: Case) -> None:
    """One product has the vocabulary's width, its result is both what the scan measures and what it picks from."""
    nodes = graph(case).node
    readers = [node.op_type for node in nodes if any(name.startswith(head_name(case)) for name in node.input)]
    product = {"int4": "MatMulNBits", "int8": "MatMulInteger"}[case.scheme] if case.head else "MatMul"
    assert readers.count(product) == 1
    if case.tied:
        assert {"int4": "GatherBlockQuantized", "int8": "Gather"}[case.scheme] in readers
    width = 256  # of the vocabulary, and of nothing else
    products = [name for name in quantized_names(case) if multiplied(case, name).shape[1] == width]
    assert products == [head_name(case)] * case.head


@every_case
def test_the_graph_keeps_its_contract(case: Case) -> None:
    path = artifact(case) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    client, made = Client(artifact(case)), read_manifest(artifact(case))
    assert client.inputs == [spec.name for spec in made.signature.inputs]
    assert client.outputs == [spec.name for spec in made.signature.outputs]
    assert not {node.op_type for node in graph(case).node} & {"If", "Loop", "Scan", "SequenceMap"}
    domains = {opset.domain for opset in onnx.load(path, load_external_data=False).opset_import}
    assert domains == ({"", "com.microsoft"} if case.scheme == "int4" else {""})


@every_int4
def test_int4_equals_pytorch_with_the_same_weights_at_other_shapes(case: Case) -> None:
    runner, model = export.load(artifact(case)), twin(case)
    for seed, (batch, prompt, more) in enumerate([(1, 1, 1), (3, 7, 2), (2, 33, 5)]):
        ids = token_ids(batch, prompt + more, seed)
        mask = torch.cat([padded(batch, prompt, "left"), torch.ones(batch, more, dtype=torch.int64)], dim=1)
        first = runner(ids[:, :prompt], mask[:, :prompt])
        found = runner(ids[:, prompt:], mask, past_key_values=first.past_key_values)
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            truth = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        for rows, column in ((first, prompt - 1), (found, prompt + more - 1)):
            scale = truth.final_logits[:, column].abs().amax(-1, keepdim=True)
            nats = (rows.entropy[:, 0] - truth.entropy[:, column]).abs()
            assert (nats / scale).max() < RELATIVE
            assert ((rows.final_logits[:, 0] - truth.final_logits[:, column]) / scale).abs().max() < RELATIVE
            assert (truth.entropy[:, column].diff(dim=-1).abs() > 2 * nats.amax(-1, keepdim=True)).all()
            assert torch.equal(rows.selected_layer[:, 0], truth.selected_layer[:, column])


@every_case
def test_rounding_changed_the_weights_and_little_of_each(case: Case) -> None:
    """Within one step: an eighth of the largest in int4, a 255th of the range in int8."""
    parameters = dict(wrapped(case).named_parameters())
    for name in quantized_names(case):
        own, found = parameters[name], dict(twin(case).named_parameters())[name]
        step = own.abs().max() / 8 if case.scheme == "int4" else (own.max() - own.min()) / 255
        assert 0 < (own - found).abs().max() <= step


@every_case
def test_it_generates_greedily_as_pytorch_does(case: Case) -> None:
    """int4: the same text as PyTorch with the same weights. int8: the same beginning, if noise allows no more."""
    ids, options = token_ids(1, 6, seed=3), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = export.load(artifact(case)).generate(ids, **options)[0, 6:]
    truth = twin(case).generate(ids, **options)[0, 6:]
    assert len(found) == len(truth)
    if case.scheme == "int4":
        assert torch.equal(found, truth)
    else:
        assert found[0] == truth[0]


@every_case
def test_the_selection_follows_exactly_from_the_entropies_the_graph_returns(case: Case) -> None:
    found = Client(artifact(case))(token_ids(16, 9), torch.ones(16, 9, dtype=torch.int64))
    depth = np.array([[algorithm_1(row) for row in rows] for rows in found["entropy"].tolist()])
    assert np.array_equal(found["selected_layer"], LAYERS - depth)
    assert 0 < (depth > 0).mean() < 1
    chosen = np.take_along_axis(found["entropy"], depth[..., None], -1)[..., 0]
    spoken = entropy(torch.from_numpy(found["logits"])).numpy()
    assert np.allclose(chosen, spoken, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [INT4, INT8], ids=str)
def test_verify_gives_the_model_its_own_weights_back(case: Case) -> None:
    model = copy.deepcopy(wrapped(case))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert export.verify(artifact(case), model).passed
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_verify_of_int4_sees_what_a_float_weight_is_off_by_one_in_ten_thousand() -> None:
    other = copy.deepcopy(wrapped(INT4))
    other.model.norm.weight.data.mul_(1.0001)
    assert not export.verify(artifact(INT4), other).passed


@pytest.mark.parametrize("case", [INT4, INT8], ids=str)
def test_verify_refuses_weights_that_are_no_rounding_of_the_models(case: Case) -> None:
    other = copy.deepcopy(wrapped(case))
    projection = other.model.layers[1].self_attn.q_proj.weight
    projection.data = projection.data.T.contiguous().roll(1)
    before = other.lm_head.weight.clone()
    with pytest.raises(ArtifactError, match=r"q_proj\.weight' is no quantised form of the model's"):
        export.verify(artifact(case), other)
    assert torch.equal(other.lm_head.weight, before)


def test_verify_of_int8_states_the_noise_and_fails_on_what_is_not_noise() -> None:
    report = export.verify(artifact(INT8), wrapped(INT8))
    assert isinstance(report, NoiseReport)
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields["passed"]
    assert 0.001 < fields["noise"] < 0.2
    assert 0 < fields["relative"] < fields["relative_max"]
    assert 0 < fields["divergence"] < fields["divergence_max"]
    assert fields["rows"] * 0.7 < fields["equal"] <= fields["rows"]
    for part in ("by rounding in PyTorch", "mean", "max nats", "rows equal", "greedy tokens", "passed"):
        assert part in str(report)
    other = copy.deepcopy(wrapped(INT8))
    other.model.layers[2].post_attention_layernorm.weight.data.mul_(1.5)
    assert not export.verify(artifact(INT8), other).passed


def test_a_noise_report_holds_what_does_not_hang_on_noise() -> None:
    """Rows whose layer, or whose entropies, are not those of the logits that came with them."""
    logits = torch.tensor([[3.0, 1.0, 0.0]])
    h = entropy(logits)
    for layer, seen, passes in ((4, [h, h + 1], True), (3, [h, h + 1], False), (4, [h + 1e-3, h + 1], False)):
        report = NoiseReport(4, 0.05, entropy)
        rows = [logits, logits, torch.tensor([layer]), torch.stack(seen, dim=-1)]
        report.add_rows(rows, [logits + 0.01 * torch.randn(1, 3), logits, torch.tensor([4]), rows[3]])
        assert report.passed is passes
    assert not NoiseReport(4, 0.05, entropy).passed


@pytest.mark.thorough
def test_float16_is_quantised_to_int4_and_verified(tmp_path: Path) -> None:
    model = cdsurgery.wrap(tiny_model("llama", torch.float16, num_hidden_layers=2), lookback=1)
    folder = export.to_onnx(model, tmp_path / "half", quantization="int4")
    scales = [t for t in onnx.load(folder / "model.onnx").graph.initializer if t.name.endswith("_scales")]
    assert {tensor.data_type for tensor in scales} == {onnx.TensorProto.FLOAT16}
    assert read_manifest(folder).parity["passed"]


def test_what_cannot_be_quantised_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'int4', 'int8' or None"):
        export.to_onnx(wrapped(INT4), tmp_path / "a", quantization="fp8")  # type: ignore[arg-type]
    half = cdsurgery.wrap(tiny_model("llama", torch.float16), lookback=1)
    with pytest.raises(InvalidInputError, match=r"torch\.float16; ONNX Runtime rounds activations"):
        export.to_onnx(half, tmp_path / "a", quantization="int8")
    with pytest.raises(InvalidInputError, match=r"nothing is quantised\. Leave quantize_head out"):
        export.to_onnx(half, tmp_path / "a", quantize_head=False)
    assert not list(tmp_path.iterdir())
    assert main(["export", "onnx", "nowhere", str(tmp_path / "a"), "--keep-head"]) == 2


@pytest.mark.thorough
def test_experts_stay_float_and_the_manifest_says_so(tmp_path: Path) -> None:
    """A graph picks their rows by token before it multiplies: that is no product with a constant matrix."""
    model = cdsurgery.wrap(tiny_model("qwen3_moe", num_hidden_layers=2), lookback=1)
    made = read_manifest(export.to_onnx(model, tmp_path / "experts", quantization="int4"))
    assert made.quantization is not None
    assert made.parity is not None
    assert made.parity["passed"]
    left = [name for name in made.quantization["float"] if "layers" in name]
    assert left == [f"model.layers.{n}.mlp.experts.{part}" for n in (0, 1) for part in ("gate_up_proj", "down_proj")]


def test_logging_is_as_it_was() -> None:
    """ONNX Runtime's quantisers call logging.basicConfig; a library of ours must not."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    artifact(INT4), artifact(INT8)
    assert (root.handlers, root.level) == (handlers, level)


@pytest.mark.thorough
def test_the_command_line_quantises(folder: Path, tmp_path: Path) -> None:
    arguments = ["export", "onnx", str(folder), str(tmp_path / "out"), "--quantize", "int4", "--keep-head"]
    assert main([*arguments, "--lookback", "1"]) == 0
    made = read_manifest(tmp_path / "out").quantization
    assert made is not None
    assert (made["scheme"], made["head"]) == ("int4", False)
