"""`probability`: 0 is the plain model and nothing more, 1 draws nothing, between them one coin for each row of text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DTYPES, LAYERS, tiny_model, token_ids, truth
from torch import Tensor
from torch.nn import functional

import cdsurgery
import cdsurgery.head

LOOKBACK = 4
IDS = token_ids(3, 40)
TRUE = truth(tiny_model("llama"), LOOKBACK, input_ids=IDS)


def wrapped(probability: float, seed: int | None = None, family: str = "llama", **options: Any) -> Any:
    model = cdsurgery.wrap(tiny_model(family, **options), lookback=LOOKBACK, probability=probability, seed=seed)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_at_0_the_output_is_the_plain_one_and_no_candidate_is_computed(dtype: torch.dtype) -> None:
    plain, model = tiny_model("llama", dtype)(IDS), wrapped(0, dtype=dtype)
    calls: list[str] = []
    for name in ("lm_head", "model.norm"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    out = model(IDS)
    assert sorted(calls) == ["lm_head", "model.norm"]
    assert torch.equal(out.logits, plain.logits)
    assert out.logits is out.final_logits
    assert out.entropy is None
    assert (out.selected_layer == LAYERS).all() and out.selected_layer.shape == IDS.shape


def test_at_0_generate_writes_what_the_plain_model_writes() -> None:
    plain = tiny_model("llama")
    plain.generation_config.eos_token_id = None
    options = {"max_new_tokens": 12, "do_sample": False}
    text = plain.generate(IDS[:, :9], **options)
    assert torch.equal(wrapped(0).generate(IDS[:, :9], **options), text)
    assert not torch.equal(wrapped(1).generate(IDS[:, :9], **options), text)


@torch.no_grad()
def test_at_1_nothing_is_drawn_and_torchs_generator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(1)
    before = torch.get_rng_state()
    monkeypatch.setattr(cdsurgery.head, "allowed_rows", None)  # a call would be an error
    assert torch.equal(model(IDS).logits, TRUE.logits)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_between_a_row_either_keeps_its_final_layer_or_takes_its_trough() -> None:
    out = wrapped(0.5, seed=1)(IDS)
    movable = TRUE.layer < LAYERS
    moved = out.selected_layer < LAYERS
    assert not (moved & ~movable).any()
    # 5 standard deviations of the share of a fair coin; the seed is fixed, so this cannot flicker.
    assert abs(moved[movable].float().mean() - 0.5) < 5 * 0.5 / movable.sum().sqrt()
    assert torch.equal(out.selected_layer[moved], TRUE.layer[moved])
    expected = torch.where(moved[..., None], TRUE.logits, TRUE.candidates[0])
    assert torch.equal(out.logits, expected)
    torch.testing.assert_close(out.entropy.double(), TRUE.entropy, rtol=1e-6, atol=0)  # as in test_surgery


@torch.no_grad()
def test_a_seed_repeats_its_draws_and_another_seed_does_not() -> None:
    first, again, other = (wrapped(0.5, seed)(IDS).selected_layer for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model = wrapped(0.5, 7)
    assert torch.equal(model(IDS).selected_layer, model(IDS).selected_layer)


@torch.no_grad()
def test_without_a_seed_one_is_taken_from_torchs_generator_when_wrapping() -> None:
    seeds = []
    for start in (3, 3, 4):
        torch.manual_seed(start)
        model = tiny_model("llama")
        torch.manual_seed(start)
        seeds.append(cdsurgery.wrap(model, probability=0.5).confident.seed)
    assert seeds[0] == seeds[1] != seeds[2]


@torch.no_grad()
def test_a_rows_draws_do_not_depend_on_its_batch_or_on_padding() -> None:
    model = wrapped(0.5, seed=2)
    together = model(IDS).selected_layer
    assert torch.equal(model(IDS.flip(0)).selected_layer, together.flip(0))
    for row in range(len(IDS)):
        assert torch.equal(model(IDS[row : row + 1]).selected_layer[0], together[row])
    pad = torch.zeros(len(IDS), 5, dtype=torch.int64)
    mask = torch.cat([pad, torch.ones_like(IDS)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for named in ({"position_ids": positions}, {}):
        padded = model(input_ids=torch.cat([pad, IDS], dim=1), attention_mask=mask, **named)
        assert torch.equal(padded.selected_layer[:, 5:], together)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text"])
@torch.no_grad()
def test_decoding_step_by_step_draws_what_the_full_forward_draws(family: str) -> None:
    model = wrapped(0.5, seed=4, family=family)
    full = model(IDS, use_cache=False)
    assert 0 < (full.selected_layer < LAYERS).sum() < IDS.numel() / 2
    layers, cache = [], None
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 20), (20, 21), (21, 40)):
        step = model(IDS[:, start:end], past_key_values=cache, use_cache=True)
        layers.append(step.selected_layer)
        cache = step.past_key_values
    # Step shapes move float32 logits in the last digits; the draws may not move, and these layers' margins are wider.
    assert torch.equal(torch.cat(layers, dim=1), full.selected_layer)


@torch.no_grad()
def test_kept_rows_draw_as_they_do_among_all_rows() -> None:
    model = wrapped(0.5, seed=5)
    full = model(IDS).selected_layer
    assert torch.equal(model(IDS, logits_to_keep=3).selected_layer, full[:, -3:])
    some = torch.tensor([2, 30, 11])
    assert torch.equal(model(IDS, logits_to_keep=some).selected_layer, full[:, some])


def test_generate_takes_the_draws_of_the_full_text() -> None:
    model = wrapped(0.5, seed=6)
    text = model.generate(IDS[:, :6], max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        logits: Tensor = model(text, use_cache=False).logits
    assert torch.equal(logits[:, 5:-1].argmax(-1), text[:, 6:])


RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")  # whose steps `generate` tells no position


@pytest.mark.parametrize(
    ("family", "padding"), [*((f, 0) for f in RECURRENT), *((f, 3) for f in ("llama", "bloom", *RECURRENT[:3]))]
)
def test_generate_with_a_cache_draws_what_calls_on_the_whole_text_draw(family: str, padding: int) -> None:
    # A single cached step of plain rwkv mixes the rows of a batch.
    model, text = wrapped(0.5, seed=6, family=family), IDS[: 1 if family == "rwkv" else 2, :9]
    mask = torch.ones_like(text)
    mask[0, :padding] = 0
    masked = {"attention_mask": mask} if padding else {}
    written = model.generate(text, max_new_tokens=12, do_sample=False, **masked)
    with torch.no_grad():
        for _ in range(12):
            text = torch.cat([text, model(input_ids=text, **masked).logits[:, -1:].argmax(-1)], dim=1)
            masked = {name: functional.pad(mask, (0, 1), value=1) for name, mask in masked.items()}
    assert torch.equal(written, text)


def test_steps_after_a_prompt_of_embeddings_are_counted_on_for_every_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stood = wrapped(0.5, seed=6, family="mamba"), []
    draw = cdsurgery.head.allowed_rows
    monkeypatch.setattr(cdsurgery.head, "allowed_rows", lambda *args: stood.append(args[-1].tolist()) or draw(*args))
    prompt = model.get_input_embeddings()(IDS[:1, :9])
    model.generate(inputs_embeds=prompt, max_new_tokens=3, num_beams=2, do_sample=False)
    assert stood == [[[8], [8]], [[9], [9]], [[10], [10]]]


@pytest.mark.parametrize("family", RECURRENT)
@torch.no_grad()
def test_a_step_of_ones_own_on_a_recurrent_state_is_told_its_position(family: str) -> None:
    model, ids = wrapped(0.5, seed=6, family=family), IDS[:1, :12]
    name = "state" if family == "rwkv" else "cache_params"
    first = model(ids[:, :11], use_cache=True)
    step = model(ids[:, 11:], use_cache=True, position_ids=torch.tensor([[11]]), **{name: first[name]})
    full = model(ids, use_cache=family == "xlstm").selected_layer
    assert torch.equal(torch.cat([first.selected_layer, step.selected_layer], dim=1), full)
