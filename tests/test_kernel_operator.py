"""`unembed_sums` as an operator of PyTorch's: what it refuses, holds, exports to, and compiles to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_truth import exact_inputs
from torch import Tensor, nn

import cdsurgery.kernels.unembed_sums
from cdsurgery import InvalidInputError, SurgeryError
from cdsurgery.kernels.unembed_sums import unembed_sums

ROOT = Path(__file__).resolve().parent.parent


def test_the_cpu_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    module = cdsurgery.kernels.unembed_sums
    sums = module.partial_sums
    monkeypatch.setattr(module, "partial_sums", lambda logits: (sizes.append(logits.numel()), sums(logits))[1])
    monkeypatch.setattr(module, "CPU_LOGITS", 1000)
    unembed_sums(torch.zeros(7, 4), torch.zeros(500, 4), None, 1.0, None, False, 500, 0)
    assert max(sizes) <= 1000
    assert sum(sizes) == 3500


@pytest.mark.parametrize("written", [0, 1, 3])
def test_pytorch_takes_it_for_an_operator_like_its_own(written: int) -> None:
    state, weight = exact_inputs(3, 8, 30, torch.bfloat16)
    torch.library.opcheck(unembed_sums, (state, weight, None, 1.0, None, False, 30, written))
    torch.library.opcheck(unembed_sums, (state, weight, weight[:, 0].contiguous(), 0.5, 30.0, True, 20, written))
    # All rows count, as the check takes no NaN for another.
    torch.library.opcheck(unembed_sums, (state, weight, None, 1.0, None, False, 30, written, torch.tensor(3)))


def test_it_exports_and_compiles_whole_for_any_number_of_rows() -> None:
    class Head(nn.Module):
        def forward(self, state: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            rows = state.shape[0] - 1
            _, _, index, s, _, products = unembed_sums(state * 2, weight, None, 1.0, None, False, 30, rows)
            active = (state[:, 0] > 0).sum()
            some, *_ = unembed_sums(state, weight, None, 1.0, None, False, 30, 0, active)
            return index + 1, products / (1 + s[:rows])[:, None], some.nan_to_num(7)

    state, weight = exact_inputs(5, 8, 30, torch.float32)
    rows = torch.export.Dim("rows", min=3)
    graph = torch.export.export(Head(), (state, weight), dynamic_shapes=({0: rows}, None)).module()
    compiled = torch.compile(Head(), backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 5, 11):
        state, _ = exact_inputs(size, 8, 30, torch.float32, seed=size)
        for function in (graph, compiled):
            for found, true in zip(function(state, weight), Head()(state, weight), strict=True):
                assert torch.equal(found, true)


MISFITS = {
    "width": (torch.zeros(2, 7), torch.zeros(9, 8), None),
    "axes": (torch.zeros(1, 2, 8), torch.zeros(9, 8), None),
    "dtypes": (torch.zeros(2, 8).half(), torch.zeros(9, 8), None),
    "float64": (torch.zeros(2, 8).double(), torch.zeros(9, 8).double(), None),
    "bias": (torch.zeros(2, 8), torch.zeros(9, 8), torch.zeros(8)),
    "columns": (torch.zeros(2, 8), torch.zeros(8, 9).T, None),
}


@pytest.mark.parametrize("given", MISFITS.values(), ids=MISFITS.keys())
def test_tensors_that_do_not_fit_are_refused(given: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"unembed_sums got \[.* It takes a state \[R, D\]"):
        unembed_sums(*given, 1.0, None, False, 9, 0)


@pytest.mark.parametrize(("counted", "written"), [(0, 0), (10, 0), (9, 3), (9, -1)])
def test_counts_beyond_the_tensors_are_refused(counted: int, written: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"counted={counted} and written={written}\. .* 1 to 9 .* 0 to 2 "):
        unembed_sums(torch.zeros(2, 8), torch.zeros(9, 8), None, 1.0, None, False, counted, written)


@pytest.mark.parametrize(
    "active", [torch.tensor(1, dtype=torch.int32), torch.tensor([1]), torch.tensor(1, device="meta")]
)
def test_a_number_of_rows_of_another_kind_is_refused(active: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"unembed_sums got active as \[.* one int64 number \[\] on cpu"):
        unembed_sums(torch.zeros(2, 8), torch.zeros(9, 8), None, 1.0, None, False, 9, 0, active)


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "cdsurgery.kernels.tiles", raising=False)
    monkeypatch.delitem(sys.modules, "cdsurgery.kernels.launch", raising=False)
    state, weight = exact_inputs(2, 8, 30, torch.float32)
    with pytest.raises(SurgeryError, match=r"pip install triton. Or use scan='full'"):
        cdsurgery.kernels.unembed_sums._on_gpu(state, weight, None, 1.0, None, False, 30, 0)


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
    few, many, exact, exact_many, many_of_some, _ = (measure for measure, *_ in binaries)
    others = ("merge_tiles", "pick_rows", "pick_further_rows", "compact_rows")
    assert {tuple(kernel["name"] for kernel in rest) for _, *rest in binaries} == {others}
    assert few["instructions"] == ["mma.sync", "cp.async.cg"]  # which takes 16 bytes at a time
    assert many["instructions"] == many_of_some["instructions"] == ["wgmma.mma_async", "cp.async.cg"]
    assert (exact["instructions"], exact_many["instructions"]) == ([], ["cp.async.cg"])  # rows of 77 numbers lie askew
    # What a program may have on the smallest of today's cards.
    assert all(kernel["shared"] <= 99 * 1024 for launch in binaries for kernel in launch)
    # Some addresses may go to memory and back, eight at most, and no tile.
    assert all(kernel["stack"] <= 32 for launch in binaries for kernel in launch)
