"""Wrapped models among others' wrappers: PEFT inside and outside, accelerate's forward on the instance, offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from families import decoder_layers, tiny_model, token_ids, truth
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import cdsurgery
from cdsurgery import ConfidentHead, SurgeryError, UnsupportedModelError

# peft 0.21 asks transformers 5.23 for gradient checkpointing by the name it had before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LOOKBACK = 4
IDS = token_ids(2, 9)
WITHOUT_ADAPTER = truth(tiny_model("llama"), LOOKBACK, input_ids=IDS)


def with_lora(model: PreTrainedModel, *modules: str) -> PeftModelForCausalLM:
    """Random adapters, so that a state or a head that misses them shows."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(modules), init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("up_proj", "lm_head")], ids="+".join)
@torch.no_grad()
def test_a_peft_model_is_wrapped_and_unwrapped(modules: tuple[str, ...]) -> None:
    model = with_lora(tiny_model("llama"), *modules)
    true = truth(model, LOOKBACK, input_ids=IDS)
    attributes, inner = dict(model.__dict__), dict(model.get_base_model().__dict__)
    wrapped = cdsurgery.wrap(model, lookback=LOOKBACK)
    assert wrapped is model
    assert isinstance(wrapped, ConfidentHead) and isinstance(wrapped, PeftModelForCausalLM)
    assert wrapped.confident.lookback == LOOKBACK
    out = wrapped(input_ids=IDS)
    assert torch.equal(out.logits, true.logits) and torch.equal(out.selected_layer, true.layer)
    assert not torch.equal(true.layer, WITHOUT_ADAPTER.layer)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(input_ids=IDS).logits, WITHOUT_ADAPTER.logits)
    assert cdsurgery.unwrap(wrapped) is model
    assert type(model) is PeftModelForCausalLM and type(model.get_base_model()) is LlamaForCausalLM
    assert model.__dict__ == attributes and model.get_base_model().__dict__.keys() == inner.keys()
    assert torch.equal(model(input_ids=IDS).logits, true.candidates[0])


@torch.no_grad()
def test_a_wrapped_model_takes_an_adapter() -> None:
    true = truth(with_lora(tiny_model("llama"), "q_proj", "lm_head"), LOOKBACK, input_ids=IDS)
    model = with_lora(cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK), "q_proj", "lm_head")
    assert torch.equal(model(input_ids=IDS).logits, true.logits)
    with pytest.raises(SurgeryError, match="PeftModelForCausalLM is wrapped already"):
        cdsurgery.wrap(model)
    assert torch.equal(cdsurgery.unwrap(model)(input_ids=IDS).logits, true.candidates[0])
    with pytest.raises(SurgeryError, match="PeftModelForCausalLM is not wrapped"):
        cdsurgery.unwrap(model)


@torch.no_grad()
def test_adapted_models_write_the_text_of_the_selected_layers() -> None:
    plain, text = with_lora(tiny_model("llama"), "q_proj", "v_proj"), IDS
    for _ in range(8):
        newest = truth(plain, LOOKBACK, input_ids=text).logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, newest], dim=1)
    inside = with_lora(cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK), "q_proj", "v_proj")
    for model in (cdsurgery.wrap(plain, lookback=LOOKBACK), inside):
        written = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(written, text)


def test_training_an_adapter_reaches_its_weights_and_no_others() -> None:
    model = cdsurgery.wrap(with_lora(tiny_model("llama"), "q_proj", "v_proj"), lookback=LOOKBACK)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


@torch.no_grad()
def test_an_adapter_is_merged_into_a_wrapped_model() -> None:
    model = cdsurgery.wrap(with_lora(tiny_model("llama"), "q_proj", "lm_head"), lookback=LOOKBACK)
    adapted = model(input_ids=IDS)
    merged = model.merge_and_unload()
    assert isinstance(merged, ConfidentHead)
    # W x + B A x and (W + B A) x differ by rounding, at logits of size 10.
    torch.testing.assert_close(merged(IDS).logits, adapted.logits, rtol=0, atol=1e-4)
    assert type(cdsurgery.unwrap(merged)) is LlamaForCausalLM


PLACEMENTS: dict[str, Any] = {
    "one device": lambda model, _: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "layer by layer": lambda model, _: accelerate.dispatch_model(model, by_layer(model), force_hooks=True),
    "weights kept on the CPU": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu"),
    "weights kept on disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
}


def by_layer(model: PreTrainedModel) -> dict[str, str]:
    layers = {f"model.layers.{i}": "cpu" for i in range(len(decoder_layers(model)))}
    return layers | dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_forward_that_accelerate_placed_on_the_instance_runs_inside_and_comes_back(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    PLACEMENTS[placement](model, tmp_path)
    placed = model.__dict__["forward"]
    wrapped = cdsurgery.wrap(model, lookback=LOOKBACK)
    ran, before = [], model._hf_hook.pre_forward
    monkeypatch.setattr(model._hf_hook, "pre_forward", lambda *args, **kw: ran.append(1) or before(*args, **kw))
    assert torch.equal(wrapped(IDS).logits, WITHOUT_ADAPTER.logits)
    assert ran == [1], "the placed forward, which brings inputs and weights, did not run"
    written = wrapped.generate(IDS, max_new_tokens=1, do_sample=False)
    assert torch.equal(written[:, -1], WITHOUT_ADAPTER.logits[:, -1].argmax(-1))
    cdsurgery.unwrap(wrapped)
    assert model.__dict__["forward"] is placed
    assert torch.equal(model(IDS).logits, WITHOUT_ADAPTER.candidates[0])
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(IDS).logits, WITHOUT_ADAPTER.candidates[0])


@pytest.mark.parametrize("device", ["cpu", "auto", "disk"])
@torch.no_grad()
def test_a_model_loaded_with_a_device_map_is_wrapped(device: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    device_map: Any = device
    if device == "disk":
        device_map = by_layer(tiny_model("llama")) | {"model.layers.4": "disk", "model.layers.5": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in model.parameters()) == (device == "disk")
    assert torch.equal(cdsurgery.wrap(model, lookback=LOOKBACK)(IDS).logits, WITHOUT_ADAPTER.logits)


def test_weights_that_nothing_will_bring_are_refused() -> None:
    with torch.device("meta"), pytest.raises(UnsupportedModelError, match=r"meta device\. Load them before wrapping"):
        cdsurgery.wrap(LlamaForCausalLM(tiny_model("llama").config))


@torch.no_grad()
def test_what_is_put_over_a_wrapped_forward_comes_off_before_unwrap() -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(model(IDS).logits, WITHOUT_ADAPTER.logits)
    with pytest.raises(SurgeryError, match=r"forward was put on this LlamaForCausalLM after it was wrapped.*Remove it"):
        cdsurgery.unwrap(model)
    assert torch.equal(model(IDS).logits, WITHOUT_ADAPTER.logits)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(IDS).logits, WITHOUT_ADAPTER.logits)
    assert torch.equal(cdsurgery.unwrap(model)(IDS).logits, WITHOUT_ADAPTER.candidates[0])


@torch.no_grad()
def test_a_tool_that_undoes_decorators_leaves_the_selection_on() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK))
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(model(IDS).logits, WITHOUT_ADAPTER.logits)
