"""Quantised artifacts: matrices once and in few bits, one head, and the same answers as PyTorch with those weights."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from artifacts import Client, padded
from families import algorithm_1, mostly, tiny_model, token_ids
from onnx_ir.tape import Tape
from quantized import (
    CASES,
    INT4,
    INT8,
    LAYERS,
    USUAL,
    Case,
    artifact,
    graph,
    head_name,
    multiplied,
    quantized_names,
    twin,
    wrapped,
)

import cdsurgery
from cdsurgery import ArtifactError, InvalidInputError, export
from cdsurgery.cli.main import main
from cdsurgery.entropy import entropy
from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.graph.precision import narrow_weights_
from cdsurgery.export.graph.quantization import quantize
from cdsurgery.export.parity import dequantization

RELATIVE = 1e-5

every_case = pytest.mark.parametrize("case", mostly(USUAL, CASES), ids=str)
every_int4 = pytest.mark.parametrize("case", mostly(USUAL, [case for case in CASES if case.scheme == "int4"]), ids=str)
every_int8 = pytest.mark.parametrize("case", [case for case in CASES if case.scheme == "int8"], ids=str)


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


@pytest.mark.thorough
def test_bfloat16_that_is_upcast_is_quantised_and_verified(tmp_path: Path) -> None:
    """Scales are an eighth of a weight, which bfloat16 holds exactly; here a matrix has 1024 of them and more."""
    model = cdsurgery.wrap(
        tiny_model("llama", torch.bfloat16, num_hidden_layers=2, hidden_size=128, intermediate_size=512), lookback=1
    )
    folder = export.to_onnx(model, tmp_path / "upcast", quantization="int4", upcast=True)
    assert read_manifest(folder).parity["passed"]


def two_products(matrix: np.ndarray | None = None) -> onnx_ir.Model:
    """x `[B, S, 128]` times the matrices a and b `[128, out]`, summed."""
    if matrix is None:
        matrix = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)).bfloat16().float().numpy()
    tensors = [onnx_ir.tensor(matrix, name=name) for name in "ab"]
    x = onnx_ir.val("x", tensors[0].dtype, ["batch", "sequence", 128])
    weights = [onnx_ir.val(of.name, of.dtype, of.shape, const_value=of) for of in tensors]
    tape = Tape()
    y = tape.op("Add", [tape.op("MatMul", [x, weight]) for weight in weights])
    graph = onnx_ir.Graph([x], [y], nodes=tape.nodes, initializers=weights, opset_imports={"": 20})
    return onnx_ir.Model(graph, ir_version=10)


def test_scales_of_quantised_matrices_are_not_narrowed(tmp_path: Path) -> None:
    model = two_products()
    quantize(model, "int4", {"a"}, tmp_path)
    narrow_weights_(model, torch.bfloat16, {"a", "b"})
    weights, kinds = model.graph.initializers, onnx_ir.DataType
    assert {name: value.dtype for name, value in weights.items()} == {
        "a_Q4": kinds.UINT8,
        "a_scales": kinds.FLOAT,
        "b": kinds.BFLOAT16,
    }
    assert weights["a_scales"].const_value.size == 512 * 128 // 32  # enough of them to be worth narrowing


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_matrices_are_written_in_the_given_folder_only(
    scheme: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's folder for temporary files is often memory, and smaller than an unembedding."""
    full = str(tmp_path / "full")
    monkeypatch.setattr("tempfile.tempdir", full)
    quantize(two_products(), scheme, {"a"}, tmp_path)
    assert not list(tmp_path.iterdir())
    assert tempfile.tempdir == full


@pytest.mark.parametrize("size", [5e-7, 2e-8, 1.0])
def test_blocks_too_small_for_a_scale_in_float16_are_roundings_all_the_same(size: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 128, generator=generator) * size).half()
    model = two_products(weight.T.numpy())
    quantize(model, "int4", {"a"}, tmp_path)
    packed, scales = (model.graph.initializers[f"a_{part}"].const_value.numpy() for part in ("Q4", "scales"))
    assert scales.dtype == np.float16
    found = dequantization._int4(packed, scales, 128)
    assert (found.values - weight.float().numpy()).any()
    assert dequantization._fitted("a", found, weight).shape == weight.shape
    other = weight + 2 * weight.abs().max() + 1e-6
    with pytest.raises(ArtifactError, match="no quantised form"):
        dequantization._fitted("a", found, other)


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
