"""How often a fused scan reads the unembedding, and for how many rows, which it never waits to know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model, token_ids
from support import Operations, data_dependent
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cdsurgery
import cdsurgery.one_pass
import cdsurgery.readings
from benchmarks.machine import captured
from cdsurgery.anatomy import logits_of_products, unembedding_input
from cdsurgery.fused import fused_unembedding
from cdsurgery.one_pass import OnePass
from cdsurgery.readings import Tail
from cdsurgery.zoo import HIDDEN, LAYERS, VOCABULARY

LOOKBACK = 4
IDS = token_ids(3, 9)


class Largest(TorchDispatchMode):
    """The most numbers that an operation in it returned, and what the given weight was multiplied with."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.numbers, self.products = weight, 0, 0
        self.rows: list[int] = []  # of each pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        of_weight = any(isinstance(one, Tensor) and one.data_ptr() == self.weight.data_ptr() for one in args)
        if of_weight and "unembed_sums" in str(func):
            self.rows.append(int(args[8]) if len(args) > 8 else len(args[0]))  # those that count
        self.products += of_weight and str(func) in ("aten.mm.default", "aten.addmm.default")
        returned = result if isinstance(result, (tuple, list)) else [result]
        self.numbers = max([self.numbers, *(one.numel() for one in returned if isinstance(one, Tensor))])
        return result


# On a CPU; on an accelerator with few rows, and with many.
PLANS = [[1, 1, 2], [2, 2], [1, 3]]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("looks", [False, True], ids=["captured", "on a CPU"])
@pytest.mark.parametrize("allowed", [False, True], ids=["no row", "every row"])
@torch.no_grad()
def test_later_readings_are_of_the_rows_that_go_on(
    plan: list[int], looks: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cdsurgery.one_pass, "reading_plan", lambda *_: plan)
    monkeypatch.setattr(cdsurgery.one_pass, "can_look", lambda _: looks)
    model: Any = cdsurgery.wrap(tiny_model("phi"), lookback=LOOKBACK, scan="full")
    final, *earlier = torch.randn(LOOKBACK + 1, 3, 9, HIDDEN, generator=torch.Generator().manual_seed(0))
    with Largest(model.lm_head.weight) as seen, Operations() as run:
        passed = OnePass(Tail(model, model.anatomy, fused_unembedding(model, model.anatomy)), earlier, True)
        product = passed(unembedding_input(model, model.anatomy, final))
        logits = logits_of_products(model, model.anatomy, product)
        _, depth, entropy = passed.select(logits, torch.full((3, 9), allowed))
    assert depth.max() == 3 * allowed
    again = max(plan) * 27 > 64  # more rows are not written, so that the chosen ones are multiplied again
    rows, reached = [(plan[0] + 1) * 27, *[int((depth > 0).sum())] * again], plan[0]
    for layers in plan[1:]:
        going, further = int((depth >= reached).sum()), int((depth > reached).sum())
        if looks and going == 0:
            break
        rows += [layers * going, *[further] * again]
        reached += layers
    assert seen.rows == rows
    assert seen.products == 0
    assert bool(data_dependent(run.names)) == looks
    assert entropy.shape == (3, 9, LOOKBACK + 1)


@torch.no_grad()
def test_generate_writes_the_same_text_with_no_more_rows_than_it_needs() -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    fused, full = (cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan) for scan in ("fused", "full"))
    with Largest(fused.lm_head.weight) as seen:
        text = fused.generate(IDS, **options)
    assert torch.equal(text, full.generate(IDS, **options))
    depth = (LAYERS - full(text[:, :-1]).selected_layer)[:, IDS.shape[1] - 1 :]
    assert sum(seen.rows) == sum(int(n) for n in (2 * depth.numel(), (depth > 0).sum(), 2 * (depth > 1).sum()))
    assert seen.products == 0
    assert not fused(IDS, logits_to_keep=1).entropy.isnan().any()  # in a call of one's own


@pytest.mark.parametrize("keep", [0, 1], ids=["projected again", "written"])
@torch.no_grad()
def test_the_unembedding_is_read_once_for_all_layers(keep: int) -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="fused")
    with Largest(model.lm_head.weight) as seen:
        out = model(input_ids=IDS, logits_to_keep=keep)
    moved = [int((out.selected_layer < LAYERS).sum())] if keep == 0 else []  # whose products are made again
    assert (seen.rows, seen.products) == ([out.entropy.numel(), *moved], 0)
    assert seen.numbers <= max(out.logits.numel(), VOCABULARY * HIDDEN)
    # Who keeps what a step returned does not keep the logits of all candidates.
    for logits in (out.logits, out.final_logits):
        assert logits.untyped_storage().nbytes() == logits.nbytes


@pytest.mark.parametrize("tokens", [1, 9], ids=["written", "projected again"])
@torch.no_grad()
def test_a_step_of_generate_goes_by_no_value_so_that_it_can_be_captured(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cdsurgery.one_pass, "can_look", lambda _: False)
    for scan in ("fused", "lazy"):
        model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
        model._generating = True
        with Operations() as run:
            out = model(IDS[:, :tokens])
        assert bool(data_dependent(run.names)) == (scan == "lazy")
        assert out.selected_layer.min() < LAYERS


class Work(TorchDispatchMode):
    """Counts the operations that are more than a view of their input: on a GPU a kernel each, or a few."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = (value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        self.count += not any(views)
        return func(*args, **(kwargs or {}))


def operations(model: Any, batch: int) -> int:
    with Work() as work:
        model(token_ids(batch, 1), logits_to_keep=1)
    return work.count


@pytest.mark.parametrize(("batch", "plan", "added"), [(1, [4], 3), (8, [1, 3], 11)], ids=["one reading", "two"])
@torch.no_grad()
def test_a_captured_step_adds_few_operations(
    batch: int, plan: list[int], added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes two microseconds or three where a step of 8B parameters takes 4,000, however small it is."""
    monkeypatch.setattr(cdsurgery.one_pass, "reading_plan", lambda *_: plan)
    monkeypatch.setattr(cdsurgery.one_pass, "can_look", lambda _: False)
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="fused")
    model._generating = True
    assert operations(model, batch) - operations(tiny_model("llama"), batch) <= added


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_captured_step_selects_anew_at_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdsurgery.readings, "ACCELERATOR_FREE_ROWS", 0)  # two readings
    model: Any = cdsurgery.wrap(tiny_model("llama").cuda(), lookback=LOOKBACK, scan="fused")
    model._generating, ids, outputs = True, IDS.cuda(), []
    step = captured(lambda: outputs.append(model(ids)))
    depths = set()
    for seed in range(5):
        ids.copy_(token_ids(3, 9, seed))
        step()
        found, true = outputs[-1], model(ids)
        assert torch.equal(found.logits, true.logits)
        torch.testing.assert_close(found.entropy, true.entropy, rtol=0, atol=0, equal_nan=True)
        depths.update((LAYERS - found.selected_layer).flatten().tolist())
    assert len(depths) > 2
