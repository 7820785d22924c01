"""Every family that is exported: equal to PyTorch at every shape and padding, in every dtype that runs here."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from artifacts import Client, artifact, padded, wrapped
from engines import needs_rtx
from families import algorithm_1, mostly, token_ids
from torch import Tensor

from cdsurgery import ArtifactError, export
from cdsurgery.export.parity.report import scan_margin
from cdsurgery.export.parity.verify import _wider

# fmt: off
ATTENTION = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "gemma2", "gemma3_text", "gemma4_text",
             "phi3", "cohere2", "granite", "olmo2", "deepseek_v3", "smollm3", "gpt2", "opt"]
# fmt: on
HYBRIDS = ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"]
FAMILIES = ATTENTION + HYBRIDS
USUAL = ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_text"]
every_family = pytest.mark.parametrize("family", mostly(USUAL, FAMILIES))

# (batch, prompt, chunks that continue the cache): one token and many, past the windows of 4 tokens, batches the sample
# never had.
SHAPES = [
    (1, 1, (1,)),
    (1, 9, (1, 1)),
    (2, 3, (4,)),
    (3, 7, (1,)),
    (4, 12, (5, 1)),
    (5, 2, (9,)),
    (1, 40, (3,)),
    (2, 65, (1,)),
]
# In parts of the row's largest logit: float32 sums in another order.
RELATIVE = 1e-5
# Where PyTorch itself is farther than a third of that from float64, on the same texts, as much as three times as far:
# the queries of linear attention may meet no key, and the norm after it blows up what is left.
FACTOR = 3
FIELDS = ("logits", "final_logits", "selected_layer", "entropy")


@functools.cache
def double(family: str) -> Any:
    return _wider(wrapped(family))


@torch.no_grad()
def reference(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """PyTorch on the whole text at once, without a cache, so that the graph's cache is tested too."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return {name: out[name] for name in FIELDS}


def noise(found: dict[str, Tensor], truth: dict[str, Tensor], mask: Tensor) -> float:
    """How far PyTorch's own final logits are from float64, at the real tokens."""
    scale = truth["final_logits"].abs().amax(-1, keepdim=True)
    return float(((found["final_logits"] - truth["final_logits"]) / scale)[mask.bool()].abs().max())


def unclear_rows(found: dict[str, np.ndarray], truth: dict[str, Tensor], allowed: float) -> int:
    """Hold last rows `[B, ...]` against PyTorch's; return how many scans were too close to call."""
    ours = {name: torch.from_numpy(found[name][:, -1]) for name in FIELDS}
    scale = truth["final_logits"].abs().amax(-1, keepdim=True)
    nats = (ours["entropy"] - truth["entropy"]).abs()
    assert (nats / scale.clamp(min=1)).max() < allowed
    assert ((ours["final_logits"] - truth["final_logits"]) / scale).abs().max() < allowed
    clear = scan_margin(truth["entropy"]) > 2 * nats.amax(-1)
    assert torch.equal(ours["selected_layer"][clear], truth["selected_layer"][clear])
    assert ((ours["logits"] - truth["logits"]) / scale)[clear].abs().amax() < allowed
    return int((~clear).sum())


@every_family
def test_every_shape_padding_and_continuation_equals_pytorch(family: str) -> None:
    client, rows, unclear = Client(artifact(family)), 0, 0
    for side in ("none", "left", "right"):
        if side == "right" and family in HYBRIDS:
            continue  # what follows padding is computed from it, in PyTorch too: a recurrent state has no mask
        for seed, (batch, prompt, chunks) in enumerate(SHAPES):
            total = prompt + sum(chunks)
            ids = token_ids(batch, total, seed)
            mask = torch.cat([padded(batch, prompt, side), torch.ones(batch, total - prompt, dtype=torch.int64)], dim=1)
            truth = reference(wrapped(family), ids, mask)
            allowed = max(RELATIVE, FACTOR * noise(truth, reference(double(family), ids, mask), mask))
            past, start = None, 0
            for end in np.cumsum([prompt, *chunks]).tolist():
                past = client(ids[:, start:end], mask[:, :end], past)
                last = [max(t for t in range(start, end) if row[t]) for row in mask.tolist()]
                rows_truth = {name: value[range(batch), last] for name, value in truth.items()}
                unclear += unclear_rows(past, rows_truth, allowed)
                rows, start = rows + batch, end
    assert unclear < 0.05 * rows


@every_family
def test_each_row_equals_the_row_alone(family: str) -> None:
    client = Client(artifact(family))
    ids, mask = token_ids(4, 10), padded(4, 10, "left")
    truth = reference(wrapped(family), ids, mask)
    allowed = max(RELATIVE, FACTOR * noise(truth, reference(double(family), ids, mask), mask))
    together = client(ids, mask)
    for row in range(4):
        alone = client(ids[row : row + 1, row:], mask[row : row + 1, row:])
        scale = np.abs(alone["final_logits"]).max()
        for name in ("logits", "final_logits", "entropy"):
            assert np.abs(together[name][row] - alone[name][0]).max() < allowed * max(scale, 1)
        assert together["selected_layer"][row] == alone["selected_layer"][0]


@every_family
def test_the_selection_follows_exactly_from_the_entropies_and_has_no_control_flow(family: str) -> None:
    layers = len(wrapped(family).anatomy.layers)
    client = Client(artifact(family))
    found = client(token_ids(64, 6), torch.ones(64, 6, dtype=torch.int64))
    depth = np.array([[algorithm_1(row) for row in rows] for rows in found["entropy"].tolist()])
    assert found["entropy"].shape == (64, 1, wrapped(family).confident.lookback + 1)
    assert np.array_equal(found["selected_layer"], layers - depth)
    assert 0 < (depth > 0).mean() < 1
    unmoved = depth == 0
    assert np.array_equal(found["logits"][unmoved], found["final_logits"][unmoved])
    assert not np.array_equal(found["logits"][~unmoved], found["final_logits"][~unmoved])


@every_family
def test_the_file_passes_the_checker_and_stores_every_weight_once(family: str) -> None:
    path = artifact(family) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 20}
    assert not {node.domain for node in model.graph.node if node.domain}
    control = {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan", "SequenceMap"}
    assert control == ({"Scan"} if family in HYBRIDS else set())  # chunks of linear attention; none in the selection
    parameters = sum(parameter.numel() * 4 for parameter in wrapped(family).parameters())
    size = sum(onnx.numpy_helper.to_array(weight).nbytes for weight in model.graph.initializer)
    assert 0.9 * parameters < size < 1.02 * parameters + 65536


@needs_rtx
@every_family
def test_tensorrt_reads_the_graph(family: str) -> None:
    """Building takes too long for all of them; examples/tensorrt_families.py does it."""
    import tensorrt_rtx as trt

    network = trt.Builder(logger := trt.Logger(trt.Logger.ERROR)).create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(artifact(family) / "model.onnx")), parser.get_error(0).desc()
    names = [network.get_output(index).name for index in range(network.num_outputs)]
    assert names == Client(artifact(family)).outputs


@pytest.mark.parametrize("family", mostly(["gpt_oss"], ["llama", "gemma2", "gpt_oss", "qwen3_5_text"]))
def test_half_precision_is_as_exact_as_pytorch_in_it(family: str) -> None:
    """The export itself compares; here both are held against float32 on the same weights."""
    folder = artifact(family, dtype=torch.float16)
    parity = json.loads((folder / "cdsurgery.json").read_text())["parity"]
    assert parity["passed"]
    found = Client(folder)(ids := token_ids(8, 12), mask := torch.ones(8, 12, dtype=torch.int64))
    assert found["logits"].dtype == np.float16
    assert found["entropy"].dtype == np.float32
    half, exact = wrapped(family, torch.float16), _float(family, torch.float16)
    with torch.no_grad():
        ours = torch.from_numpy(found["final_logits"][:, -1]).float()
        theirs = half(ids, attention_mask=mask).final_logits[:, -1].float()
        truth = exact(ids, attention_mask=mask).final_logits[:, -1]
    error, theirs_error = ((z - truth).abs().mean() for z in (ours, theirs))
    assert error < 1.5 * theirs_error
    # The entropies are float32's, of the logits before or after they were rounded to half: where ONNX Runtime's CPU
    # computes half in float32 it spares itself the two casts between. One rounding of a logit is 2^-11 of it.
    final = torch.from_numpy(found["final_logits"][:, -1]).double()
    log_p = final.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    off = (torch.from_numpy(found["entropy"][:, -1, 0]) - entropy).abs()
    assert (off < final.abs().amax(-1) * 2**-11).all()


@pytest.mark.parametrize("family", mostly(["llama"], ["llama", "qwen3_5_text"]))
def test_bfloat16_weights_are_kept_and_computed_in_float32(family: str) -> None:
    folder = artifact(family, dtype=torch.bfloat16, upcast=True)
    stored = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    size = {kind: sum(np.prod(w.dims) for w in stored if w.data_type == kind) for kind in {w.data_type for w in stored}}
    assert size[onnx.TensorProto.BFLOAT16] > 0.95 * sum(size.values())
    found = Client(folder)(ids := token_ids(8, 12), mask := torch.ones(8, 12, dtype=torch.int64))
    model = _float(family, torch.bfloat16)
    truth = reference(model, ids, mask)
    allowed = max(RELATIVE, FACTOR * noise(truth, reference(_wider(model), ids, mask), mask))
    assert unclear_rows(found, {name: value[:, -1] for name, value in truth.items()}, allowed) == 0


def _float(family: str, dtype: torch.dtype) -> Any:
    """The weights of the half-precision model in float32."""
    return copy.deepcopy(wrapped(family, dtype)).float()


@pytest.mark.thorough
def test_a_bfloat16_graph_for_another_runtime_is_written_unverified_and_says_so(tmp_path: Path) -> None:
    """ONNX Runtime's CPU has no bfloat16 kernels; TensorRT, for which such a graph is made, is not here."""
    model = wrapped("llama", torch.bfloat16)
    folder = export.to_onnx(model, tmp_path / "artifact", parity=False)
    assert json.loads((folder / "cdsurgery.json").read_text())["parity"] is None
    graph = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    size = sum(np.prod(w.dims) for w in graph.graph.initializer if w.data_type == onnx.TensorProto.BFLOAT16)
    assert size >= sum(parameter.numel() for parameter in model.parameters())
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.graph.output}
    assert kinds["present.0.key"] == onnx.TensorProto.BFLOAT16
    assert kinds["logits"] == kinds["entropy"] == onnx.TensorProto.FLOAT
    with pytest.raises(ArtifactError, match="Could not find an implementation"):
        export.load(folder)
