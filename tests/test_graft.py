"""Grafted graphs: the final logits bit for bit the file's own, the candidates those of PyTorch, the weights once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import algorithm_1
from grafts import LOOKBACK, MODELS, OWN, TWINS, Client, foreign, grafted, ones, present, tokens, trace_head, wrapped
from onnx import TensorProto, helper

from cdsurgery import export
from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.graft import decoder

LAYERS = 4
# (batch, prompt, continuation); several rows continue by one token, as GroupQueryAttention knows no other way.
SHAPES = [(1, 1, 1), (1, 9, 1), (2, 3, 1), (3, 7, 1), (4, 12, 1), (1, 4, 5), (1, 17, 3), (5, 1, 1)]
# float32 in another order of summation, in parts of the row's largest logit. Optimum's graph of gemma2 is 1.3e-5 from
# PyTorch by itself: optimum warns of 3e-5 when it writes it.
RELATIVE = 2e-5
every_file = pytest.mark.parametrize("name", MODELS)


@every_file
def test_final_logits_and_cache_are_bitwise_those_of_the_file_at_every_shape(name: str) -> None:
    old, new = Client(foreign(name)), Client(grafted(name) / "model.onnx")
    for seed, (batch, prompt, more) in enumerate(SHAPES):
        ids = tokens(batch, prompt + more, seed)
        before, after = (client(ids[:, :prompt], ones(batch, prompt)) for client in (old, new))
        assert_bitwise(before, after)
        if old.capacity:  # the room beyond the tokens is cut off in what a client returns
            continue
        assert_bitwise(old(ids[:, prompt:], ones(*ids.shape), before), new(ids[:, prompt:], ones(*ids.shape), after))


def assert_bitwise(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    rows = before["logits"].shape[1]  # one, where the exporter kept the last only
    assert np.array_equal(after["final_logits"][:, -rows:], before["logits"])
    for name in set(before) - {"logits"}:
        assert np.array_equal(before[name], after[name])


@pytest.mark.parametrize("name", TWINS)
def test_candidates_and_selection_are_those_of_pytorch_on_the_same_weights(name: str) -> None:
    client = Client(grafted(name) / "model.onnx")
    for batch, length in ((1, 1), (3, 12), (2, 29)):
        ids = tokens(batch, length, seed=length)
        with torch.no_grad():
            truth = wrapped(name)(ids)
        assert_same(client(ids, ones(batch, length)), truth)
    moved = truth.selected_layer < LAYERS
    assert 0.1 < moved.float().mean() < 0.9


def assert_same(found: dict[str, np.ndarray], truth: Any) -> None:
    scale = truth.final_logits.abs().amax(-1, keepdim=True)
    final, logits, entropy = (torch.from_numpy(found[n]) for n in ("final_logits", "logits", "entropy"))
    nats = (entropy - truth.entropy).abs()
    assert entropy.shape[-1] == LOOKBACK + 1
    assert ((final - truth.final_logits) / scale).abs().max() < RELATIVE
    assert (nats / scale.clamp(min=1)).max() < RELATIVE
    # Neighbouring entropies closer than both runtimes agree may order either way; at most a row or two of these do.
    clear = (truth.entropy.diff(dim=-1).abs() > 2 * nats.amax(-1, keepdim=True)).all(-1)
    assert clear.float().mean() > 0.9
    assert torch.equal(torch.from_numpy(found["selected_layer"])[clear], truth.selected_layer[clear])
    assert ((logits - truth.logits) / scale)[clear].abs().max() < RELATIVE


@pytest.mark.parametrize("name", OWN)
def test_candidates_of_files_without_a_twin_are_those_of_the_file_with_its_last_layers_out(
    name: str, tmp_path: Path
) -> None:
    """The tensors are named here by hand: x^(l) of onnxruntime-genai's builder, and what its final norm adds."""
    ids = tokens(2, 12)
    found = Client(grafted(name) / "model.onnx")(ids, ones(2, 12))
    for k in (1, 2):
        model = onnx.load(foreign(name))
        (norm,) = [
            node for node in model.graph.node if node.name == "/model/layers.4/final_norm_layernorm/SkipLayerNorm"
        ]
        norm.input[0] = f"/model/layers.{LAYERS - k}/input_layernorm/output_3"
        norm.input[1] = "zeros"
        model.graph.initializer.append(helper.make_tensor("zeros", TensorProto.FLOAT, (12, 32), [0.0] * 12 * 32))
        path = tmp_path / f"genai-{k}.onnx"
        onnx.save(model, path)
        log_p = torch.from_numpy(Client(path)(ids, ones(2, 12))["logits"]).double().log_softmax(-1)
        truth = -(log_p.exp() * log_p).sum(-1)
        assert (torch.from_numpy(found["entropy"][..., k]) - truth).abs().max() < 1e-5
        chosen = torch.from_numpy(found["selected_layer"]) == LAYERS - k
        assert chosen.any()
        ours = torch.from_numpy(found["logits"]).double().log_softmax(-1)
        assert (ours - log_p)[chosen].abs().max() < 1e-4


@every_file
def test_the_selection_follows_exactly_from_the_entropies_the_graph_returns(name: str) -> None:
    found = Client(grafted(name) / "model.onnx")(tokens(4, 30), ones(4, 30))
    depth = np.array([[algorithm_1(row) for row in rows] for rows in found["entropy"].tolist()])
    assert np.array_equal(found["selected_layer"], LAYERS - depth)
    unmoved = depth == 0
    assert 0 < unmoved.mean() < 1
    assert np.array_equal(found["logits"][unmoved], found["final_logits"][unmoved])
    assert not np.array_equal(found["logits"][~unmoved], found["final_logits"][~unmoved])


@pytest.mark.parametrize("name", ["optimum-llama", "genai-llama-int4", "genai-qwen3-pruned"])
def test_a_graph_of_the_last_position_projects_the_last_real_row_only(name: str) -> None:
    old, new = Client(foreign(name)), Client(grafted(name, "last") / "model.onnx")
    everything = Client(grafted(name) / "model.onnx")
    ids, mask = tokens(3, 9), ones(3, 9)
    before, after = old(ids, mask), new(ids, mask)
    assert after["logits"].shape == (3, 1, 96)
    assert np.array_equal(after["final_logits"], before["logits"][:, -1:])
    mask[1, 7:] = 0  # right padding: the last column is not a token of this text
    after, rows = new(ids, mask), everything(ids, mask)
    for row, last in enumerate((8, 6, 8)):
        for field in ("final_logits", "logits", "entropy", "selected_layer"):
            assert np.allclose(after[field][row, 0], rows[field][row, last], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["optimum-llama", "optimum-gpt2", "transformers-llama"])
def test_padded_rows_are_those_of_pytorch(name: str) -> None:
    ids, mask = tokens(3, 8), ones(3, 8)
    mask[0, :3], mask[1, 6:] = 0, 0
    found = Client(grafted(name) / "model.onnx")(ids, mask)
    with torch.no_grad():
        truth = wrapped(name)(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for row in range(3):
        real = mask[row].bool()
        one = {field: found[field][row][None, real.numpy()] for field in ("logits", "final_logits", "entropy")}
        one["selected_layer"] = found["selected_layer"][row][None, real.numpy()]
        assert_same(one, type(truth)(**{field: truth[field][row][None, real] for field in one}))


def test_a_probability_is_drawn_inside_the_graph_as_in_pytorch() -> None:
    ids = tokens(6, 40)
    found = Client(grafted("genai-llama", probability=0.5, seed=7) / "model.onnx")(ids, ones(6, 40))
    with torch.no_grad():
        truth = wrapped("genai-llama", probability=0.5, seed=7)(ids)
        always = wrapped("genai-llama")(ids)
    assert_same(found, truth)
    held_back = (always.selected_layer < LAYERS) & (truth.selected_layer == LAYERS)
    assert 0.3 < held_back.sum() / (always.selected_layer < LAYERS).sum() < 0.7


@every_file
def test_weights_are_stored_once_but_a_dequantized_head_and_nothing_of_the_old_one_is_left(name: str) -> None:
    old, new = onnx.load(foreign(name)), onnx.load(grafted(name) / "model.onnx")
    sizes = [{w.name: len(onnx.numpy_helper.to_array(w).tobytes()) for w in m.graph.initializer} for m in (old, new)]
    twice = sum(size for weight, size in sizes[0].items() if "qdq" in name and weight.startswith("lm_head"))
    assert (twice > 0) == ("qdq" in name)
    before, after = (sum(one.values()) for one in sizes)
    assert before + twice <= after < before + twice + 1024  # the head's own constants
    heads = [node for node in new.graph.node if 96 in shapes_read(node, new)]
    assert len([node for node in heads if node.op_type in ("MatMul", "MatMulNBits")]) == 2
    assert not {node.op_type for node in new.graph.node} & {"If", "Loop", "Scan", "SequenceMap"}


def shapes_read(node: Any, model: Any) -> set[int]:
    """The sizes of axes of the weights a node reads, directly or through one Transpose or DequantizeLinear."""
    made = {output: n for n in model.graph.node for output in n.output}
    weights = {w.name: list(w.dims) for w in model.graph.initializer}
    names = list(node.input)
    names += [i for name in node.input if name in made and made[name].op_type in _BEHIND for i in made[name].input]
    return {size for name in names for size in weights.get(name, [])}


_BEHIND = ("Transpose", "DequantizeLinear")


@every_file
def test_inputs_and_cache_keep_their_names_and_the_manifest_says_what_is_there(name: str) -> None:
    old, new = Client(foreign(name)), Client(grafted(name) / "model.onnx")
    assert sorted(new.inputs) == sorted(old.inputs)
    assert new.outputs[:4] == ["logits", "final_logits", "selected_layer", "entropy"]
    assert sorted(new.outputs[4:]) == sorted(set(old.outputs) - {"logits"})
    cache = [n for n in new.inputs if n not in ("input_ids", "attention_mask", "position_ids")]
    assert [present(n) for n in cache] == new.outputs[4:]
    assert [n.endswith(("key", "keys")) for n in cache] == [True, False] * LAYERS
    manifest = read_manifest(grafted(name))
    assert [spec.name for spec in manifest.signature.inputs] == new.inputs
    assert [spec.name for spec in manifest.signature.outputs] == new.outputs
    assert manifest.group_query_attention == name.startswith("genai")
    assert (manifest.layers, manifest.confident.lookback, manifest.model_type) == (LAYERS, LOOKBACK, MODELS[name])
    assert manifest.parity["passed"]
    assert manifest.parity["steps_bitwise"] == manifest.parity["steps"] == 12


def test_the_same_file_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "trace_head", trace_head)  # not the one that other tests share
    again = export.graft(foreign("optimum-llama"), tmp_path / "again", lookback=LOOKBACK, positions="all")
    for name in ("model.onnx", "model.onnx.data"):
        assert (again / name).read_bytes() == (grafted("optimum-llama") / name).read_bytes()


def edited(name: str, folder: Path, change: Any) -> Path:
    """A foreign file with its graph changed by hand; its weights are in it."""
    folder.mkdir()
    for path in foreign(name).parent.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    model = onnx.load(foreign(name))
    change(model.graph)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_a_factor_of_each_layer_belongs_to_its_state(tmp_path: Path) -> None:
    """Gemma 4 multiplies what a layer returns by a number of that layer; the last one's is not the tail's."""

    def scale(graph: Any) -> None:
        for layer in range(LAYERS):
            name = f"/model/layers.{layer}/Add_1_output_0"
            for node in graph.node:
                node.input[:] = ["scaled" + name if i == name else i for i in node.input]
            index = next(i for i, node in enumerate(graph.node) if name in node.output)
            graph.initializer.append(helper.make_tensor(f"factor{layer}", TensorProto.FLOAT, (), [0.4 + 0.5 * layer]))
            graph.node.insert(index + 1, helper.make_node("Mul", [name, f"factor{layer}"], ["scaled" + name]))

    def shorten(graph: Any) -> None:
        scale(graph)
        (cast,) = [node for node in graph.node if "/model/norm/Cast_output_0" in node.output]
        cast.input[0] = "scaled/model/layers.2/Add_1_output_0"

    path = edited("optimum-llama", tmp_path / "scaled", scale)
    place = export.graft(path, tmp_path / "artifact", lookback=LOOKBACK, positions="all")
    ids, mask = tokens(2, 12), ones(2, 12)
    found = Client(place / "model.onnx")(ids, mask)
    assert np.array_equal(found["final_logits"], Client(path)(ids, mask)["logits"])
    log_p = Client(edited("optimum-llama", tmp_path / "shortened", shorten))(ids, mask)["logits"]
    truth = torch.from_numpy(log_p).double().log_softmax(-1)
    assert (torch.from_numpy(found["entropy"][..., 1]) + (truth.exp() * truth).sum(-1)).abs().max() < 1e-5


def test_a_bias_that_the_final_norm_adds_is_the_last_layers_only(tmp_path: Path) -> None:
    """ONNX Runtime's optimiser moves a projection's bias into the norm that follows it.

    An epsilon that matters shows a state that is added to itself: a norm takes out every factor but that against it.
    """

    def large_epsilon(graph: Any) -> Any:
        (norm,) = [node for node in graph.node if "final_norm" in node.name]
        norm.attribute[0].f = 1.0
        return norm

    def add_bias(graph: Any) -> None:
        large_epsilon(graph).input.append("bias")
        graph.initializer.append(helper.make_tensor("bias", TensorProto.FLOAT, (32,), np.linspace(-3, 3, 32)))

    paths = [edited("genai-llama", tmp_path / f"genai-{c.__name__}", c) for c in (large_epsilon, add_bias)]
    places = [
        export.graft(path, tmp_path / f"genai-{i}", lookback=LOOKBACK, positions="all") for i, path in enumerate(paths)
    ]
    ids, mask = tokens(2, 12), ones(2, 12)
    plain, found = (Client(place / "model.onnx")(ids, mask) for place in places)
    assert np.array_equal(found["final_logits"], Client(paths[1])(ids, mask)["logits"])
    assert np.array_equal(found["entropy"][..., 1:], plain["entropy"][..., 1:])
    assert not np.allclose(found["entropy"][..., 0], plain["entropy"][..., 0], atol=0.1)
