"""`trace_generation`: the tokens that `generate` gives, and what each step selected."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import cdsurgery
from cdsurgery.errors import InvalidInputError
from cdsurgery.trace import TracedToken, trace_generation

LAYERS, LOOKBACK, NEW = 5, 3, 12


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.5,  # the default leaves the logits near uniform, where every layer says the same
    )
    return cdsurgery.wrap(LlamaForCausalLM(config), lookback=LOOKBACK, seed=0)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 17, 3]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_tokens_are_those_of_generate(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    options = {"max_new_tokens": NEW, "do_sample": False}
    trace = trace_generation(model, inputs, **options)
    assert trace.ids == model.generate(**inputs, **options)[0, 3:].tolist()
    assert len(trace.ids) == NEW


@torch.no_grad()
def test_each_step_says_what_a_forward_of_its_text_says(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    trace = trace_generation(model, inputs, max_new_tokens=NEW, do_sample=False)
    text = inputs["input_ids"]
    for step in trace.tokens:
        out = model(input_ids=text, logits_to_keep=1)
        assert step.selected_layer == int(out.selected_layer) == LAYERS - step.depth
        assert step.final_token == int(out.final_logits.argmax())
        assert step.token == int(out.logits.argmax())
        entropy = torch.tensor(step.entropy)
        measured = ~entropy.isnan()  # in generate, no more than the scan looks at
        assert measured[: step.depth + 2].all()
        torch.testing.assert_close(entropy[measured], out.entropy[0, 0][measured], rtol=1e-4, atol=1e-5)
        text = torch.cat([text, torch.tensor([[step.token]])], dim=-1)
    assert trace.moved > 0 and trace.changed > 0, "every token is the final layer's: this test shows nothing"


def test_counts_follow_from_the_tokens() -> None:
    from cdsurgery.trace import Trace

    final = TracedToken(token=1, final_token=1, selected_layer=5, depth=0, entropy=(0.5, 0.7))
    moved = TracedToken(token=1, final_token=1, selected_layer=4, depth=1, entropy=(0.5, 0.4))
    changed = TracedToken(token=2, final_token=1, selected_layer=3, depth=2, entropy=(0.5, 0.4, 0.3))
    trace = Trace((final, moved, changed))
    assert (trace.moved, trace.changed, trace.mean_depth) == (2, 1, 1.0)
    assert Trace(()).mean_depth == 0


def test_without_a_lookback_there_are_no_entropies(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model = cdsurgery.wrap(cdsurgery.unwrap(model), probability=0)
    trace = trace_generation(model, inputs, max_new_tokens=3, do_sample=False)
    assert trace.moved == trace.changed == 0
    assert {token.entropy for token in trace.tokens} == {()}


def test_the_model_is_left_as_it_was(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    before = dict(vars(model))
    trace_generation(model, inputs, max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        trace_generation(model, inputs, max_new_tokens=2, do_sample=True, temperature=-1.0)
    assert vars(model).keys() == before.keys()


def test_a_text_is_followed_whatever_the_model_was_told_to_return_and_drafts_are_refused(
    model: Any, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = trace_generation(model, inputs, max_new_tokens=3, do_sample=False)
    monkeypatch.setattr(model.generation_config, "return_dict_in_generate", True)
    found = trace_generation(model, inputs, max_new_tokens=3, do_sample=False)
    assert found.ids == true.ids and len(true.ids) == 3
    found = trace_generation(model, inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert found.ids == true.ids
    with pytest.raises(InvalidInputError, match="with prompt_lookup_num_tokens a step has several"):
        trace_generation(model, inputs, max_new_tokens=3, prompt_lookup_num_tokens=2)
    config = GenerationConfig(max_new_tokens=3, prompt_lookup_num_tokens=2)
    with pytest.raises(InvalidInputError, match="with prompt_lookup_num_tokens a step has several"):
        trace_generation(model, inputs, generation_config=config)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
def test_several_texts_are_refused(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    name, count = next(iter(options.items()))
    with pytest.raises(InvalidInputError, match=f"follows one text, and there are {name}={count}"):
        trace_generation(model, inputs, max_new_tokens=2, **options)
    with pytest.raises(InvalidInputError, match=f"follows one text, and there are {name}={count}"):
        trace_generation(model, inputs, generation_config=GenerationConfig(max_new_tokens=2, **options))
    two = {key: value.repeat(2, 1) for key, value in inputs.items()}
    with pytest.raises(InvalidInputError, match="prompts=2"):
        trace_generation(model, two, max_new_tokens=2)
