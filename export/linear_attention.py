"""Hybrid models' linear-attention layers -> one graph for prefill and decode, and states as flat tensors.

For tracing only, the gated delta rule and the convolution before it are replaced by forms that are right for any number
of new tokens. A state of zeros is an empty past.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionLayer
from transformers.exporters.utils import patch_attributes

from cdsurgery.export.delta_rule import chunked_delta_rule, operator_delta_rule

Target = Literal["portable", "cpu", "cuda"]

# What transformers 5.23 calls them in each modelling module (qwen3_5, qwen3_5_moe, qwen3_next, olmo_hybrid):
# https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen3_5/modeling_qwen3_5.py
DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
CONVOLUTION = "causal_conv1d_fn"


@contextmanager
def traceable_linear_attention(target: Target) -> Iterator[None]:
    """Inside, a model with gated delta rule layers can be traced; on leaving, it is as it was.

    Trace with more than one new token and with a cache made of `linear_layer`: the graph is then right for one token
    as well, and from an empty past.

    Args:
        target: "cpu" and "cuda" make ONNX Runtime's operators of each layer (com.microsoft LinearAttention and
            CausalConvWithState), "portable" an ai.onnx Conv and Scan.
    """
    delta_rule, convolution = _delta_rule(target), _convolution(target)
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and all(name in vars(module) for name in DELTA_RULES)
    ]
    patches = [(module, name, lambda _: delta_rule) for module in modules for name in DELTA_RULES]
    patches += [(module, CONVOLUTION, lambda _: convolution) for module in modules]
    with patch_attributes(patches):
        yield


def _delta_rule(target: Target) -> Callable[..., tuple[Tensor, Tensor | None]]:
    rule = chunked_delta_rule if target == "portable" else operator_delta_rule

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
        """What transformers calls: `[B, T, H, D]` in any dtype; the rule itself is float32, as there."""
        dtype = value.dtype
        query, key, value, g, beta = (tensor.float() for tensor in (query, key, value, g, beta))
        if use_qk_l2norm_in_kernel:
            query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        if initial_state is None:
            batch, _, heads, size = value.shape
            initial_state = value.new_zeros(batch, heads, key.shape[-1], size)
        output, state = rule(query * key.shape[-1] ** -0.5, key, value, g, beta, initial_state.float())
        return output.to(dtype), state if output_final_state else None

    return gated_delta_rule


def _convolution(target: Target) -> Callable[..., Tensor]:
    def causal_conv1d(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        """`[B, C, T]` and weights `[C, kernel]` -> `[B, C, T]`: each channel alone, zeros before the first token."""
        dtype, size = hidden_states.dtype, weight.shape[-1]
        weight = weight.unsqueeze(1)
        if target == "portable":
            padded = F.pad(hidden_states.to(weight.dtype), [size - 1, 0])
            output = F.conv1d(padded, weight, bias, groups=weight.shape[0])
        else:
            if target == "cpu":  # the only kernel there is
                hidden_states, weight, bias = (x if x is None else x.float() for x in (hidden_states, weight, bias))
            shape = hidden_states.shape
            output, _state = torch.onnx.ops.symbolic_multi_out(
                "com.microsoft::CausalConvWithState",
                (hidden_states, weight, bias),
                {"activation": "silu" if activation in ("silu", "swish") else "none"},
                dtypes=(hidden_states.dtype,) * 2,
                shapes=(shape, (*shape[:2], size - 1)),
                version=1,
            )
            if activation in ("silu", "swish"):
                activation = None
        return (output if activation is None else ACT2FN[activation](output)).to(dtype)

    return causal_conv1d


def linear_layer(conv_state: Tensor, recurrent_state: Tensor) -> LinearAttentionLayer:
    layer = LinearAttentionLayer()
    layer.device, layer.dtype = conv_state.device, conv_state.dtype
    layer.conv_states[0], layer.recurrent_states[0] = conv_state.clone(), recurrent_state.float().clone()
    layer.conv_kernel_size[0] = conv_state.shape[-1]
    layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
    layer.has_previous_state[0] = True
    return layer


def linear_states(layer: LinearAttentionLayer) -> tuple[Tensor, Tensor]:
    conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
    return conv, recurrent
