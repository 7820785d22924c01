"""Queries, keys, values, decays and rates -> the gated delta rule, in forms whose graph is right at every length.

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = S_t^T q_t

S is the state `[Dk, Dv]` of one head. transformers unrolls a loop over the tokens or chunks of its example; a graph made
of that is wrong for every other length. Source: Yang et al., Gated Delta Networks, https://arxiv.org/abs/2412.06464.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

CHUNK = 64  # as in transformers and fla
_SIZES = (1, 2, 4, 8, 16, 32, CHUNK)


def operator_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule as ONNX Runtime's own operator, com.microsoft::LinearAttention: for tracing, it computes nothing itself.

    Takes and returns what `chunked_delta_rule` does. Float32 on every provider: the CPU kernel has nothing else, and the
    CUDA kernel takes the state to be of the type of the values.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.LinearAttention
    """
    batch, length, heads, size = value.shape
    output, state = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        [tensor.flatten(2) for tensor in (query, key, value)] + [state, decay, beta],
        {"q_num_heads": key.shape[2], "kv_num_heads": heads, "update_rule": "gated_delta", "scale": key.shape[3] ** -0.5},
        dtypes=(value.dtype, state.dtype),
        shapes=((batch, length, heads * size), state.shape),
        version=1,
    )
    return output.view(value.shape), state


def chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule in chunks of C = min(T, 64) tokens: matrix products within a chunk, a scan over the chunks.

    Args:
        query, key: `[B, T, Hk, Dk]` float32 of length 1; a head serves the next Hv / Hk heads of values.
        value: `[B, T, Hv, Dv]` float32.
        decay: `[B, T, Hv]` float32, g <= 0.
        beta: `[B, T, Hv]` float32, in [0, 2].
        state: `[B, Hv, Dk, Dv]` float32, S before the first token.

    Returns:
        The output of queries scaled by 1 / sqrt(Dk), `[B, T, Hv, Dv]`, and S after the last token.
    """
    batch, length, heads, key_size = key.shape
    groups = value.shape[2] // heads
    chunk = torch.sym_min(length, CHUNK)
    padding = -length % chunk

    def chunks(tensor: Tensor) -> Tensor:
        """`[B, T, Hk, G, D]` -> `[chunks, B, Hk, G, C, D]`; zeros at the end, rate 0 and decay 1, change no state."""
        tensor = F.pad(tensor, [0, 0, 0, 0, 0, 0, 0, padding])
        return tensor.reshape(batch, -1, chunk, *tensor.shape[2:]).permute(1, 0, 3, 4, 2, 5)

    place = torch.arange(chunk, device=value.device)
    future, identity, pairs = place[:, None] < place, place[:, None] == place, _pairs(place)

    def step(state: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        query, key, value, decay, beta = tokens
        total = decay.cumsum(-2)
        between = (total - total.mT).masked_fill(future, -torch.inf).exp()
        inverse = _unit_inverse(beta * (key @ key.mT) * between, identity, pairs)
        # What each token writes, once what the state and the tokens before it already say is taken off.
        written = inverse @ (beta * (value - total.exp() * (key @ state)))
        output = total.exp() * (query @ state) + ((query @ key.mT) * between) @ written
        left = total[..., -1:, :]
        return left.exp() * state + ((left - total).exp() * key).mT @ written, output

    tokens = [query.unsqueeze(3) * key_size**-0.5, key.unsqueeze(3)]
    tokens += [tensor.unflatten(2, (heads, groups)) for tensor in (value, decay.unsqueeze(3), beta.unsqueeze(3))]
    state, output = scan(step, state.unflatten(1, (heads, groups)), [chunks(tensor) for tensor in tokens])
    output = output.permute(1, 0, 4, 2, 3, 5).reshape(batch, -1, *value.shape[2:])
    return output[:, :length].reshape(value.shape), state.flatten(1, 2)


def _pairs(place: Tensor) -> Tensor:
    """For blocks of 1, 2, 4 .. 32 tokens, where row and column lie in neighbours of a pair: `[6, C, C]` bool."""
    block = (place / torch.tensor(_SIZES, device=place.device)[:, None]).floor()
    row, column = block[:, :, None], block[:, None, :]
    return (row[:-1] > column[:-1]) & (row[1:] == column[1:])


def _unit_inverse(matrix: Tensor, identity: Tensor, pairs: Tensor) -> Tensor:
    """The inverse of I + (strictly lower part of `matrix [.., C, C]`), C at most 64, by block elimination.

    The inverses of two neighbouring diagonal blocks give that of the block they make: T <- T - T offdiagonal T. Every
    factor is a part of the result. The usual product of I + (-A)^(2^i) goes through powers of A instead, which reach
    1e18 when keys are alike, while the inverse stays around 1.
    """
    inverse = identity.to(matrix.dtype) - matrix.where(pairs[0], 0.0)
    for pair in pairs[1:].unbind():
        inverse = inverse - inverse @ matrix.where(pair, 0.0) @ inverse
    return inverse
