"""`unembed_sums`, in PyTorch and as a kernel, against literal loops in float64 over all logits.

Inputs are such that every product, and every sum of them, is a float32 number, in whatever order it is added up: then
logits are the same bits everywhere, in half precision too, and no tolerance has to hide what the products lose.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cdsurgery.kernels.unembed_sums
from cdsurgery import InvalidInputError, SurgeryError
from cdsurgery.entropy import entropy_of_sums
from cdsurgery.kernels.unembed_sums import Sums, unembed_sums

pytest.importorskip("triton", reason="Triton is for Linux only")
from cdsurgery.kernels import launch as launching

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROOT = Path(__file__).resolve().parent.parent
has_gpu = torch.cuda.is_available()
# A few roundings of float32. A GPU's e^u is 2^(u log2 e) with the product rounded: at u = -30 that alone is 1.3e-6.
RELATIVE = 1e-5 if has_gpu else 1e-6


def kernel(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    write: bool = True,
) -> Sums:
    """The kernel, in Triton's interpreter or on a GPU; as `unembed_sums`, with everything left where it runs."""
    logits = state.new_empty((len(state) if write else 0, len(weight)), dtype=dtype or state.dtype)
    if state.is_cuda:
        running: Any = nullcontext()
    else:
        from interpreter import interpreted

        running = interpreted()
    with running:
        return *launching.launch(state, weight, bias, scale, softcap, logits), logits


def in_pytorch(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    write: bool = True,
) -> Sums:
    """The implementation for the CPU, with the vocabulary in blocks of 100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cdsurgery.kernels.unembed_sums, "CPU_LOGITS", 100 * len(state))
        return unembed_sums(state, weight, bias, scale, softcap, dtype or state.dtype, write)


def on_gpu(*given: Any, **options: Any) -> Sums:
    """The operator on a GPU."""
    given = tuple(one.cuda() if isinstance(one, Tensor) else one for one in given)
    return tuple(tensor.cpu() for tensor in kernel(*given, **options))


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
    """Every number of every row, and that the logits are those; returns the true entropies."""
    maximum, index, s, t, written = found
    assert (maximum.dtype, index.dtype, s.dtype, t.dtype) == (torch.float32, torch.int64, torch.float32, torch.float32)
    if len(written):
        torch.testing.assert_close(written, logits, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index, logits.float().argmax(-1))
    measured = entropy_of_sums(maximum, s, t)
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


def product(state: Tensor, weight: Tensor) -> Tensor:
    """`linear`, rounded once, from float64."""
    return (state.double() @ weight.double().T).float().to(state.dtype)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 33, 300), (2, 64, 128), (11, 71, 257), (17, 128, 131), (70, 65, 200)]
)
def test_sums_of_awkward_sizes(
    way: Callable[..., Sums], rows: int, width: int, vocabulary: int, dtype: torch.dtype
) -> None:
    state, weight = exact_inputs(rows, width, vocabulary, dtype)
    found = way(state, weight)
    assert found[-1].shape == (rows, vocabulary)
    entropies = check(found, product(state, weight))
    assert rows == 1 or entropies.min() < 0.1 * entropies.max()
    dry = way(state, weight, write=False)
    assert dry[-1].shape == (0, vocabulary)
    for one, other in zip(found[:4], dry[:4], strict=True):
        assert torch.equal(one, other)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_model_does_to_its_logits_is_rounded_where_it_rounds(
    way: Callable[..., Sums], dtype: torch.dtype
) -> None:
    state, weight = exact_inputs(5, 40, 150, dtype)
    bias = (torch.randint(-8, 9, (150,), generator=torch.Generator().manual_seed(1)) / 4).to(dtype)
    z = (state.double() @ weight.double().T + bias.double()).float().to(dtype)
    # A product with a float32 number and a rounding, as PyTorch does it in half precision.
    check(way(state, weight, bias), z)
    scaled = (z.float() * torch.tensor(0.7)).to(dtype)
    check(way(state, weight, bias, 0.7), scaled)
    capped = (torch.tanh((scaled.float() / 8).to(dtype).double()).to(dtype).float() * 8).to(dtype)
    found = way(state, weight, bias, 0.7, 8.0)
    assert (capped.abs() < 8).float().mean() > 0.2
    # tanh of float32 is a few units of 6e-8 off, times 8; in half precision that may round to a neighbour, once in
    # thousands.
    apart = (found[-1].float() - capped.float()).abs()
    assert apart.max() <= (2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * 8)
    assert (apart > 2e-6).float().mean() < 0.01
    check(found, found[-1])
    # A model that widens its logits caps them in float32.
    wide = (torch.tanh(z.double() / 8) * 8).float()
    found = way(state, weight, bias, 1.0, 8.0, torch.float32)
    torch.testing.assert_close(found[-1], wide, rtol=0, atol=2e-6)
    check(found, found[-1])


@ways
def test_a_softcap_keeps_the_digits_of_small_and_of_large_logits(way: Callable[..., Sums]) -> None:
    rows = torch.stack([torch.logspace(-6, 3, 200), torch.linspace(-6, 6, 200)])
    *_, written = way(*of_logits(rows), softcap=8.0)
    true = torch.tanh(rows.double() / 8) * 8
    # Some units of 6e-8: of the quotient, of the polynomial or e^2x, and of the product.
    torch.testing.assert_close(written.double(), true, rtol=5e-7, atol=0)


@ways
def test_products_in_float32_have_all_its_digits(way: Callable[..., Sums]) -> None:
    generator = torch.Generator().manual_seed(3)
    state, weight = torch.randn(3, 70, generator=generator), torch.randn(200, 70, generator=generator)
    logits = state.double() @ weight.double().T
    *_, written = found = way(state, weight)
    # Sums of 70 products of size 1, and not of TensorFloat-32's ten bits, which would be off by 1e-2.
    torch.testing.assert_close(written.double(), logits, rtol=0, atol=1e-5)
    for row, measured in enumerate(entropy_of_sums(found[0], *found[2:4])):
        assert measured.item() == pytest.approx(truth(logits[row].tolist()).entropy, rel=2e-5)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_their_entropy_down_to_1e_7_nats(way: Callable[..., Sums], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(24, 300, generator=generator)
    place = torch.randint(300, (24, 1), generator=generator)
    rise = torch.linspace(0, math.log(300) + 21, 24)[:, None]
    rows = rows.scatter(-1, place, rows.amax(-1, keepdim=True) + rise).to(dtype)
    entropies = check(way(*of_logits(rows)), rows)
    assert entropies.min() < 1e-7
    assert entropies.max() > 1


@ways
@pytest.mark.parametrize("within_a_tile", [True, False])
def test_what_rounding_loses_below_the_maximum_is_given_back(way: Callable[..., Sums], within_a_tile: bool) -> None:
    # As in test_entropy.py: all entries but one are equal, so that what they lose does not average out. At u = -16 to
    # -24 half a unit in the last place is 1e-6.
    top, rest = torch.rand(2, 20, 1, generator=torch.Generator().manual_seed(2))
    vocabulary = 100 if within_a_tile else 300
    rows = torch.cat([top + torch.linspace(16, 23, 20)[:, None], -rest.expand(20, vocabulary - 1)], dim=-1)
    bias = torch.zeros(vocabulary)
    if not within_a_tile:
        bias[1:128] = -INF  # the maximum has a tile for itself, and the others have tiles without it
    _, _, s, t, _ = found = way(*of_logits(rows), bias)
    check(found, rows + bias)
    for row, z in enumerate((rows + bias).double().tolist()):
        true = truth(z)
        # Some roundings of 6e-8: of e^u, of what is given back, and of sums.
        assert s[row].item() == pytest.approx(true.s, rel=RELATIVE / 4)
        assert t[row].item() == pytest.approx(true.t, rel=RELATIVE / 2)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_maxima_the_lowest_is_the_one(way: Callable[..., Sums], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(-5, 3, (8, 300), generator=generator).to(dtype)
    rows[1] = 2  # all of them
    rows[2], rows[3], rows[4], rows[5] = -4, -4, -4, -4
    rows[2, [0, 299]], rows[3, [127, 128]], rows[4, [130, 256]], rows[5, [250, 251]] = 9, 9, 9, 9
    found = way(*of_logits(rows))
    check(found, rows)
    assert found[1][1:6].tolist() == [0, 0, 127, 130, 250]
    assert found[2][1].item() == 299


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_overflow_are_nan_and_leave_their_neighbours_alone(
    way: Callable[..., Sums], dtype: torch.dtype
) -> None:
    huge = 6e4 if dtype == torch.float16 else 3e38
    state, weight = exact_inputs(9, 33, 300, dtype)
    state[:, :4] = 0
    weight[:, 0] = -2  # excludes everything
    weight[:, 1] = 0  # +inf at one place
    weight[270, 1] = 2
    weight[:, 2] = 0  # excludes a third, the first tile's first and the last one's last among them
    weight[::3, 2] = -2
    weight[299, 2] = -2
    weight[:, 3] = -2  # leaves one
    weight[140, 3] = 0
    for column, row in enumerate((1, 3, 5, 7)):
        state[row, column] = huge
    state[8, 10] = NAN
    rows = product(state, weight)
    assert rows.isinf().sum(-1).tolist() == [0, 300, 0, 1, 0, 101, 0, 299, 0]
    found = way(state, weight)
    entropies = check(found, rows)
    assert entropies.isnan().tolist() == [False, True, False, True, False, False, False, False, True]
    assert entropies[7] == 0
    assert entropy_of_sums(found[0], *found[2:4])[7] == 0


@ways
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", [0, 127, 128, 299])
def test_a_bad_entry_is_seen_wherever_it_stands(way: Callable[..., Sums], place: int, bad: float) -> None:
    state, weight = exact_inputs(3, 8, 300, torch.float32)
    state[1] = 0  # all of its entries are equal but for the bad one
    bias = torch.zeros(300)
    bias[place] = bad
    found = way(state, weight, bias)
    entropies = check(found, product(state, weight) + bias)
    assert entropies.isnan().all() == (bad != -INF)


@ways
def test_tiles_that_are_all_excluded_count_nothing(way: Callable[..., Sums]) -> None:
    state, weight = exact_inputs(3, 16, 400, torch.float32)
    for kept in (slice(0, 100), slice(130, 250), slice(390, 400)):
        bias = torch.full((400,), -INF)
        bias[kept] = 0
        check(way(state, weight, bias), product(state, weight) + bias)


@pytest.mark.skipif(has_gpu, reason="kernels are compiled here")
@pytest.mark.parametrize("group", [1, 2, 16])
def test_every_block_of_rows_meets_every_tile_in_any_order(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "GROUP", group)
    assert launching.block_of_rows(70, torch.float32)[0] == 32  # three blocks of rows, the last one alone in its group
    state, weight = exact_inputs(70, 16, 200, torch.float32)
    check(kernel(state, weight), product(state, weight))


@pytest.mark.skipif(has_gpu, reason="kernels are compiled here")
def test_rows_of_a_larger_matrix_and_states_that_are_not_contiguous() -> None:
    state, weight = exact_inputs(4, 24, 300, torch.float32)
    wide = torch.full((300, 40), NAN)
    wide[:, :24] = weight
    check(kernel(state.T.contiguous().T, wide[:150, :24]), product(state, weight[:150]))


@ways
def test_no_rows_have_no_sums(way: Callable[..., Sums]) -> None:
    state, weight = exact_inputs(0, 8, 30, torch.float32)
    assert [tuple(tensor.shape) for tensor in way(state, weight)] == [(0,)] * 4 + [(0, 30)]


def test_the_cpu_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    module = cdsurgery.kernels.unembed_sums
    sums = module.partial_sums
    monkeypatch.setattr(module, "partial_sums", lambda logits: (sizes.append(logits.numel()), sums(logits))[1])
    monkeypatch.setattr(module, "CPU_LOGITS", 1000)
    unembed_sums(torch.zeros(7, 4), torch.zeros(500, 4), None, 1.0, None, torch.float32, False)
    assert max(sizes) <= 1000
    assert sum(sizes) == 3500


@pytest.mark.parametrize("write", [False, True])
def test_pytorch_takes_it_for_an_operator_like_its_own(write: bool) -> None:
    state, weight = exact_inputs(3, 8, 30, torch.bfloat16)
    torch.library.opcheck(unembed_sums, (state, weight, None, 1.0, None, torch.bfloat16, write))
    torch.library.opcheck(unembed_sums, (state, weight, weight[:, 0].contiguous(), 0.5, 30.0, torch.float32, write))


def test_it_exports_and_compiles_whole_for_any_number_of_rows() -> None:
    class Head(nn.Module):
        def forward(self, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            _, index, s, _, logits = unembed_sums(state * 2, weight, None, 1.0, None, torch.float32, True)
            return index + 1, logits / (1 + s)[:, None]

    state, weight = exact_inputs(5, 8, 30, torch.float32)
    rows = torch.export.Dim("rows", min=2)
    graph = torch.export.export(Head(), (state, weight), dynamic_shapes=({0: rows}, None)).module()
    compiled = torch.compile(Head(), backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 5, 11):
        state, _ = exact_inputs(size, 8, 30, torch.float32, seed=size)
        for function in (graph, compiled):
            for found, true in zip(function(state, weight), Head()(state, weight), strict=True):
                assert torch.equal(found, true)


MISFITS = {
    "width": (torch.zeros(2, 7), torch.zeros(9, 8), None),
    "axes": (torch.zeros(1, 2, 8), torch.zeros(9, 8), None),
    "no vocabulary": (torch.zeros(2, 8), torch.zeros(0, 8), None),
    "dtypes": (torch.zeros(2, 8).half(), torch.zeros(9, 8), None),
    "float64": (torch.zeros(2, 8).double(), torch.zeros(9, 8).double(), None),
    "bias": (torch.zeros(2, 8), torch.zeros(9, 8), torch.zeros(8)),
    "columns": (torch.zeros(2, 8), torch.zeros(8, 9).T, None),
}


@pytest.mark.parametrize("given", MISFITS.values(), ids=MISFITS.keys())
def test_tensors_that_do_not_fit_are_refused(given: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"unembed_sums got \[.* It takes a state \[R, D\]"):
        unembed_sums(*given, 1.0, None, torch.float32, False)


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "cdsurgery.kernels.tiles", raising=False)
    monkeypatch.delitem(sys.modules, "cdsurgery.kernels.launch", raising=False)
    state, weight = exact_inputs(2, 8, 30, torch.float32)
    with pytest.raises(SurgeryError, match=r"pip install triton. Or use scan='full'"):
        cdsurgery.kernels.unembed_sums._on_gpu(state, weight, None, 1.0, None, torch.float32, False)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """What a launch compiles, by a process in which Triton does not interpret."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "compile_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_compiles_for_gpus_onto_tensor_cores_but_for_float32(binaries: list[Any]) -> None:
    few, many, exact = (measure for measure, _ in binaries)
    assert {merge["name"] for _, merge in binaries} == {"merge_tiles"}
    assert few["instructions"] == ["mma.sync", "cp.async."]
    assert many["instructions"] == ["wgmma.mma_async", "cp.async."]
    assert exact["instructions"] == ["cp.async."]
    # What a program may have on the smallest of today's cards.
    assert all(kernel["shared"] <= 99 * 1024 for launch in binaries for kernel in launch)
