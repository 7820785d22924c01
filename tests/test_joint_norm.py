"""The final norm of a fused scan, which takes the candidates' rows along: when it does, and that nobody notices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import tiny_model, token_ids
from torch import Tensor, nn

import cdsurgery
import cdsurgery.one_pass
from cdsurgery.zoo import LAYERS

LOOKBACK = 4
IDS = token_ids(3, 9)


def wrapped(family: str = "llama", scan: str = "fused") -> Any:
    return cdsurgery.wrap(tiny_model(family), lookback=LOOKBACK, scan=scan)


@contextmanager
def normed(norm: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what the module's own forward is given while the model runs."""
    shapes: list[tuple[int, ...]] = []
    forward = norm.forward

    def watched(states: Tensor) -> Tensor:
        shapes.append(tuple(states.shape[:-1]))
        return forward(states)

    norm.forward = watched  # type: ignore[method-assign]
    try:
        yield shapes
    finally:
        del norm.forward


@torch.no_grad()
def test_rows_of_a_step_are_normed_together_and_those_of_a_prompt_apart() -> None:
    model = wrapped()
    with normed(model.model.norm) as shapes:
        prompt = model(IDS, logits_to_keep=1)
        model(IDS[:, :1], past_key_values=prompt.past_key_values)
    assert shapes == [(3, 9), (3 * LOOKBACK, 1), (3 * (1 + LOOKBACK), 1)]
    model._generating = True
    with normed(model.model.norm) as shapes:
        model(IDS[:, :1])
    assert shapes[0] == (3 * 2, 1)  # a CPU's first reading takes one layer


@pytest.mark.parametrize("family", ["llama", "opt"])  # the norm alone before the unembedding, and not alone
@torch.no_grad()
def test_a_captured_step_norms_the_layers_of_all_its_readings_at_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cdsurgery.one_pass, "reading_plan", lambda *_: [1, LOOKBACK - 1])
    monkeypatch.setattr(cdsurgery.one_pass, "can_look", lambda _: False)
    fused, full = wrapped(family), wrapped(family, scan="full")
    fused._generating = True
    if family == "llama":
        with normed(fused.model.norm) as shapes:
            fused(IDS)
        assert shapes == [(3 * (1 + LOOKBACK), 9)]
    found, true = fused(IDS), full(IDS)
    assert torch.equal(found.selected_layer, true.selected_layer)
    assert true.selected_layer.min() < LAYERS - 1  # in the second reading
    torch.testing.assert_close(found.logits, true.logits, rtol=0, atol=1e-5)
    measured = ~found.entropy.isnan()
    torch.testing.assert_close(found.entropy[measured], true.entropy[measured], rtol=1e-5, atol=1e-6)


def test_gradients_go_through_the_norm_of_each_layer() -> None:
    model = wrapped()
    with normed(model.model.norm) as shapes:
        model(IDS)
    assert shapes == [(3, 9), (3 * LOOKBACK, 9)]


@torch.no_grad()
def test_who_reads_the_hidden_states_finds_the_models_own() -> None:
    plain = tiny_model("llama")
    for length in (1, 9):
        found = wrapped()(IDS[:, :length], output_hidden_states=True).hidden_states
        true = plain(IDS[:, :length], output_hidden_states=True).hidden_states
        assert len(found) == len(true)
        for one, other in zip(found, true, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # a norm of more rows may round otherwise


@pytest.mark.parametrize(
    "keep", [torch.tensor([8, 0, 4, 3, 2, 1, 5, 6, 7]), torch.tensor([3] * 9)], ids=["all rows", "one row"]
)
@torch.no_grad()
def test_rows_that_are_wanted_in_another_order_are_those_rows(keep: Tensor) -> None:
    """As many as there are, so that no shape tells."""
    fused, full = (wrapped(scan=scan)(IDS, logits_to_keep=keep) for scan in ("fused", "full"))
    assert torch.equal(fused.selected_layer, full.selected_layer)
    torch.testing.assert_close(fused.logits, full.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(fused.entropy, full.entropy, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_norm_that_was_replaced_since_is_the_one_that_norms() -> None:
    fused, full = wrapped(), wrapped(scan="full")
    for model in (fused, full):
        other = copy.deepcopy(tiny_model("llama").model.norm)
        other.weight.data *= torch.linspace(0.1, 3, other.weight.numel())
        model.model.norm = other
    one, two = fused(IDS), full(IDS)
    assert torch.equal(one.selected_layer, two.selected_layer)
    torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_copy_of_the_model_norms_with_its_own() -> None:
    model = wrapped()
    copied = copy.deepcopy(model)
    with normed(copied.model.norm) as shapes, normed(model.model.norm) as others:
        assert torch.equal(copied(IDS).logits, model(IDS).logits)
    assert shapes == others == [(3 * (1 + LOOKBACK), 9)]


def test_no_hook_stays_behind() -> None:
    model = wrapped()
    norm = model.model.norm
    assert len(norm._forward_hooks) == len(norm._forward_pre_hooks) == 1
    cdsurgery.unwrap(model)
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks
