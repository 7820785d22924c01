"""The exported graph: the names clients expect, dynamic in every way, static in its selection, equal to PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from artifacts import EXPORTED, LOOKBACK, Client, artifact, padded, wrapped
from families import algorithm_1, mostly, token_ids
from torch import Tensor

LAYERS = 4
# (batch, prompt, continuation): one token and many, on an empty and a filled cache, batches the sample never had.
SHAPES = [(1, 1, 1), (1, 9, 1), (2, 3, 4), (3, 7, 1), (4, 12, 5), (5, 2, 9), (1, 40, 3), (2, 65, 1)]
every_family = pytest.mark.parametrize("family", mostly(["llama"], EXPORTED))

# float32 in another order of summation. Both logits and entropies in parts of the row's largest logit, of some tens:
# PyTorch itself is up to 2e-6 away from float64 in these logits, and up to 1e-5 nats in these entropies.
RELATIVE = 1e-5


def last_rows(mask: Tensor, tensor: Tensor) -> Tensor:
    """The row of each text's last real token, found by a loop."""
    last = [max(i for i, real in enumerate(row) if real) for row in mask.tolist()]
    return torch.stack([tensor[b, t] for b, t in enumerate(last)])


def assert_same(found: dict[str, np.ndarray], truth: dict[str, Tensor]) -> None:
    logits = {name: torch.from_numpy(found[name][:, -1]) for name in ("logits", "final_logits")}
    entropy, layer = torch.from_numpy(found["entropy"][:, -1]), torch.from_numpy(found["selected_layer"][:, -1])
    scale = truth["final_logits"].abs().amax(-1, keepdim=True)
    nats = (entropy - truth["entropy"]).abs()
    assert (nats / scale).max() < RELATIVE
    assert ((logits["final_logits"] - truth["final_logits"]) / scale).abs().max() < RELATIVE
    # Neighbouring entropies closer than both runtimes agree may order either way; none do in these tests' rows.
    assert (truth["entropy"].diff(dim=-1).abs() > 2 * nats.amax(-1, keepdim=True)).all()
    assert torch.equal(layer, truth["selected_layer"])
    assert ((logits["logits"] - truth["logits"]) / scale).abs().max() < RELATIVE


@torch.no_grad()
def reference(family: str, ids: Tensor, mask: Tensor) -> Any:
    """PyTorch on the whole text at once, without a cache, so that the graph's cache is tested too."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return wrapped(family)(ids, attention_mask=mask, position_ids=positions, use_cache=False)


@every_family
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_prefill_and_continuation_equal_pytorch_at_every_shape_and_padding(family: str, side: str) -> None:
    client = Client(artifact(family))
    for seed, (batch, prompt, more) in enumerate(SHAPES):
        ids = token_ids(batch, prompt + more, seed)
        mask = torch.cat([padded(batch, prompt, side), torch.ones(batch, more, dtype=torch.int64)], dim=1)
        truth = reference(family, ids, mask)
        fields = ("logits", "final_logits", "selected_layer", "entropy")
        first = client(ids[:, :prompt], mask[:, :prompt])
        prefix = {name: last_rows(mask[:, :prompt], truth[name]) for name in fields}
        assert_same(first, prefix)
        assert_same(client(ids[:, prompt:], mask, first), {name: truth[name][:, -1] for name in fields})


@every_family
def test_graph_and_pytorch_are_equally_far_from_float64(family: str) -> None:
    """Entropies of logits around 30 are 1e-5 nats off in float32, whoever computes them: hence the tolerance."""
    ids, mask = token_ids(8, 60), torch.ones(8, 60, dtype=torch.int64)
    found, single = Client(artifact(family, "all"))(ids, mask)["entropy"], reference(family, ids, mask).entropy
    with torch.no_grad():
        truth = copy.deepcopy(wrapped(family)).double()(ids, attention_mask=mask, use_cache=False)
    scale = truth.final_logits.abs().amax(-1, keepdim=True)
    far = [((entropy - truth.entropy).abs() / scale).max() for entropy in (torch.from_numpy(found), single)]
    assert min(far) > 2e-7
    assert max(far) < RELATIVE
    assert max(far) < 3 * min(far)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_graph_of_all_positions_reads_its_mask(family: str, side: str) -> None:
    ids, mask = token_ids(4, 9), padded(4, 9, side)
    found, truth = Client(artifact(family, "all"))(ids, mask), reference(family, ids, mask)
    for row, column in mask.nonzero().tolist():
        one = {name: value[row : row + 1, column : column + 1] for name, value in found.items() if value.ndim < 4}
        assert_same(one, {name: truth[name][row : row + 1, column] for name in one})


@every_family
def test_each_row_equals_the_row_alone(family: str) -> None:
    client = Client(artifact(family))
    ids, mask = token_ids(4, 9), padded(4, 9, "left")
    together = client(ids, mask)
    for row in range(4):
        alone = client(ids[row : row + 1, row:], mask[row : row + 1, row:])
        assert_same(alone, {name: torch.from_numpy(together[name][row : row + 1, -1]) for name in together})


@every_family
def test_the_selection_follows_exactly_from_the_entropies_the_graph_returns(family: str) -> None:
    found = Client(artifact(family, "all"))(token_ids(4, 30), torch.ones(4, 30, dtype=torch.int64))
    depth = np.array([[algorithm_1(row) for row in rows] for rows in found["entropy"].tolist()])
    assert np.array_equal(found["selected_layer"], LAYERS - depth)
    assert 0 < (depth > 0).mean() < 1
    unmoved = depth == 0
    assert np.array_equal(found["logits"][unmoved], found["final_logits"][unmoved])
    assert not np.array_equal(found["logits"][~unmoved], found["final_logits"][~unmoved])


@every_family
def test_entropies_are_exact_where_they_are_tiny(family: str) -> None:
    """Against float64 on the graph's own logits: Log(1 + s) for log1p would be wrong here by up to 100 %."""
    found = Client(artifact(family, "all"))(token_ids(8, 60), torch.ones(8, 60, dtype=torch.int64))
    log_p = torch.from_numpy(found["final_logits"]).double().log_softmax(-1)
    truth = -(log_p.exp() * log_p).sum(-1)
    assert truth.min() < 1e-3
    error = (torch.from_numpy(found["entropy"][..., 0]) - truth).abs() / truth
    assert error[truth > 1e-7].max() < 1e-6


@every_family
def test_positions_all_returns_every_row_and_its_last_is_what_last_returns(family: str) -> None:
    ids, mask = token_ids(2, 11), torch.ones(2, 11, dtype=torch.int64)
    everything, last = Client(artifact(family, "all"))(ids, mask), Client(artifact(family))(ids, mask)
    assert everything["logits"].shape == (2, 11, 256)
    assert last["logits"].shape == (2, 1, 256)
    assert np.allclose(everything["logits"][:, -1:], last["logits"], rtol=0, atol=RELATIVE * 100)


@every_family
def test_names_dtypes_and_order_are_those_of_the_interface(family: str) -> None:
    client = Client(artifact(family))
    pairs = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    assert client.inputs == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{p}" for p in pairs)]
    assert client.outputs == ["logits", "final_logits", "selected_layer", "entropy", *(f"present.{p}" for p in pairs)]
    axes = {value.name: value.shape for value in client.session.get_inputs() + client.session.get_outputs()}
    assert axes["attention_mask"] == ["batch", "total"]
    assert axes["past_key_values.0.key"] == ["batch", 2, "past", 16]
    assert axes["entropy"] == ["batch", 1, LOOKBACK + 1]


@every_family
def test_the_graph_has_no_control_flow_and_passes_the_checker(family: str) -> None:
    path = artifact(family) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 20
    assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan", "SequenceMap"}
    assert {opset.domain for opset in model.opset_import} == {""}


@every_family
def test_every_weight_is_stored_once(family: str) -> None:
    """Tied embeddings share one initializer: all of them together are the parameters, and some constants."""
    parameters = sum(parameter.numel() * 4 for parameter in wrapped(family).parameters())
    graph = onnx.load(artifact(family) / "model.onnx").graph
    size = sum(onnx.numpy_helper.to_array(weight).nbytes for weight in graph.initializer)
    assert parameters <= size < 1.02 * parameters + 8192


@pytest.mark.thorough
def test_a_probability_between_zero_and_one_is_drawn_inside_the_graph() -> None:
    options = {"probability": 0.5, "seed": 7}
    ids, mask = token_ids(6, 40), torch.ones(6, 40, dtype=torch.int64)
    found = Client(artifact("llama", "all", **options))(ids, mask)
    with torch.no_grad():
        truth = wrapped("llama", **options)(ids)
        always = wrapped("llama")(ids)
    gaps = truth.entropy.diff(dim=-1).abs().amin(-1)
    clear = gaps > 2 * (torch.from_numpy(found["entropy"]) - truth.entropy).abs().amax(-1)
    assert clear.float().mean() > 0.99
    assert torch.equal(torch.from_numpy(found["selected_layer"])[clear], truth.selected_layer[clear])
    held_back = (always.selected_layer < LAYERS) & (truth.selected_layer == LAYERS)
    assert 0.3 < held_back.sum() / (always.selected_layer < LAYERS).sum() < 0.7
