"""Hybrid models as graphs: right at every length, on continued caches, under left padding.

The rule is held against a loop over tokens in float64; whole models against transformers run in float64. They must not
be further off than transformers in float32 is: a layer whose query meets no key returns next to nothing, which its
norm blows up, so that single tokens of these tiny models are 1e-4 off in any float32, whoever computes them.
"""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from families import VOCABULARY, mostly, tiny_model, token_ids
from hybrids import HYBRIDS, KERNEL, cache_states, client, hybrid, run
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.models.qwen3_5 import modeling_qwen3_5

from cdsurgery.export.graph.cache import build_cache
from cdsurgery.export.graph.delta_rule import expand_delta_rule
from cdsurgery.export.graph.linear_attention import CONVOLUTION, RULES, traceable_linear_attention
from cdsurgery.export.graph.quiet import quiet
from cdsurgery.export.options import Target

TARGETS: tuple[Target, ...] = ("cpu", "portable")
LENGTHS = (1, 7, 64, 65, 130, 1000)
PROMPT = 5
KEY_HEADS, VALUE_HEADS, SIZE = 2, 6, 16  # three heads of values for each of keys: 2 by 2 would hide an exchange
every_target = pytest.mark.parametrize("target", TARGETS)
USUAL = ("qwen3_5_text",)
every_graph = pytest.mark.parametrize("target", mostly(["portable"], TARGETS))  # where whole models are traced
every_family = pytest.mark.parametrize("family", mostly(USUAL, HYBRIDS))


# The rule alone.


class Rule(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Any:
        rule = modeling_qwen3_5.torch_chunk_gated_delta_rule
        output, state = rule(query, key, value, g, beta, initial_state=state, output_final_state=True)
        return {"output": output, "last": state}


@pytest.fixture(scope="module", params=TARGETS)
def rule(request: Any) -> onnxruntime.InferenceSession:
    inputs = dict(zip(("query", "key", "value", "g", "beta", "state"), rule_inputs(2, 3), strict=True))
    shapes: dict[str, Any] = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs} | {"state": {0: Dim.AUTO}}
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=20)
    with torch.no_grad(), traceable_linear_attention(hybrid("qwen3_5_text"), request.param), quiet():
        graph = OnnxExporter().export(Rule(), inputs, config=config).program
    expand_delta_rule(graph)
    return onnxruntime.InferenceSession(onnx_ir.to_proto(graph).SerializeToString())


def rule_inputs(batch: int, length: int, alike: bool = False) -> list[Tensor]:
    """Random inputs of the rule; `alike`: keys nearly the same, hardly any decay, and every token rewrites."""
    torch.manual_seed(length)
    query, key = (torch.randn(batch, length, KEY_HEADS, SIZE) for _ in range(2))
    decay, rate = torch.rand(batch, length, VALUE_HEADS), torch.randn(batch, length, VALUE_HEADS)
    if alike:
        key, decay, rate = torch.randn(SIZE) + 0.03 * key, decay * 1e-3, rate + 6
    value, state = torch.randn(batch, length, VALUE_HEADS, SIZE), torch.randn(batch, VALUE_HEADS, SIZE, SIZE)
    return [F.normalize(query, dim=-1), F.normalize(key, dim=-1), value, -decay, rate.sigmoid(), state]


def loop(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The rule, token by token and head by head, in float64."""
    query, key, value, g, beta, state = (tensor.double() for tensor in inputs)
    output, state = torch.zeros_like(value), state.clone()
    for row in range(value.shape[0]):
        for head in range(VALUE_HEADS):
            memory, shared = state[row, head], head // (VALUE_HEADS // KEY_HEADS)
            for t in range(value.shape[1]):
                k, q = key[row, t, shared], query[row, t, shared]
                memory = memory * g[row, t, head].exp()
                memory = memory + torch.outer(k, beta[row, t, head] * (value[row, t, head] - k @ memory))
                output[row, t, head] = q @ memory / SIZE**0.5
            state[row, head] = memory
    return output, state


@pytest.mark.parametrize("alike", [False, True], ids=["random", "alike"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_rule_is_a_loop_over_tokens(
    rule: onnxruntime.InferenceSession, batch: int, length: int, alike: bool
) -> None:
    inputs = rule_inputs(batch, length, alike)
    names = [value.name for value in rule.get_inputs()]
    found = rule.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    for ours, truth in zip(found, loop(inputs), strict=True):
        # Values are around 1; a state sums at most as many of them as its keys can tell apart.
        assert np.abs(ours - truth.numpy()).max() < 5e-6 * max(1, truth.abs().max())


def test_keys_alike_are_more_than_powers_of_the_system_can_take() -> None:
    """What the case above is there for: by float32 powers, as is usual, the same inverse is lost."""
    _, key, _, g, beta, _ = (tensor[0] for tensor in rule_inputs(1, 64, alike=True))
    total = g[:, 0].cumsum(0)
    system = (beta[:, :1] * (key[:, 0] @ key[:, 0].T) * (total[:, None] - total).exp()).tril(-1)
    truth = torch.linalg.inv(torch.eye(64).double() + system.double())
    inverse, power = torch.eye(64) - system, system
    for _ in range(5):
        power = power @ power
        inverse = inverse + inverse @ power
    assert truth.abs().max() < 2
    assert power.abs().max() > 1e9
    assert (inverse - truth).abs().max() > 1e3


# Whole models.


def text(batch: int) -> tuple[Tensor, Tensor]:
    """Tokens and a mask with 0, 2 and 4 tokens of left padding."""
    ids = token_ids(batch, PROMPT + max(LENGTHS))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return ids, mask


@functools.cache
@torch.no_grad()
def plain(family: str, batch: int, length: int, double: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits of transformers on the first tokens of a text, and its states after them; `double`: all in float64."""
    ids, mask = (tensor[:, :length] for tensor in text(batch))
    wide, cast = (torch.float64, Tensor.double) if double else (torch.float32, Tensor.float)
    model = copy.deepcopy(hybrid(family)).to(wide)
    with mock.patch.object(torch, "float32", wide), mock.patch.object(Tensor, "float", cast):
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the default has no float64
        cache = DynamicCache(config=model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return logits, cache_states(cache)


def off(found: Any, truth: Tensor, mask: Tensor) -> Tensor:
    """How far logits are off at real tokens, of each row's largest."""
    scale = truth.abs().amax(-1, keepdim=True)
    return ((torch.as_tensor(found) - truth) / scale).abs().amax(-1)[mask.bool()]


@pytest.mark.parametrize("batch", [1, 3])
@every_family
@every_graph
def test_a_graph_is_transformers_at_every_length_padding_and_past(family: str, target: Target, batch: int) -> None:
    graph, (ids, mask) = client(family, target), text(batch)
    prompt = run(graph, ids[:, :PROMPT], mask[:, :PROMPT])
    truth, _ = plain(family, batch, ids.shape[1], double=True)
    single = off(plain(family, batch, ids.shape[1], double=False)[0], truth, mask)
    for start, past in ((0, None), (PROMPT, prompt[1:])):
        for length in LENGTHS:
            new = slice(start, start + length)
            logits, *states = run(graph, ids[:, new], mask[:, : new.stop], past)
            error = off(logits, truth[:, new], mask[:, new])
            assert error.max() < 4 * single.max() + 1e-6
            assert length < 64 or error.median() < 2 * single.median()
            # transformers lets a single token into the states without asking the mask; the graph never does.
            real = mask[:, : new.stop].any(-1).numpy()
            _, true_states = plain(family, batch, new.stop, double=True)
            _, single_states = plain(family, batch, new.stop, double=False)
            for state, true, own in zip(states, true_states, single_states, strict=True):
                assert state.shape == true.shape
                allowed = max(1e-4 * max(1, true.abs().max()), 4 * (own - true)[real].abs().max())
                assert np.abs(state - true.numpy())[real].max() < allowed


@every_family
@every_graph
def test_padding_leaves_no_trace_in_a_row(family: str, target: Target) -> None:
    graph, ids, mask = client(family, target), token_ids(2, 70), torch.ones(2, 70, dtype=torch.int64)
    mask[1, :9] = 0
    logits, *states = run(graph, ids, mask)
    bare, *bare_states = run(graph, ids[1:, 9:], mask[1:, 9:])
    assert off(logits[1:, 9:], torch.from_numpy(bare), mask[1:, 9:]).median() < 5e-6
    for state, other, kind in zip(states[::2], bare_states[::2], hybrid(family).config.layer_types, strict=True):
        if kind == "linear_attention":
            assert np.allclose(state[1:], other, atol=1e-5)


@every_graph
def test_a_half_precision_graph_keeps_recurrent_states_in_float32(target: Target) -> None:
    family, ids, mask = "qwen3_5_text", token_ids(2, 70), torch.ones(2, 70, dtype=torch.int64)
    model, graph = hybrid(family, dtype=torch.float16), client(family, target, torch.float16)
    kinds = [value.type for value in graph.cache_inputs]
    assert kinds == ["tensor(float16)", "tensor(float)"] * 2 + ["tensor(float16)"] * 2
    assert [value.type for value in graph.session.get_outputs()[4:]] == kinds
    with torch.no_grad():
        first = run(graph, ids[:, :30], mask[:, :30])
        truth = copy.deepcopy(model).float()(ids, attention_mask=mask).logits
    second = run(graph, ids[:, 30:], mask, first[1:])
    error = off(np.concatenate([first[0], second[0]], axis=1), truth, mask)
    assert error.median() < 1e-2


# The graph itself.


@every_graph
def test_a_graph_is_small_whatever_the_length_and_passes_the_checker(target: Target) -> None:
    model = onnx.load(client("qwen3_5_text", target).path)
    if target == "portable":  # ONNX Runtime's own operators are not ONNX's
        onnx.checker.check_model(model, full_check=True)
    domains = {"", "com.microsoft"} if target == "cpu" else {""}
    assert {opset.domain for opset in model.opset_import} == domains
    assert next(opset.version for opset in model.opset_import if not opset.domain) == 20
    names = [node.op_type for node in _all_nodes(model.graph)]
    assert names.count("LinearAttention" if target == "cpu" else "Scan") == 2
    assert len(names) < 1000  # two unrolled loops have 7,000


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for body in inner for node in _all_nodes(body))]


# What tracing leaves behind.


def test_leaving_puts_everything_back() -> None:
    places = [(modeling_qwen3_5, name) for name in (*RULES, CONVOLUTION)]
    places += [(LinearAttentionLayer, name) for name in ("update_conv_state", "update_recurrent_state")]
    before = [getattr(place, name) for place, name in places]
    try:
        with traceable_linear_attention(hybrid("qwen3_5_text"), "cpu"):
            inside = [getattr(place, name) for place, name in places]
            raise KeyError
    except KeyError:
        pass
    assert not any(new is old for new, old in zip(inside, before, strict=True))
    assert all(getattr(place, name) is old for (place, name), old in zip(places, before, strict=True))


def test_a_model_without_the_rule_is_left_alone() -> None:
    before = LinearAttentionLayer.update_conv_state
    with traceable_linear_attention(tiny_model("llama"), "cpu"):
        assert LinearAttentionLayer.update_conv_state is before


@every_family
@torch.no_grad()
def test_a_layer_made_of_states_goes_on_where_transformers_own_does(family: str) -> None:
    model, ids = hybrid(family), token_ids(2, 12)
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for cache in (ours, theirs):
        model(ids[:, :6], past_key_values=cache)
    for index in (0, 1):
        states = cache_states(ours)[2 * index : 2 * index + 2]
        ours.layers[index] = build_cache(["past.0.conv", "past.0.recurrent"], states).layers[0]
        assert ours.layers[index].conv_states[0].shape[-1] == KERNEL - 1
    for new in (slice(6, 7), slice(7, 12)):
        logits = [model(ids[:, new], past_key_values=cache).logits for cache in (ours, theirs)]
        assert logits[0].shape == (2, new.stop - new.start, VOCABULARY)
        assert torch.allclose(*logits, rtol=0, atol=1e-4)
