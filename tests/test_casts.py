"""A model cast after it was wrapped, or run under an autocast: the plain model's values bit for bit, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model, token_ids, truth
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import cdsurgery
from cdsurgery import SurgeryError, UnsupportedModelError

LOOKBACK = 3
IDS = token_ids(3, 12)
# All whose tails cast: what a model in float32 does not show.
FAMILIES = ("beam", "falcon_mamba", "mamba", "mamba2", "mllama", "nemotron_h", "xlstm", "zaya")


def assert_true(model: Any, plain: PreTrainedModel) -> None:
    """The wrapped model gives what the plain one gives from the selected layers."""
    true = truth(plain, LOOKBACK, input_ids=IDS, use_cache=plain.config.model_type == "xlstm")
    with torch.no_grad():
        out = model(input_ids=IDS)
    assert out.logits.dtype == true.logits.dtype
    assert torch.equal(out.final_logits, true.candidates[0])
    assert torch.equal(out.logits, true.logits)
    assert (out.selected_layer < len(model.anatomy.layers)).any()


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_a_cast_after_wrap_gives_what_a_cast_before_it_gives(family: str) -> None:
    model = cdsurgery.wrap(tiny_model(family), lookback=LOOKBACK)
    assert model.to(torch.bfloat16) is model
    assert_true(model, tiny_model(family, torch.bfloat16))
    assert_true(model.float(), tiny_model(family, torch.bfloat16).float())
    assert_true(model.half(), tiny_model(family, torch.bfloat16).half())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3n", *FAMILIES])
def test_an_autocast_gives_what_the_plain_model_gives_under_it(family: str) -> None:
    """What a tail does to products and streams in bfloat16 does not show in the float32 that it was found in."""
    plain, model = tiny_model(family), tiny_model(family)
    for one in (plain, model):
        one.get_output_embeddings().weight.data.mul_(5)  # logits as large as a softcap bends
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_true(cdsurgery.wrap(model, lookback=LOOKBACK), plain)
    cdsurgery.unwrap(model)
    cdsurgery.wrap(model, lookback=LOOKBACK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_true(model, plain)


@pytest.mark.parametrize("family", ["llama", "mamba", "zaya"])
@torch.no_grad()
def test_a_fused_scan_is_cast_too(family: str) -> None:
    """The casts of mamba's tail and zaya's show only then, so that their norms are no longer alone in it."""
    later, before = (tiny_model(family, dtype) for dtype in (torch.float32, torch.bfloat16))
    found = cdsurgery.wrap(later, lookback=LOOKBACK, scan="fused").bfloat16()(IDS)
    true = cdsurgery.wrap(before, lookback=LOOKBACK, scan="fused")(IDS)
    for name in ("final_logits", "logits", "entropy", "selected_layer"):
        assert torch.equal(found[name], true[name]), name


# peft 0.21 asks transformers 5.23 for gradient checkpointing by the name it had before.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapted_model_is_cast() -> None:
    def adapted(model: PreTrainedModel) -> Any:
        torch.manual_seed(1)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["in_proj"], init_lora_weights=False)
        return get_peft_model(model, config).eval()

    plain = adapted(tiny_model("mamba")).bfloat16().get_base_model()
    assert_true(cdsurgery.wrap(adapted(tiny_model("mamba")), lookback=LOOKBACK).bfloat16(), plain)
    assert_true(adapted(cdsurgery.wrap(tiny_model("mamba"), lookback=LOOKBACK)).bfloat16(), plain)


@torch.no_grad()
def test_a_cast_model_compiles_whole() -> None:
    model = cdsurgery.wrap(tiny_model("mllama"), lookback=LOOKBACK).bfloat16()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def test_no_proof_is_made_where_nothing_is_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    monkeypatch.setattr(cdsurgery.head, "proven_anatomy", None)  # a call would be an error
    assert model.to("cpu").float() is model


def test_a_dtype_in_which_a_model_cannot_be_proven_is_an_error() -> None:
    model = cdsurgery.wrap(tiny_model("llama").bfloat16(), lookback=LOOKBACK)
    with pytest.raises(SurgeryError, match=r"cast to torch\.float8_e5m2, and cannot be proven in it: .*Unwrap it"):
        model.to(torch.float8_e5m2)
    assert_true(model.float(), tiny_model("llama").bfloat16().to(torch.float8_e5m2).float())


def test_casting_leaves_options_and_taps_as_they_were() -> None:
    model = cdsurgery.wrap(tiny_model("mamba"), lookback=LOOKBACK, probability=0.5, seed=3)
    confident, taps = model.confident, model._taps
    model.bfloat16()
    assert model.confident is confident and model._taps is taps
    before: Tensor = model.backbone.embeddings.weight
    assert cdsurgery.unwrap(model).backbone.embeddings.weight is before


def test_logits_that_are_nan_are_said_to_be() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[3, 5] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"NaN in torch\.float32, so nothing can be proven"):
        cdsurgery.wrap(model, lookback=LOOKBACK)
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data.mul_(1e7)  # more than float16 holds
    with pytest.raises(SurgeryError, match=r"cast to torch\.float16, and cannot be proven in it: .* NaN in"):
        cdsurgery.wrap(model, lookback=LOOKBACK).half()


@pytest.mark.parametrize("scan", ["full", "lazy", "fused"])
def test_a_softcap_that_is_switched_off_is_off_for_all_layers(scan: str) -> None:
    model = cdsurgery.wrap(tiny_model("gemma2"), lookback=LOOKBACK, scan=scan)
    plain = tiny_model("gemma2")
    for one in (model, plain):
        one.config.final_logit_softcapping = None
    true = truth(plain, LOOKBACK, input_ids=IDS)
    with torch.no_grad():
        out = model(IDS)
    assert torch.equal(out.selected_layer, true.layer)
    torch.testing.assert_close(out.logits, true.logits, rtol=0, atol=0 if scan == "full" else 1e-5)  # sums, reordered
