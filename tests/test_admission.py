"""What `to_onnx` refuses before it traces, and what it says of a trace that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import cdsurgery
from cdsurgery import ConfidentHead, InvalidInputError, UnsupportedModelError, export
from cdsurgery.export import onnx as exporting
from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.graph.admission import traceable_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture
def model() -> ConfidentHead:
    return cdsurgery.wrap(tiny_model("llama", num_hidden_layers=2), lookback=1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that would have been traced; none is."""
    models: list[Any] = []

    def trace(model: Any, *_: Any) -> Any:
        models.append(model)
        raise UnsupportedModelError("not traced")

    monkeypatch.setattr(exporting, "_trace", trace)
    return models


def refused(model: Any, folder: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export.to_onnx(model, folder / "artifact")
    assert not list(folder.iterdir())


def test_a_generation_config_that_contradicts_itself_is_refused_before_the_trace(
    model: Any, tmp_path: Path, traced: list[Any]
) -> None:
    model.generation_config.temperature = 0.7
    refused(model, tmp_path, InvalidInputError, r"model\.generation_config cannot be saved(.|\n)*do_sample=True")
    assert not traced
    model.generation_config.do_sample = True
    refused(model, tmp_path, UnsupportedModelError, "^not traced$")


@pytest.mark.parametrize("first", ["wrapped", "adapted"])
def test_what_a_peft_model_adapts_is_exported(first: str, tmp_path: Path, traced: list[Any]) -> None:
    plain = tiny_model("llama", num_hidden_layers=2)
    if first == "wrapped":
        peft = get_peft_model(cdsurgery.wrap(plain, lookback=1), LORA)  # type: ignore[arg-type]
    else:
        peft = cdsurgery.wrap(get_peft_model(plain, LORA), lookback=1)  # type: ignore[assignment]
    assert traceable_model(peft) is plain
    refused(peft, tmp_path, UnsupportedModelError, "^not traced$")
    assert traced == [plain]


@pytest.mark.thorough
def test_a_peft_model_is_exported_with_its_adapter_and_verified(tmp_path: Path) -> None:
    peft: Any = cdsurgery.wrap(get_peft_model(tiny_model("llama", num_hidden_layers=2), LORA), lookback=1)
    folder = export.to_onnx(peft, tmp_path / "artifact")
    assert read_manifest(folder).model_type == "llama"
    assert export.verify(folder, peft).passed
    with peft.disable_adapter():
        assert not export.verify(folder, peft).passed


def test_an_adapter_of_embeddings_is_refused(model: Any, tmp_path: Path) -> None:
    peft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refused(peft, tmp_path, UnsupportedModelError, "adapter 'default' puts embeddings before each text")


def test_a_model_that_was_loaded_quantised_is_refused(model: Any, tmp_path: Path) -> None:
    class Bnb8BitHfQuantizer:
        pass

    model.hf_quantizer = Bnb8BitHfQuantizer()
    refused(model, tmp_path, UnsupportedModelError, r"\(Bnb8BitHfQuantizer\).*quantization='int4' or 'int8'")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig


def test_a_config_that_nothing_could_load_is_refused(
    tmp_path: Path, traced: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tiny_model("llama", num_hidden_layers=2).config.to_dict()
    config = OwnConfig(**{name: value for name, value in options.items() if name != "model_type"})
    model = cdsurgery.wrap(OwnLlama(config).eval(), lookback=1)
    refused(model, tmp_path, UnsupportedModelError, r"'own_llama'.*AutoConfig\.register\('own_llama', OwnConfig\)")
    assert not traced
    monkeypatch.setattr("transformers.CONFIG_MAPPING._extra_content", {})
    AutoConfig.register("own_llama", OwnConfig)
    refused(model, tmp_path, UnsupportedModelError, "^not traced$")


class Uncached(LlamaForCausalLM):
    def forward(self, input_ids: Any, attention_mask: Any = None, logits_to_keep: int = 0) -> Any:
        return super().forward(input_ids, attention_mask, use_cache=False, logits_to_keep=logits_to_keep)


def test_a_failure_of_the_trace_is_named_in_one_line(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = NotImplementedError("\nno such operator\nand forty lines more")

    def fail(*_: Any) -> Any:
        raise cause

    monkeypatch.setattr(exporting, "_trace", fail)
    with pytest.raises(UnsupportedModelError, match=r"\(NotImplementedError: no such operator\)") as caught:
        export.to_onnx(model, tmp_path / "artifact")
    assert caught.value.__cause__ is cause
    assert "\n" not in str(caught.value)
    uncached = cdsurgery.wrap(Uncached(model.config).eval(), lookback=1)
    refused(uncached, tmp_path, UnsupportedModelError, r"This Uncached .*TypeError: .*'past_key_values'\)")
