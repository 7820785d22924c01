"""Hooks of others beside ours, and layers that leave none: what the taps hear is what the next layer hears."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import LAYERS, tiny_model, token_ids, truth

import cdsurgery
from cdsurgery import SurgeryError

LOOKBACK = 4
PROMPT = token_ids(2, 9)


@pytest.mark.parametrize("scan", ["auto", "lazy", "fused"])
def test_a_forward_that_leaves_layers_out_is_told_which(scan: str) -> None:
    model: Any = cdsurgery.wrap(tiny_model("opt", layerdrop=1.0), lookback=LOOKBACK, scan=scan).train()
    with pytest.raises(SurgeryError, match=r"Layers .*5.* of this OPTForCausalLM did not run.* Layerdrop leaves"):
        model(PROMPT)
    assert model.eval()(PROMPT).logits.isfinite().all()


@pytest.mark.parametrize("scan", ["auto", "fused"])
def test_a_layer_that_was_replaced_is_no_draft(scan: str) -> None:
    """The text would be the final layer's, without a word."""
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
    model.model.layers[LAYERS - 2] = copy.deepcopy(tiny_model("llama").model.layers[LAYERS - 2])
    with pytest.raises(SurgeryError, match=rf"Layers {LAYERS - 1} .* Have they been replaced .*, wrap it again"):
        model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    again = cdsurgery.wrap(cdsurgery.unwrap(model), lookback=LOOKBACK, scan=scan)
    assert again.generate(PROMPT, max_new_tokens=2, do_sample=False).shape[1] == PROMPT.shape[1] + 2


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("scan", ["full", "lazy", "fused"])
@torch.no_grad()
def test_what_a_hook_makes_of_a_layer_is_its_state_whenever_it_was_put_there(scan: str, keep: int) -> None:
    """As of steering vectors; in place too, and below the rows that are kept."""

    def steer(_module: Any, _args: Any, output: Any) -> None:
        output.add_(torch.linspace(-2, 2, output.shape[-1]))

    before, after = tiny_model("llama"), cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
    before.model.layers[LAYERS - 2].register_forward_hook(steer)
    true = cdsurgery.wrap(before, lookback=LOOKBACK, scan=scan)(PROMPT, logits_to_keep=keep)
    unsteered = after(PROMPT, logits_to_keep=keep)
    after.model.layers[LAYERS - 2].register_forward_hook(steer)
    found = after(PROMPT, logits_to_keep=keep)
    for name in ("final_logits", "logits", "selected_layer", "entropy"):
        torch.testing.assert_close(found[name], true[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(found.entropy[..., 1], unsteered.entropy[..., 1])


def test_a_forward_that_fails_leaves_the_next_one_unharmed() -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    with torch.no_grad():
        with pytest.raises(IndexError):
            model(torch.tensor([[999]]))
        assert torch.equal(model(PROMPT).logits, truth(tiny_model("llama"), LOOKBACK, input_ids=PROMPT).logits)


@pytest.mark.parametrize("scan", ["full", "fused"])
@torch.no_grad()
def test_a_hook_on_the_final_norm_holds_for_all_layers_whenever_it_was_put_there(scan: str) -> None:
    def turn(_module: Any, _args: Any, output: Any) -> Any:
        return output.flip(-1)

    before, after = tiny_model("llama"), cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
    before.model.norm.register_forward_hook(turn)
    after.model.norm.register_forward_hook(turn)
    true, found = cdsurgery.wrap(before, lookback=LOOKBACK, scan="full")(PROMPT), after(PROMPT)
    assert torch.equal(found.selected_layer, true.selected_layer)
    assert (true.selected_layer < LAYERS).any()
    torch.testing.assert_close(found.logits, true.logits, rtol=0, atol=1e-4)  # sums in another order
