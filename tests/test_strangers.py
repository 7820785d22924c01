"""Models that fit nothing known: refused with what was found and left as they were, or proven all the same."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from families import tiny_model, token_ids, truth
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import cdsurgery
from cdsurgery import InvalidInputError, UnsupportedModelError

LOOKBACK = 4
IDS = token_ids(3, 12)
LLAMA = tiny_model("llama").config
BERT = BertConfig(vocab_size=256, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96)
T5 = T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
REFUSED: list[tuple[type[PreTrainedModel], Any, str]] = [
    (families.AddsToLogits, LLAMA, r"what 'lm_head' returns is not what the model returns.*no combination"),
    (families.ScalesTheNormedState, LLAMA, "after 'model.norm' the state is changed by something that is not a module"),
    (families.NormsWithoutAModule, LLAMA, "after 'model.norm' the state is changed by something that is not a module"),
    (families.AddsTheEmbedding, LLAMA, "after 'model.norm' the state is changed by something that is not a module"),
    (families.ProjectsTwice, LLAMA, "what 'lm_head' returns is not what the model returns"),
    (families.ConditionsItsTail, LLAMA, r"model.norm -> extra -> lm_head cannot be run by itself.*missing 1 required"),
    (families.MixesTheBatch, LLAMA, "model.norm -> extra -> lm_head mixes the rows of a batch"),
    (families.LooksAhead, LLAMA, "LooksAhead is not causal: later tokens change"),
    (families.RunsItsLayersTwice, LLAMA, r"'model.layers' \(its members ran in the order \[0, 1, 2, 3, 4, 5, 0, 1, 2"),
    (families.HalvesBetweenItsLayers, LLAMA, "'model.layers.1' does not start from what 'model.layers.0' returned"),
    (families.SharesOneLayer, LLAMA, r"'model.layers' \(its members ran in the order \[0, 0, 0, 0, 0, 0\]"),
    (LlamaForCausalLM, LlamaConfig(**(LLAMA.to_dict() | {"num_hidden_layers": 1})), "has one decoder layer"),
    (LlamaModel, LLAMA, r"LlamaModel has no language head.*AutoModelForCausalLM"),
    (LlamaForSequenceClassification, LLAMA, "has no language head"),
    (BertForMaskedLM, BERT, "BertForMaskedLM is not causal"),
    (BertLMHeadModel, BERT, r"BertLMHeadModel is not causal.*is_decoder=True"),
    (T5ForConditionalGeneration, T5, r"is an encoder-decoder.*needs a decoder-only model"),
]


@pytest.mark.parametrize(("odd", "config", "found"), REFUSED, ids=[row[0].__name__ for row in REFUSED])
def test_what_does_not_prove_out_is_refused_with_what_was_found_and_left_as_it_was(
    odd: type[PreTrainedModel], config: Any, found: str
) -> None:
    torch.manual_seed(0)
    model = odd(config).train()
    attributes = dict(model.__dict__)
    with pytest.raises(UnsupportedModelError, match=found):
        cdsurgery.wrap(model)
    assert type(model) is odd and model.__dict__ == attributes
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is not a transformers causal LM.*AutoModelForCausalLM"):
        cdsurgery.wrap(nn.Linear(2, 2))
    with pytest.raises(InvalidInputError, match="model is a NoneType; it must be a causal LM, or the folder"):
        cdsurgery.wrap(None)  # type: ignore[arg-type]
    with torch.device("meta"), pytest.raises(UnsupportedModelError, match=r"weights on the meta device. Load them"):
        cdsurgery.wrap(LlamaForCausalLM(LLAMA))


def test_a_bad_option_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    attributes, parts = dict(model.__dict__), [type(module) for module in model.modules()]
    bad: list[dict[str, Any]] = [{"lookback": 0}, {"lookback": 1.5}, {"probability": 1.1}, {"measure": "nats"}]
    # What only the model's depth shows to be bad is seen late.
    for options in (*bad, {"lookback": 6}, {"lookback": 6, "scan": "fused"}):
        with pytest.raises(InvalidInputError, match=f"{next(iter(options))} is {next(iter(options.values()))!r}"):
            cdsurgery.wrap(model, **options)
    with pytest.raises(InvalidInputError, match=r"anatomy is a str; it must be a cdsurgery\.Anatomy"):
        cdsurgery.wrap(model, anatomy="model.layers")  # type: ignore[arg-type]
    assert [type(module) for module in model.modules()] == parts and model.__dict__ == attributes


@pytest.mark.parametrize(
    "model", [families.NormsTwice(LLAMA), tiny_model("bert", is_decoder=True), tiny_model("roberta", is_decoder=True)]
)
def test_an_unknown_tail_that_proves_out_is_wrapped_and_gives_the_truth(model: PreTrainedModel) -> None:
    true = truth(model.eval(), LOOKBACK, input_ids=IDS)
    with torch.no_grad():
        out = cdsurgery.wrap(model, lookback=LOOKBACK)(input_ids=IDS)
    assert torch.equal(out.logits, true.logits)
