"""Ways to run `unembed_sums`, and what is true of its sums: literal loops in float64 over all logits.

Inputs are such that every product, and every sum of them, is a float32 number, in whatever order it is added up: then
logits are the same bits everywhere, in half precision too, and no tolerance has to hide what the products lose.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cdsurgery.kernels.unembed_sums
from cdsurgery.kernels.unembed_sums import Sums, unembed_sums

pytest.importorskip("triton", reason="Triton is for Linux only")
from cdsurgery.kernels import launch as launching

NAN, INF = float("nan"), float("inf")
has_gpu = torch.cuda.is_available()
# A few roundings of float32. A GPU's e^u is 2^(u log2 e) with the product rounded: at u = -30 that alone is 1.3e-6.
RELATIVE = 1e-5 if has_gpu else 1e-6


def number(active: int | None, state: Tensor) -> Tensor | None:
    """As `unembed_sums` takes it."""
    return None if active is None else torch.tensor(active, device=state.device)


def kernel(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    widened: bool = False,
    counted: int | None = None,
    written: int | None = None,
    active: int | None = None,
) -> Sums:
    """The kernel, in Triton's interpreter or on a GPU; as `unembed_sums`, with everything left where it runs."""
    products = state.new_empty((len(state) if written is None else written, len(weight)))
    if state.is_cuda:
        running: Any = nullcontext()
    else:
        from interpreter import interpreted

        running = interpreted()
    with running:
        counted = len(weight) if counted is None else counted
        some = number(active, state)
        return *launching.launch(state, weight, bias, scale, softcap, widened, counted, some, products), products


def operator(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    widened: bool = False,
    counted: int | None = None,
    written: int | None = None,
    active: int | None = None,
) -> Sums:
    """`unembed_sums` itself, where its tensors are."""
    counted, written = len(weight) if counted is None else counted, len(state) if written is None else written
    return unembed_sums(state, weight, bias, scale, softcap, widened, counted, written, number(active, state))


def in_pytorch(*given: Any, **options: Any) -> Sums:
    """The implementation for the CPU, with the vocabulary in blocks of 100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cdsurgery.kernels.unembed_sums, "CPU_LOGITS", 100 * len(given[0]))
        return operator(*given, **options)


def on_gpu(*given: Any, **options: Any) -> Sums:
    """The operator on a GPU."""
    given = tuple(one.cuda() if isinstance(one, Tensor) else one for one in given)
    return tuple(tensor.cpu() for tensor in operator(*given, **options))


WAYS = [
    pytest.param(kernel, id="interpreter", marks=pytest.mark.skipif(has_gpu, reason="kernels are compiled here")),
    pytest.param(in_pytorch, id="pytorch"),
    pytest.param(
        on_gpu, id="gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not has_gpu, reason="needs a CUDA device")]
    ),
]
ways = pytest.mark.parametrize("way", WAYS)


@dataclass(frozen=True)
class Truth:
    """Of one row of logits, by loops over Python's floats, which are float64."""

    maximum: float
    index: int
    s: float
    t: float
    entropy: float


def truth(row: list[float]) -> Truth:
    broken = [place for place, z in enumerate(row) if math.isnan(z)]
    index = broken[0] if broken else max(range(len(row)), key=lambda place: (row[place], -place))
    if broken or math.isinf(row[index]):
        return Truth(row[index], index, NAN, NAN, NAN)
    u = [z - row[index] for place, z in enumerate(row) if place != index and z != -INF]
    s, t = math.fsum(map(math.exp, u)), math.fsum(math.exp(one) * one for one in u)
    return Truth(row[index], index, s, t, math.log1p(s) - t / (1 + s))


def check(found: Sums, logits: Tensor) -> Tensor:
    """The sums of every row of logits; returns its true entropies."""
    measured, maximum, index, s, t, _ = found
    assert {one.dtype for one in (measured, maximum, s, t)} == {torch.float32} and index.dtype == torch.int64
    # PyTorch refuses an operator on a GPU whose results share memory, and does not ask one on a CPU.
    places = [one.untyped_storage().data_ptr() for one in found if one.numel()]
    assert len(set(places)) == len(places)
    assert torch.equal(index, logits.float().argmax(-1))
    entropies = []
    for row, z in enumerate(logits.double().tolist()):
        true = truth(z)
        assert maximum[row].item() == true.maximum or math.isnan(true.maximum)
        assert index[row] == true.index
        assert measured[row].item() == pytest.approx(true.entropy, rel=RELATIVE, nan_ok=True)
        if not math.isnan(true.entropy):
            assert s[row].item() == pytest.approx(true.s, rel=RELATIVE, abs=1e-30)
            assert t[row].item() == pytest.approx(true.t, rel=RELATIVE, abs=1e-30)
        entropies.append(true.entropy)
    return torch.tensor(entropies, dtype=torch.float64)


def exact_inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Quarters up to 2: sums of up to 2^16 of their products are float32 numbers."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(-8, 9, (rows, width), generator=generator) / 4
    weight = torch.randint(-8, 9, (vocabulary, width), generator=generator) / 4
    return state.to(dtype), weight.to(dtype)


def of_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A state and a weight whose product is `logits` `[R, V]`, exactly: every row of the state picks a column."""
    return torch.eye(len(logits), dtype=logits.dtype), logits.T.contiguous()


def check_written(found: Sums, products: Tensor) -> None:
    """The products of the first rows, every bit."""
    torch.testing.assert_close(found[-1], products[: len(found[-1])], rtol=0, atol=0, equal_nan=True)


def product(state: Tensor, weight: Tensor) -> Tensor:
    """`linear`, rounded once, from float64."""
    return (state.double() @ weight.double().T).float().to(state.dtype)
