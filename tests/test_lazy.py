"""The lazy scan against the full one: the same selection, from no more rows than the scan reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model, token_ids
from torch import Tensor

import cdsurgery
from cdsurgery import ConfidentOutput
from cdsurgery.entropy import MEASURES, Measure
from cdsurgery.lazy import can_look, fewer_rows_pay, select_lazily
from cdsurgery.trough import select
from cdsurgery.unembedding import few_rows_unembedding
from cdsurgery.zoo import LAYERS

NAN, INF = float("nan"), float("inf")
LOOKBACK = 4
IDS = token_ids(3, 9)


def candidates(seed: int, vocabulary: int = 97) -> Tensor:
    """`[M, B, T, V]` whose rows go back any number of layers, a broken one among them here and there."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 3, 7, vocabulary, generator=generator)
    rows *= torch.rand(5, 3, 7, 1, generator=generator) * 4 + torch.arange(5)[:, None, None, None] * (seed % 3)
    rows[2, 0, 1, 5], rows[1, 1, 2, 0], rows[3, 2, 3, 96], rows[0, 0, 6, 1] = NAN, INF, NAN, NAN
    rows[1, 2, 4], rows[2, 2, 5, ::2] = -INF, -INF
    rows[1, 0, 0] = rows[0, 0, 0]  # a tie at once
    rows[1, 1, 0] = rows[2, 1, 0] = rows[0, 1, 0] * 2  # and one after a descent
    return rows


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_selection_is_bitwise_that_of_all_candidates_from_the_rows_that_it_takes(
    seed: int, share: float, measure: Measure
) -> None:
    stack = candidates(seed)
    allowed = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) < share
    projected: list[Tensor] = []

    def project(k: int, rows: Tensor) -> Tensor:
        projected.append(rows.clone())
        return stack[k][rows]

    logits, depth, entropy = select_lazily(stack[0], project, 4, measure, allowed)
    true_logits, true_depth, true_entropy = select(stack, measure, allowed)
    assert torch.equal(depth, true_depth)
    assert torch.equal(logits.nan_to_num(7), true_logits.nan_to_num(7))
    needed = (torch.arange(5) <= true_depth[..., None] + 1) & (allowed[..., None] | (torch.arange(5) == 0))
    assert torch.equal(sum((rows.long() for rows in projected), torch.zeros(3, 7).long()), needed[..., 1:].sum(-1))
    assert torch.equal(entropy[needed].nan_to_num(-7), true_entropy[needed].nan_to_num(-7))
    assert entropy[~needed].isnan().all()


def test_the_final_logits_stay_what_they_are() -> None:
    stack = candidates(2).nan_to_num(0, posinf=0, neginf=-9)
    final = stack[0].clone()
    logits, depth, _ = select_lazily(stack[0], lambda k, rows: stack[k][rows], 4, MEASURES["entropy"])
    assert (depth > 0).any()
    assert torch.equal(stack[0], final) and not torch.equal(logits, final)


def same_selection(lazy: ConfidentOutput, full: ConfidentOutput) -> None:
    """Fewer rows are matrix products of another shape, whose sums differ in the last digits of float32."""
    assert torch.equal(lazy.final_logits, full.final_logits)
    tolerance = 1e-5 * float(full.final_logits.abs().max())
    clear = (full.entropy.diff(dim=-1).abs() > 2 * tolerance).all(-1)
    assert clear.float().mean() > 0.9
    assert torch.equal(lazy.selected_layer[clear], full.selected_layer[clear])
    torch.testing.assert_close(lazy.logits[clear], full.logits[clear], rtol=0, atol=tolerance)
    measured = ~lazy.entropy.isnan()
    torch.testing.assert_close(lazy.entropy[measured], full.entropy[measured], rtol=0, atol=tolerance)
    depth = LAYERS - lazy.selected_layer
    assert 0 == depth.min() < depth.max()
    assert torch.equal(measured.sum(-1), (depth + 2).clamp(max=LOOKBACK + 1))


# gemma3n has its streams before the batch, deepseek_v4 after the positions.
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3n_text", "deepseek_v4"])
@torch.no_grad()
def test_a_wrapped_model_selects_lazily_what_it_selects_in_full(family: str) -> None:
    outputs = {
        scan: cdsurgery.wrap(tiny_model(family), lookback=LOOKBACK, scan=scan)(input_ids=IDS)
        for scan in ("lazy", "full")
    }
    same_selection(outputs["lazy"], outputs["full"])


KEEPS: dict[str, Any] = {
    "last three": 3,
    "indices": torch.tensor([0, 7, 4]),
    "mask": torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.6,
}


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS.keys())
@pytest.mark.parametrize("scan", ["lazy", "full", "fused"])
@pytest.mark.parametrize("probability", [1.0, 0.5])
@torch.no_grad()
def test_rows_that_are_asked_for_are_selected_as_among_all(scan: str, keep: Any, probability: float) -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan, probability=probability, seed=3)
    everything, some = model(input_ids=IDS), model(input_ids=IDS, logits_to_keep=keep)
    of = {"last three": (slice(None), slice(-3, None)), "indices": (slice(None), keep), "mask": (keep,)}
    rows = next(of[name] for name, value in KEEPS.items() if value is keep)
    assert torch.equal(some.selected_layer, everything.selected_layer[rows])
    for name in ("logits", "final_logits", "entropy"):
        torch.testing.assert_close(some[name], everything[name][rows], rtol=1e-5, atol=1e-4, equal_nan=True)


@torch.no_grad()
def test_generate_is_lazy_and_a_call_measures_all() -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    full = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="full")
    assert model.confident.scan == "auto"
    rows: list[int] = []
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counting(model, torch.nn.functional.linear, rows))
        unembed = cdsurgery.head.few_rows_unembedding
        patch.setattr(cdsurgery.head, "few_rows_unembedding", lambda *args: counted(unembed(*args), rows))
        text = model.generate(IDS, **options)
    assert torch.equal(text, full.generate(IDS, **options))
    out = full(input_ids=text[:, :-1])
    depth = (LAYERS - out.selected_layer)[:, IDS.shape[1] - 1 :]
    assert sum(rows) == depth.numel() + int((depth + 1).clamp(max=LOOKBACK).sum()) < depth.numel() * (1 + LOOKBACK)
    for keep in (0, 1):
        assert not model(input_ids=IDS, logits_to_keep=keep).entropy.isnan().any()


def counted(unembed: Any, rows: list[int]) -> Any:
    """The same, noting how many rows it is given."""
    return lambda state: (rows.append(state.shape[:-1].numel()), unembed(state))[1]


def counting(model: Any, linear: Any, rows: list[int]) -> Any:
    """`linear`, noting the rows that the model's head is given."""

    def count(state: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        if weight is model.lm_head.weight:
            rows.append(state.shape[:-1].numel())
        return linear(state, weight, *bias)

    return count


@torch.no_grad()
def test_generate_counts_the_candidates_of_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once, as where drafted tokens are checked."""
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    model._generating, asked = True, []
    monkeypatch.setattr(cdsurgery.head, "fewer_rows_pay", lambda _, rows: asked.append(rows))
    model(input_ids=IDS)
    assert asked == [(LOOKBACK + 1) * IDS.numel()]
    assert [fewer_rows_pay(torch.device("cuda"), rows) for rows in (368, 369)] == [False, True]
    assert fewer_rows_pay(torch.device("cpu"), 1)


def test_nobody_looks_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for captures in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captures=captures: captures)
        assert can_look(gpu) != captures
        assert can_look(cpu)


def test_a_gradient_reaches_the_selected_layers_logits() -> None:
    gradients = []
    for scan in ("lazy", "full"):
        model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(model.lm_head.weight.grad)
    # Sums of 27 rows in another order, at gradients of size 1.
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert gradients[0].abs().max() > 1e-2


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("family", ["llama", "phi"])  # phi has a bias
@torch.no_grad()
def test_a_few_rows_are_unembedded_as_the_head_does_it(family: str, rows: int) -> None:
    model = cdsurgery.wrap(tiny_model(family), lookback=LOOKBACK)
    unembed = few_rows_unembedding(model, model.anatomy)
    assert unembed is not None
    state = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(rows))
    # Sums of 64 products in another order, at logits of size 10.
    torch.testing.assert_close(unembed(state), model.lm_head(state), rtol=0, atol=1e-5)


@torch.no_grad()
def test_under_an_autocast_a_head_with_a_bias_is_called_itself() -> None:
    model: Any = cdsurgery.wrap(tiny_model("phi"), lookback=LOOKBACK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        true = cdsurgery.wrap(tiny_model("phi"), lookback=LOOKBACK, scan="full")(IDS)
        model._generating = True
        found = model(IDS)
    assert found.logits.dtype == torch.bfloat16
    assert torch.equal(found.selected_layer, true.selected_layer)
    assert torch.equal(found.logits, true.logits)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_under_an_autocast_rows_are_rounded_as_the_head_rounds_them(rows: int) -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    unembed = few_rows_unembedding(model, model.anatomy)
    assert unembed is not None
    state = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, true = unembed(state), model.lm_head(state)
    assert found.dtype == true.dtype == torch.bfloat16
    # A sum that is halfway between two numbers of bfloat16 may be rounded either way.
    torch.testing.assert_close(found, true, rtol=2**-7, atol=1e-5)


@torch.no_grad()
def test_a_head_that_is_watched_replaced_or_in_half_precision_is_called_itself() -> None:
    watched = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    handle = watched.lm_head.register_forward_hook(lambda _, __, logits: logits + 1)
    assert few_rows_unembedding(watched, watched.anatomy) is None
    handle.remove()
    assert few_rows_unembedding(watched, watched.anatomy) is not None
    watched.lm_head.forward = watched.lm_head.forward
    assert few_rows_unembedding(watched, watched.anatomy) is None
    half = cdsurgery.wrap(tiny_model("llama", torch.bfloat16), lookback=LOOKBACK)
    assert few_rows_unembedding(half, half.anatomy) is None
