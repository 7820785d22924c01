"""Linear-attention layers of hybrid models -> one graph for prefill and decode, with their states as flat tensors.

While a model is traced, its gated delta rule and the convolution before it are replaced by nodes that are right for any
number of new tokens: transformers picks another formula for one token, and unrolls a loop over the chunks of the
example. The models' own forward stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionLayer
from transformers.exporters.utils import patch_attributes

from cdsurgery.errors import UnsupportedModelError
from cdsurgery.export.graph.delta_rule import DOMAIN, NAME
from cdsurgery.export.options import Target

# The names that qwen3_5, qwen3_5_moe, qwen3_next and olmo_hybrid have for them in transformers 5.23:
# https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen3_5/modeling_qwen3_5.py#L254
RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
CONVOLUTION = "causal_conv1d_fn"


@contextmanager
def traceable_linear_attention(model: nn.Module, target: Target) -> Iterator[None]:
    """Inside, a model with gated delta rule layers can be traced, not run; on leaving, it is as it was.

    Trace it with two or more new tokens and a cache of `build_cache`. The graph is then right for one token too, and
    from an empty past. Another model is left alone.

    Args:
        target: "cpu" and "cuda" leave ONNX Runtime's operators in the graph (com.microsoft::LinearAttention and
            CausalConvWithState), "portable" a Conv and a node that `expand_delta_rule` replaces by standard ones.
    """
    modules = _modules(model)
    rule, convolution = _delta_rule(target), _convolution(target)
    patches: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (module, name, lambda _: rule) for module in modules for name in RULES
    ]
    patches += [(module, CONVOLUTION, lambda _: convolution) for module in modules]
    if modules:
        patches.append((LinearAttentionLayer, "update_conv_state", lambda _: _keep_conv_state))
        patches.append((LinearAttentionLayer, "update_recurrent_state", lambda _: _set_recurrent_state))
    with patch_attributes(patches):
        yield


def check_linear_attention(model: nn.Module) -> None:
    """Refuse a model whose linear attention is of another kind than the gated delta rule.

    Raises:
        UnsupportedModelError: its states would be right for the lengths of the example only.
    """
    if not _modules(model):
        raise UnsupportedModelError(
            f"This {type(model).__name__} keeps convolution or recurrent states, and its layers have no gated delta "
            "rule. Of linear attention that is the one kind that can be exported (qwen3_5, qwen3_next, olmo_hybrid)."
        )


def _modules(model: nn.Module) -> list[ModuleType]:
    """The modelling modules of a model's layers that have a gated delta rule."""
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in sorted(names) if all(rule in vars(sys.modules[name]) for rule in RULES)]


def _delta_rule(target: Target) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, H, D]` of any dtype, as transformers calls it; float32 inside, as there.

        On every provider: the CPU kernel has nothing else, the CUDA kernel takes state and values to be of one type.
        """
        batch, length, heads, size = value.shape
        query, key, values, g, beta = (tensor.float() for tensor in (query, key, value, g, beta))
        if use_qk_l2norm_in_kernel:
            query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        if initial_state is None:
            initial_state = values.new_zeros(batch, heads, key.shape[-1], size)
        if target == "portable":
            operator, attributes = f"{DOMAIN}::{NAME}", {}
            tensors, shape = [query, key, values, g, beta, initial_state], [batch, length, heads, size]
        else:
            # https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.LinearAttention
            operator = "com.microsoft::LinearAttention"
            attributes = {"q_num_heads": key.shape[2], "kv_num_heads": heads, "update_rule": "gated_delta"}
            attributes["scale"] = key.shape[3] ** -0.5
            tensors = [tensor.flatten(2) for tensor in (query, key, values)] + [initial_state, g, beta]
            shape = [batch, length, heads * size]
        output, state = _node(operator, tensors, attributes, shape, initial_state.shape)
        return output.view(value.shape).to(value.dtype), state if output_final_state else None

    return gated_delta_rule


@dataclass
class _Window:
    """What `update_conv_state` returns and `causal_conv1d_fn` takes: new tokens `[B, C, T]`, and the layer that has
    the ones before them. Only the convolution knows how to go on from there."""

    layer: LinearAttentionLayer
    tokens: Tensor


def _keep_conv_state(layer: LinearAttentionLayer, tokens: Tensor, *_: Any, **__: Any) -> _Window:
    """For the convolution to set."""
    return _Window(layer, tokens)


def _set_recurrent_state(layer: LinearAttentionLayer, state: Tensor, *_: Any, **__: Any) -> Tensor:
    """Not in place: the state is an input of the graph."""
    layer.recurrent_states[0] = state
    return state


def _convolution(target: Target) -> Callable[..., Tensor]:
    def causal_conv1d(
        window: _Window, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        """Weights `[C, kernel]` over a window -> `[B, C, T]`, every channel alone; the layer gets its new state."""
        past, tokens, weight = window.layer.conv_states[0], window.tokens, weight.unsqueeze(1)
        assert past is not None
        dtype = tokens.dtype
        if target == "portable":
            seen = torch.cat([past, tokens], dim=-1)
            state = seen[..., 1 - weight.shape[-1] :]
            output = F.conv1d(seen, weight, bias, groups=weight.shape[0])
        else:
            tensors: list[Tensor | None] = [tokens, weight, bias, past]
            if target == "cpu":  # whose kernel is float32 only
                tensors = [tensor if tensor is None else tensor.float() for tensor in tensors]
            # https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.CausalConvWithState
            fused = activation in ("silu", "swish")
            attributes = {"activation": "silu" if fused else "none"}
            operator = "com.microsoft::CausalConvWithState"
            output, state = _node(operator, tensors, attributes, tokens.shape, past.shape)
            activation = None if fused else activation
        window.layer.conv_states[0] = state.to(dtype)
        return (output if activation is None else ACT2FN[activation](output)).to(dtype)

    return causal_conv1d


def _node(operator: str, tensors: list[Any], attributes: dict[str, Any], *shapes: Any) -> Any:
    """One ONNX node for the graph, whose outputs have these shapes and the dtype of its first input."""
    dtypes = [tensors[0].dtype] * len(shapes)
    return torch.onnx.ops.symbolic_multi_out(operator, tensors, attributes, dtypes=dtypes, shapes=shapes, version=1)
