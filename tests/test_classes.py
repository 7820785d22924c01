"""The class of a wrapped model makes plain models: only `wrap` makes wrapped ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, token_ids
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import cdsurgery

# peft 0.21 asks transformers 5.23 for gradient checkpointing by the name it had before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = token_ids(2, 9)


@pytest.fixture
def wrapped() -> Any:
    return cdsurgery.wrap(tiny_model("llama"), lookback=3)


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True, "use_safetensors": True}],
    ids=["as saved", "bfloat16", "device map", "low memory"],
)
@torch.no_grad()
def test_what_its_class_loads_is_the_plain_model_that_was_saved(
    wrapped: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    wrapped.save_pretrained(tmp_path)
    loaded = type(wrapped).from_pretrained(tmp_path, **options)
    assert type(loaded) is LlamaForCausalLM and not loaded.training
    plain = LlamaForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(loaded(IDS).logits, plain(IDS).logits)
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    if not options:
        again = cdsurgery.wrap(loaded, lookback=3)
        assert type(again) is type(wrapped)
        assert torch.equal(again(IDS).logits, wrapped(IDS).logits)


def test_what_its_class_makes_of_a_config_is_a_plain_model(wrapped: Any) -> None:
    with torch.device("meta"):
        for made in (type(wrapped)(wrapped.config), type(wrapped)._from_config(wrapped.config)):
            assert type(made) is LlamaForCausalLM
            assert made.lm_head.weight.is_meta
    assert type(type(wrapped)(config=wrapped.config)) is LlamaForCausalLM


def test_an_auto_class_that_has_it_registered_loads_plain_models(wrapped: Any) -> None:
    AutoModelForCausalLM.register(LlamaConfig, type(wrapped), exist_ok=True)
    try:
        assert type(AutoModelForCausalLM.from_config(wrapped.config)) is LlamaForCausalLM
    finally:
        del AutoModelForCausalLM._model_mapping._extra_content[LlamaConfig]


def test_the_class_of_a_wrapped_adapter_makes_plain_adapters() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    adapter = cdsurgery.wrap(get_peft_model(tiny_model("llama"), config))
    assert type(type(adapter)(tiny_model("llama"), config)) is PeftModelForCausalLM
