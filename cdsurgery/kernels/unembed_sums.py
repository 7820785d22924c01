"""Rows and an unembedding -> maximum, its index, s and t of each row's logits: `cdsurgery::unembed_sums` in PyTorch.

A custom operator, so that `torch.compile` and `torch.export` take it as it is. On a GPU it is a kernel in Triton's
language, which keeps the logits in registers; on a CPU it is PyTorch, a few columns at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from cdsurgery.entropy import CACHED_LOGITS, entropy_of_sums, merged_sums, partial_sums
from cdsurgery.errors import InvalidInputError, SurgeryError
from cdsurgery.unembedding import few_rows_linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Logits that the CPU holds at a time: 1 MB in float32, so that what is made of them stays in a core's cache.
CPU_LOGITS = CACHED_LOGITS

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "cdsurgery::unembed_sums",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor state, Tensor weight, Tensor? bias, float scale, float? softcap, bool widened, SymInt counted,"
    " SymInt written, Tensor? active=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def unembed_sums(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    widened: bool,
    counted: int,
    written: int,
    active: Tensor | None = None,
) -> Sums:
    """The entropies of `softcap * tanh(scale * linear(state, weight, bias) / softcap)`, and what they are made of.

    Products are added up in float32. What `linear` returns is rounded to the dtype of the weights, as is every step
    after it, as in a model that takes these steps one by one.

    Args:
        state: `[R, D]`, float32, float16 or bfloat16.
        weight: `[V, D]` of that dtype, its rows contiguous.
        bias: `[V]` of that dtype, contiguous, or None.
        scale: what `linear`'s result is multiplied by.
        softcap: None leaves the logits as they are.
        widened: whether the steps after `linear` are taken in float32.
        counted: in [1, V], how many entries of the vocabulary are measured; those behind are padding.
        written: in [0, R], of how many of the first rows `linear`'s result is returned too.
        active: `[]` int64 where the state is, in [0, R]: how many of the first rows count, None for all. It is a tensor
            so that nobody waits for it: a step that does not know yet how many rows it will find to do can be captured.

    Returns:
        entropy `[R]` float32 in nats; maximum, index, s and t, `[R]`: float32, int64 (the lowest of equal ones, as
        `argmax` gives it), float32 and float32, as `partial_sums` defines them; and `linear`'s result `[written, V]`.
        Behind the active rows index is 0, the other numbers are NaN, and what stands in `linear`'s result is anything.

    Raises:
        InvalidInputError: tensors of other shapes, dtypes or strides.
        SurgeryError: they are on a GPU, and Triton is not installed.
    """
    _check(state, weight, bias, counted, written, active)
    products, rest = _products(state, weight, written), 0
    if active is not None:
        rest = len(state) - int(active)
        state = state[: int(active)]
    step = max(1, CPU_LOGITS // max(1, len(state)))
    multiply = few_rows_linear if state.dtype == torch.float32 else linear
    blocks = -(-counted // step)
    # Made before the blocks, as in `partial_sums`.
    index = state.new_empty((blocks, len(state)), dtype=torch.int64)
    sums = state.new_empty((3, blocks, len(state)), dtype=torch.float32)
    for block, begin in enumerate(range(0, len(weight), step)):
        columns = slice(begin, begin + step)
        z = multiply(state, weight[columns], None if bias is None else bias[columns])
        products[: len(z), columns] = z[:written]
        if begin >= counted:
            continue
        z = z[:, : counted - begin]
        if widened:
            z = z.float()
        if scale != 1:
            z = z * scale
        if softcap is not None:
            z = torch.tanh(z / softcap) * softcap
        index[block] = z.float().argmax(dim=-1) + begin
        for kind, part in enumerate(partial_sums(z)):
            sums[kind, block] = part
    maximum, s, t = sums
    index = index.gather(0, maximum.argmax(dim=0, keepdim=True)).squeeze(0)
    maximum, s, t = (pad(part, (0, rest), value=float("nan")) for part in merged_sums(maximum, s, t))
    return entropy_of_sums(maximum, s, t), maximum, pad(index, (0, rest)), s, t, products


@unembed_sums.register_kernel("cuda")
def _on_gpu(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    widened: bool,
    counted: int,
    written: int,
    active: Tensor | None = None,
) -> Sums:
    _check(state, weight, bias, counted, written, active)
    try:
        from cdsurgery.kernels.launch import launch
    except ImportError as error:
        raise SurgeryError(
            f"scan='fused' runs a kernel in Triton's language on a GPU, and Triton cannot be imported ({error}). "
            "PyTorch's CUDA builds for Linux bring it; else: pip install triton. Or use scan='full'."
        ) from error
    products = _products(state, weight, written)
    return *launch(state, weight, bias, scale, softcap, widened, counted, active, products), products


@unembed_sums.register_fake
def _shapes(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    widened: bool,
    counted: int,
    written: int,
    active: Tensor | None = None,
) -> Sums:
    _check(state, weight, bias, counted, written, active)
    entropy, maximum, s, t = (state.new_empty(state.shape[0], dtype=torch.float32) for _ in range(4))
    index = state.new_empty(state.shape[0], dtype=torch.int64)
    return entropy, maximum, index, s, t, _products(state, weight, written)


def _products(state: Tensor, weight: Tensor, written: int) -> Tensor:
    return state.new_empty((written, weight.shape[0]))


def _check(
    state: Tensor, weight: Tensor, bias: Tensor | None, counted: int, written: int, active: Tensor | None
) -> None:
    given = [state, weight] if bias is None else [state, weight, bias]
    fits = state.ndim == weight.ndim == 2 and state.shape[1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    alike = {tensor.dtype for tensor in given} == {weight.dtype} and weight.dtype in DTYPES
    if not fits or not alike or any(tensor.stride(-1) != 1 for tensor in given[1:]):
        found = ", ".join(f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}" for tensor in given)
        raise InvalidInputError(
            f"unembed_sums got {found}. It takes a state [R, D], a weight [V, D] and a bias [V] or None, of one dtype "
            "among float32, float16 and bfloat16; the last axis of weight and bias is contiguous."
        )
    if not (1 <= counted <= weight.shape[0] and 0 <= written <= state.shape[0]):
        raise InvalidInputError(
            f"unembed_sums got counted={counted} and written={written}. It measures 1 to {weight.shape[0]} entries of "
            f"this vocabulary, and writes the products of 0 to {state.shape[0]} of these rows."
        )
    if active is not None and (active.dtype, active.shape, active.device) != (torch.int64, (), state.device):
        raise InvalidInputError(
            f"unembed_sums got active as {list(active.shape)} {active.dtype} on {active.device}. It takes one int64 "
            f"number [] on {state.device}, where the state is."
        )
