"""Wrapped models under `generate`, pipelines, padding, training and compilation: as the plain ones, from other layers.

The truth is `slow`: a plain model whose forward recomputes the whole text at every step and selects by plain loops.
`generate` drives it as it drives any model, so that whatever it can do has a truth to be compared with.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import DTYPES, LAYERS, decoder_layers, tiny_model, token_ids, truth
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

import cdsurgery

LOOKBACK, STEPS = 4, 12
GENERATING = ("llama", "gemma3_text", "qwen3_5_text")  # full attention, sliding windows, recurrent states
PROMPT = token_ids(2, 9)


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """No end of text, so that every row has as many tokens as were asked for."""
    model.generation_config.eos_token_id = None
    return model


def wrapped(family: str, **options: Any) -> Any:
    return endless(cdsurgery.wrap(tiny_model(family), lookback=LOOKBACK, **options))


def slow(family: str) -> PreTrainedModel:
    plain, model = tiny_model(family), endless(tiny_model(family))

    def forward(
        input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
    ) -> CausalLMOutputWithPast:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return CausalLMOutputWithPast(logits=truth(plain, LOOKBACK, **inputs).logits)

    model.forward = forward
    model.generation_config.use_cache = False
    return model


@pytest.mark.parametrize("family", GENERATING)
def test_greedy_text_is_that_of_a_loop_over_full_forwards(family: str) -> None:
    plain, text = tiny_model(family), PROMPT
    for _ in range(STEPS):
        newest = truth(plain, LOOKBACK, input_ids=text).logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, newest], dim=1)
    ours = wrapped(family).generate(PROMPT, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(ours, text)
    assert not torch.equal(ours, endless(plain).generate(PROMPT, max_new_tokens=STEPS, do_sample=False))


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_decode_reads_the_selected_logits(mode: str) -> None:
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    ids[0, :4], mask[0, :4] = 0, 0
    texts = []
    for model in (wrapped("llama"), slow("llama")):
        torch.manual_seed(7)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, **MODES[mode]))
    assert torch.equal(*texts)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_kind_of_cache_does_not_change_the_text(family: str, cache: str | None) -> None:
    options = {"max_new_tokens": STEPS, "do_sample": False}
    model = wrapped(family)
    cached = (
        model.generate(PROMPT, cache_implementation=cache, **options)
        if cache
        else model.generate(PROMPT, use_cache=False, **options)
    )
    assert torch.equal(cached, model.generate(PROMPT, **options))


def test_a_streamer_gets_every_token_as_it_comes() -> None:
    class Notes(BaseStreamer):
        tokens: list[int] = []  # noqa: RUF012

        def put(self, value: Tensor) -> None:
            self.tokens.extend(value.flatten().tolist())

        def end(self) -> None:
            self.tokens.append(-1)

    text = wrapped("llama").generate(PROMPT[:1], max_new_tokens=STEPS, do_sample=False, streamer=Notes())
    assert Notes.tokens == [*text[0].tolist(), -1]


DRAFTS = [{"assistant_model": 0}, {"assistant_model": 5}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}]


@pytest.mark.parametrize("scan", ["auto", "fused"])
@pytest.mark.parametrize("draft", DRAFTS, ids=str)
def test_assisted_generation_gives_the_text_it_would_give_alone(draft: dict[str, int], scan: str) -> None:
    """Drafts: the target's own weights, of which many tokens are taken, a stranger, of which few are, two layers."""
    model = wrapped("llama", scan=scan)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    helper = (
        {"assistant_model": tiny_model("llama", seed=draft["assistant_model"])} if "assistant_model" in draft else draft
    )
    assert torch.equal(model.generate(PROMPT[:1], **helper, **options), model.generate(PROMPT[:1], **options))
    assert model.config.num_hidden_layers == LAYERS


def test_the_text_generation_pipeline_takes_a_wrapped_model() -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0")
    model = wrapped("llama")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompt = " ".join(f"w{i}" for i in PROMPT[0].tolist())
    (answer,) = write(prompt, max_new_tokens=STEPS, do_sample=False, return_full_text=False)
    text = slow("llama").generate(PROMPT[:1], max_new_tokens=STEPS, do_sample=False)
    assert answer["generated_text"] == tokenizer.decode(text[0, PROMPT.shape[1] :])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*GENERATING, "gpt2"])
def test_a_padded_row_equals_the_row_alone(family: str, side: str) -> None:
    lengths, width = (4, 9, 12, 7), 12
    ids, mask = token_ids(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.int64)
    rows = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for b, row in enumerate(rows):
        mask[b, row] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model = wrapped(family)
    with torch.no_grad():
        batch = model(input_ids=ids * mask, attention_mask=mask, position_ids=positions)
        alone = [model(input_ids=ids[b : b + 1, row]) for b, row in enumerate(rows)]
    # A padded batch takes other matrix shapes and the attention path with a mask: float32 sums in another order, which
    # six layers grow to about 1e-5 of logits of size 10.
    tolerance = 1e-4
    compared = 0
    for b, (row, one) in enumerate(zip(rows, alone, strict=True)):
        torch.testing.assert_close(batch.final_logits[b, row], one.final_logits[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(batch.entropy[b, row], one.entropy[0], rtol=0, atol=tolerance)
        clear = (one.entropy[0].diff(dim=-1).abs() > 2 * tolerance).all(-1)
        assert torch.equal(batch.selected_layer[b, row][clear], one.selected_layer[0][clear])
        torch.testing.assert_close(batch.logits[b, row][clear], one.logits[0][clear], rtol=0, atol=tolerance)
        compared += int(clear.sum())
    assert compared >= 0.95 * sum(lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_the_cross_entropy_of_the_selected_logits(dtype: torch.dtype) -> None:
    labels = PROMPT.clone()
    labels[0, :3] = -100
    with torch.no_grad():
        out = cdsurgery.wrap(tiny_model("llama", dtype), lookback=LOOKBACK)(PROMPT, labels=labels)
        plain = tiny_model("llama", dtype)(PROMPT, labels=labels)
    selected = truth(tiny_model("llama", dtype), LOOKBACK, input_ids=PROMPT).logits.float()
    expected = functional.cross_entropy(selected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # The selected loss is the plain one plus a difference, which leaves a rounding or two of float32.
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    assert abs(out.loss - plain.loss) > 1e-2


def test_the_loss_keeps_what_a_mixture_of_experts_adds_to_it() -> None:
    with torch.no_grad():
        out = wrapped("qwen3_moe")(PROMPT, labels=PROMPT, output_router_logits=True)
        plain = tiny_model("qwen3_moe")(PROMPT, labels=PROMPT, output_router_logits=True)
    selected = truth(tiny_model("qwen3_moe"), LOOKBACK, input_ids=PROMPT).logits
    routing = wrapped("qwen3_moe").config.router_aux_loss_coef * plain.aux_loss
    assert torch.equal(out.aux_loss, plain.aux_loss) and routing > 0
    expected = functional.cross_entropy(selected[:, :-1].flatten(0, 1), PROMPT[:, 1:].flatten()) + routing
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_gradients_flow_through_the_selected_layers(checkpointing: bool | None) -> None:
    model, plain = wrapped("llama").train(), tiny_model("llama")
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    out = model(PROMPT, labels=PROMPT, use_cache=False)
    out.loss.backward()
    states: list[Tensor] = []
    for layer in decoder_layers(plain):
        layer.register_forward_hook(lambda _, __, state: states.append(state))
    plain(PROMPT)
    by_layer = torch.stack([plain.lm_head(plain.model.norm(state)) for state in states])
    chosen = functional.one_hot(truth(tiny_model("llama"), LOOKBACK, input_ids=PROMPT).layer - 1, LAYERS)
    selected = (by_layer * chosen.movedim(-1, 0)[..., None]).sum(0)
    functional.cross_entropy(selected[:, :-1].flatten(0, 1), PROMPT[:, 1:].flatten()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        # Sums over positions in another order: float32, gradients of size up to 1.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not model.eval()(PROMPT).logits.requires_grad


@pytest.mark.parametrize("options", [{}, {"probability": 0.7, "seed": 3}])
def test_the_forward_compiles_as_one_graph(options: dict[str, Any]) -> None:
    model = cdsurgery.wrap(tiny_model("llama", num_hidden_layers=3), **options)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        ours, eager = compiled(PROMPT, use_cache=False), model(PROMPT, use_cache=False)
    assert torch.equal(ours.logits, eager.logits)
    assert torch.equal(ours.selected_layer, eager.selected_layer)


def test_a_deep_copy_is_a_wrapped_model_of_its_own() -> None:
    model = wrapped("llama")
    twin = copy.deepcopy(model)
    true = truth(tiny_model("llama"), LOOKBACK, input_ids=PROMPT)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        assert torch.equal(twin(PROMPT).logits, true.logits)
        cdsurgery.unwrap(model)
        assert torch.equal(twin(PROMPT).logits, true.logits)
        assert torch.equal(cdsurgery.unwrap(twin)(PROMPT).logits, true.candidates[0])
    assert not any(module._forward_hooks for copied in (model, twin) for module in copied.modules())


@torch.no_grad()
def test_a_loss_is_of_as_many_logits_as_there_are() -> None:
    """inkling cuts those of padded entries, and its config names all."""
    plain, model = tiny_model("inkling_text"), cdsurgery.wrap(tiny_model("inkling_text"), lookback=LOOKBACK)
    ids = PROMPT.clamp(max=plain.config.unpadded_vocab_size - 1)
    out = model(ids, labels=ids)
    assert out.logits.shape[-1] < plain.config.vocab_size
    expected = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=0)  # two orders of summation
