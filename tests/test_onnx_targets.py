"""Graphs for one provider of ONNX Runtime: its own operators inside, and the same results as the portable ones."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from artifacts import artifact, wrapped
from families import mostly, tiny_model

import cdsurgery
from cdsurgery import export

SKIP_NORM, ROTARY = "SkipSimplifiedLayerNormalization", "RotaryEmbedding"
EXPECTED = {
    "llama": {SKIP_NORM, ROTARY},
    "qwen3_moe": {SKIP_NORM, ROTARY},
    "gpt_oss": {SKIP_NORM},
    "qwen3_5_text": {"LinearAttention", "CausalConvWithState"},
}


def operators(folder: Path) -> set[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {node.op_type for node in graph.node if node.domain == "com.microsoft"}


@pytest.mark.parametrize("family", mostly(["llama", "qwen3_5_text"], ["llama", "qwen3_moe", "gpt_oss", "qwen3_5_text"]))
def test_the_cpu_target_has_its_operators_and_passes_the_same_comparison(family: str) -> None:
    """`to_onnx` compares before it keeps anything; here the file is opened anew."""
    folder = artifact(family, target="cpu")
    assert EXPECTED[family] <= operators(folder)
    assert export.verify(folder, wrapped(family), new_tokens=16).passed


@pytest.mark.parametrize("family", mostly(["gemma2"], ["gemma2", "gemma3_text", "gpt_oss"]))
def test_half_precision_is_left_as_it_is_where_fusions_would_change_it(family: str) -> None:
    folder = artifact(family, dtype=torch.float16, target="cpu")
    assert not operators(folder) & {SKIP_NORM, "SimplifiedLayerNormalization"}
    assert export.verify(folder, wrapped(family, torch.float16)).passed


def test_the_cuda_target_fuses_attention(tmp_path: Path) -> None:
    """Which has CPU kernels too, so that the graph can be compared."""
    model = cdsurgery.wrap(tiny_model("llama", num_hidden_layers=2), lookback=1)
    dense = export.to_onnx(model, tmp_path / "dense", target="cuda", parity=False)
    assert {"MultiHeadAttention", ROTARY, SKIP_NORM} <= operators(dense)
    assert export.verify(dense, model).passed


@pytest.mark.thorough
def test_the_cuda_target_fuses_experts(tmp_path: Path) -> None:
    experts = export.to_onnx(wrapped("qwen3_moe"), tmp_path / "experts", target="cuda", parity=False)
    assert {"MultiHeadAttention", "MoE"} <= operators(experts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "qwen3_5_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_cuda_target_runs_on_its_provider(family: str, dtype: torch.dtype) -> None:
    assert operators(artifact(family, dtype=dtype, target="cuda"))
