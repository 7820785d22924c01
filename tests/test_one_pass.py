"""The fused scan against the full one: the same selection. How often it reads the unembedding: test_readings.py."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from families import tiny_model, token_ids
from torch import Tensor

import cdsurgery
import cdsurgery.kernels.unembed_sums
import cdsurgery.one_pass
from cdsurgery import ConfidentOutput, UnsupportedModelError
from cdsurgery.anatomy import logits_of_products, tail_logits, unembedding_input
from cdsurgery.entropy import entropy
from cdsurgery.fused import fused_unembedding
from cdsurgery.one_pass import OnePass
from cdsurgery.readings import Tail, reading_plan
from cdsurgery.unembedding import OpenLinear
from cdsurgery.zoo import HIDDEN, LAYERS, VOCABULARY

NAN, INF = float("nan"), float("inf")
LOOKBACK = 4
IDS = token_ids(3, 9)
# One of each kind of head. Tied are cohere and granite; gemma3n has its streams before the batch, deepseek_v4 after the
# positions; mamba and xlstm widen their logits.
FAMILIES = [
    ("llama", torch.float32),
    ("phi", torch.float32),  # bias
    ("gemma2", torch.float32),  # softcap
    ("gemma2", torch.bfloat16),
    ("cohere", torch.float16),  # scale
    ("granite", torch.float32),  # scale, as a divisor
    ("falcon_h1", torch.float32),  # multiplier
    ("inkling_text", torch.float32),  # its vocabulary is padded
    ("gemma3n_text", torch.float32),
    ("deepseek_v4", torch.float32),
    ("mamba", torch.bfloat16),
    ("xlstm", torch.bfloat16),  # softcap
]


@pytest.fixture(autouse=True)
def blocks_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no tiny model's logits fit in one: three for the 12 rows of a step, dozens for a prompt."""
    monkeypatch.setattr(cdsurgery.kernels.unembed_sums, "CPU_LOGITS", 1200)


def outputs(family: str, dtype: torch.dtype = torch.float32, **inputs: Any) -> tuple[ConfidentOutput, ConfidentOutput]:
    """What the fused and the full scan of the same model return."""
    return tuple(
        cdsurgery.wrap(tiny_model(family, dtype), lookback=LOOKBACK, scan=scan)(input_ids=IDS, **inputs)
        for scan in ("fused", "full")
    )


def same_selection(fused: ConfidentOutput, full: ConfidentOutput) -> None:
    """Products of another shape are sums in another order, which may differ in the last digits of their dtype."""
    tolerance = 1e-5 if full.logits.dtype == torch.float32 else torch.finfo(full.logits.dtype).eps
    within = tolerance * float(full.final_logits.abs().max())
    assert fused.logits.dtype == fused.final_logits.dtype == full.logits.dtype
    torch.testing.assert_close(fused.final_logits, full.final_logits, rtol=0, atol=within)
    stays = fused.selected_layer == LAYERS
    assert torch.equal(fused.logits[stays], fused.final_logits[stays])
    # A step's own product may be rounded otherwise in half precision, so each is held to the logits that it returns.
    for out in (fused, full):
        torch.testing.assert_close(out.entropy[..., 0], entropy(out.final_logits), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.entropy[..., 1:], full.entropy[..., 1:], rtol=1e-5, atol=1e-6)
    apart = (fused.entropy - full.entropy).abs().amax(-1, keepdim=True)
    clear = (full.entropy.diff(dim=-1).abs() > 2e-5 + 2 * apart).all(-1)
    assert clear.float().mean() > 0.9
    assert torch.equal(fused.selected_layer[clear], full.selected_layer[clear])
    torch.testing.assert_close(fused.logits[clear], full.logits[clear], rtol=0, atol=within)
    assert full.selected_layer.max() == LAYERS > full.selected_layer.min()


@pytest.mark.parametrize(("family", "dtype"), FAMILIES, ids=str)
@torch.no_grad()
def test_a_wrapped_model_selects_in_one_pass_what_it_selects_in_full(family: str, dtype: torch.dtype) -> None:
    same_selection(*outputs(family, dtype))  # 108 rows of 64 numbers: the chosen ones are projected again
    if family != "xlstm":  # it returns all rows whatever it is asked for
        same_selection(*outputs(family, dtype, logits_to_keep=2))  # 24 rows, which are written


def states_of_all_layers(model: Any) -> list[Tensor]:
    """M states of 3 x 9 rows that go back any number of layers, one of them all the way, broken ones among them."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(LOOKBACK + 1, 3, 9, HIDDEN, generator=generator)
    row = states[:, 2, 2]
    states[:, 2, 2] = row[entropy(tail_logits(model, model.anatomy, row)).argsort(descending=True)]
    states[3, 0, 1], states[2, 1, 2, 5], states[2, 2, 3], states[0, 0, 2] = NAN, INF, 0, NAN
    return list(states)


@pytest.mark.parametrize("rows", [slice(0, 9), slice(0, 3)], ids=["projected again", "written"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("readings_of", [None, ("cpu", 1), ("meta", 60), ("meta", 999)], ids=str)
@pytest.mark.parametrize("lookback", [1, 2, LOOKBACK])
@torch.no_grad()
def test_broken_candidates_never_win_and_draws_are_kept(
    rows: slice, share: float, readings_of: tuple[str, int] | None, lookback: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparing = readings_of is not None
    if sparing:
        plan = reading_plan(torch.device(readings_of[0]), readings_of[1], lookback)
        monkeypatch.setattr(cdsurgery.one_pass, "reading_plan", lambda *_: plan)
    model: Any = cdsurgery.wrap(tiny_model("phi"), lookback=LOOKBACK, scan="full")
    final, *earlier = (state[:, rows] for state in states_of_all_layers(model)[: lookback + 1])
    allowed = (torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < share)[:, rows]
    allowed[2, 2] = True
    full = model._select(tail_logits(model, model.anatomy, final), earlier, allowed)
    assert full[1].max() == lookback and full[1].min() == 0
    passed = OnePass(Tail(model, model.anatomy, fused_unembedding(model, model.anatomy)), earlier, sparing)
    product = passed(unembedding_input(model, model.anatomy, final))
    given = logits_of_products(model, model.anatomy, product)
    if len(passed._reading.products) < passed._reading.entropy.numel():
        given = given + 1  # who stays keeps what was given, and not what a second product makes of its state
    logits, depth, measured = passed.select(given, allowed)
    assert torch.equal(depth, full[1])
    true = torch.where((depth > 0)[..., None], full[0], given)
    torch.testing.assert_close(logits, true, rtol=0, atol=1e-4, equal_nan=True)
    looked = torch.full_like(measured, True, dtype=torch.bool)
    if sparing:  # who stops within a reading is in none after it
        for end in itertools.accumulate(plan):
            looked[..., end + 1 :] = (depth >= end)[..., None]
        assert measured[~looked].isnan().all()
    torch.testing.assert_close(measured[looked], full[2][looked], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert measured[looked].isnan().any()


def head_of(model: Any) -> Any:
    return model.get_output_embeddings()


@torch.no_grad()
def test_the_head_is_a_linear_layer_outside_of_a_forward_and_after_unwrapping() -> None:
    plain, model = tiny_model("phi"), cdsurgery.wrap(tiny_model("phi"), lookback=LOOKBACK, scan="fused")
    state = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    model(IDS)
    assert isinstance(head_of(model), torch.nn.Linear)
    assert torch.equal(head_of(model)(state), head_of(plain)(state))
    assert list(model.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(model)
    twin.lm_head.weight.mul_(2)
    assert not torch.equal(twin(IDS).final_logits, model(IDS).final_logits)
    assert torch.equal(twin(IDS).entropy, copy.deepcopy(twin)(IDS).entropy)
    cdsurgery.unwrap(model)
    assert type(head_of(model)) is torch.nn.Linear
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="fused")
    true = model(IDS)
    with pytest.raises(AttributeError):
        model(IDS, attention_mask="none")
    assert head_of(model).instead is None
    assert torch.equal(model(IDS).logits, true.logits)


@torch.no_grad()
def test_a_mask_of_wanted_rows_and_a_loss_are_as_in_a_full_scan() -> None:
    rows = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    fused, full = outputs("llama", logits_to_keep=rows)
    assert fused.entropy.shape == (int(rows.sum()), LOOKBACK + 1)
    same_selection(fused, full)
    fused, full = outputs("granite", labels=IDS)
    torch.testing.assert_close(fused.loss, full.loss)


@torch.no_grad()
def test_a_mask_of_positions_and_no_row_at_all_are_as_in_a_full_scan() -> None:
    none = torch.zeros(IDS.shape[1], dtype=torch.bool)
    two = none.index_fill(0, torch.tensor([1, 3]), True)
    for some, count in ((two, 2), (none, 0), (torch.zeros(0, dtype=torch.int64), 0)):
        fused, full = outputs("llama", logits_to_keep=some)
        assert fused.logits.shape == full.logits.shape == (len(IDS), count, VOCABULARY)
        assert fused.entropy.shape == full.entropy.shape == (len(IDS), count, LOOKBACK + 1)
        assert torch.equal(fused.selected_layer, full.selected_layer)


def test_a_head_that_was_replaced_since_is_told() -> None:
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="fused")
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    if type(head_of(model)) is OpenLinear:  # transformers may keep the module and change its weight
        head_of(model).__class__ = torch.nn.Linear
    with pytest.raises(UnsupportedModelError, match=r"'lm_head' has been replaced since .* Wrap it again"):
        model(IDS)
    cdsurgery.unwrap(model)
    assert cdsurgery.wrap(model, scan="fused", lookback=1)(IDS).logits.shape[-1] == VOCABULARY + 9


def test_a_gradient_reaches_the_selected_layers_logits() -> None:
    gradients = []
    for scan in ("fused", "full"):
        model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
        out = model(input_ids=IDS, labels=IDS)
        assert not out.entropy.requires_grad
        out.loss.backward()
        gradients.append(model.lm_head.weight.grad)
    # Sums of 27 rows in another order, at gradients of size 1.
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert gradients[0].abs().max() > 1e-2


@pytest.mark.parametrize("keep", [0, 2], ids=["projected again", "written"])
@torch.no_grad()
def test_under_autocast_candidates_have_the_dtype_of_the_model(keep: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, full = outputs("llama", logits_to_keep=keep)
    assert full.logits.dtype == torch.bfloat16
    same_selection(fused, full)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
@pytest.mark.parametrize(("family", "dtype"), [("gemma2", torch.float32), ("phi", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("keep", [2, 1], ids=["two rows", "one row"])
@torch.no_grad()
def test_the_kernel_selects_what_pytorch_does(
    family: str, dtype: torch.dtype, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from kernel_truth import kernel
    from test_pick_trough import kernel as picking

    ran: list[int] = []
    monkeypatch.setattr(cdsurgery.fused, "unembed_sums", lambda *given: (ran.append(1), kernel(*given))[1])
    monkeypatch.setattr(cdsurgery.one_pass, "pick_trough", lambda *given: (ran.append(1), picking(*given))[1])
    fused, full = outputs(family, dtype, logits_to_keep=keep)
    assert len(ran) == 2
    same_selection(fused, full)
