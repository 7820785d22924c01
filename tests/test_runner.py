"""`export.load`: an artifact behaves as the wrapped model does, in a call and in `generate`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import artifact, wrapped
from families import token_ids
from hybrids import client
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from cdsurgery import ConfidentOutput, InvalidInputError, export
from cdsurgery.export import OnnxRunner

NEW = 24
TINY_LM = Path(__file__).resolve().parent.parent / "examples" / "tiny_lm"
TOKENS = {"input_ids": torch.ones(1, 3, dtype=torch.int64)}


@pytest.fixture(scope="module")
def runner() -> OnnxRunner:
    return export.load(artifact("llama"))


def left_padded() -> dict[str, Tensor]:
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, :2] = 0
    return {"input_ids": token_ids(3, 8), "attention_mask": mask}


def test_a_call_returns_the_fields_of_a_wrapped_model(runner: OnnxRunner) -> None:
    ids = token_ids(2, 6)
    found, truth = runner(ids), wrapped("llama")(ids, logits_to_keep=1)
    assert isinstance(found, ConfidentOutput)
    for name in ("logits", "final_logits", "selected_layer", "entropy"):
        assert found[name].shape == truth[name].shape
        assert found[name].dtype == truth[name].dtype
        assert torch.allclose(found[name].double(), truth[name].double(), rtol=1e-4, atol=1e-4)
    assert found.past_key_values.get_seq_length() == 6


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampling", "beams"],
)
def test_generate_gives_the_tokens_of_pytorch(runner: OnnxRunner, options: dict[str, object]) -> None:
    inputs = left_padded()
    torch.manual_seed(3)
    found = runner.generate(**inputs, max_new_tokens=NEW, **options)
    torch.manual_seed(3)
    truth = wrapped("llama").generate(**inputs, max_new_tokens=NEW, **options)
    assert torch.equal(found, truth)
    assert found.shape[1] > 8 + 4


@pytest.mark.parametrize("inputs", [{"input_ids": token_ids(2, 6)}, left_padded()], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_without_a_cache_gives_the_tokens_of_pytorch(
    runner: OnnxRunner, inputs: dict[str, Tensor], beams: int
) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "use_cache": False}
    assert torch.equal(runner.generate(**inputs, **options), wrapped("llama").generate(**inputs, **options))


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_the_cache_grows_whatever_kind_is_asked_for(
    runner: OnnxRunner, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a static cache `generate` makes another mask than the caller's, and it was lost."""
    inputs, options = left_padded(), {"max_new_tokens": 8, "do_sample": False}
    truth = wrapped("llama").generate(**inputs, **options)
    assert torch.equal(runner.generate(**inputs, **options, cache_implementation=kind), truth)
    monkeypatch.setattr(runner.generation_config, "cache_implementation", kind)
    assert torch.equal(runner.generate(**inputs, **options), truth)


def test_a_cache_that_does_not_grow_is_refused(runner: OnnxRunner) -> None:
    cache = StaticCache(config=runner.config, max_cache_len=32)
    with pytest.raises(InvalidInputError, match="is a StaticCache; it must be a DynamicCache, empty or as an earlier"):
        runner(**left_padded(), past_key_values=cache)
    with pytest.raises(InvalidInputError, match=r"is a StaticCache; .*or pass transformers\.DynamicCache"):
        runner.generate(**left_padded(), past_key_values=cache, max_new_tokens=4)
    with pytest.raises(InvalidInputError, match="is a list; it must be a DynamicCache"):
        runner.generate(**left_padded(), past_key_values=[], max_new_tokens=4)


def test_a_cache_that_is_passed_in_is_updated_in_place_as_in_pytorch(runner: OnnxRunner) -> None:
    ids, found = token_ids(2, 8), []
    for model in (runner, wrapped("llama")):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for chunk in ids.split([5, 2, 1], dim=1):
                out = model(chunk, past_key_values=cache)
        assert out.past_key_values is cache
        found.append((cache.get_seq_length(), out.selected_layer[:, -1:].tolist(), out.logits[:, -1:]))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=1e-4)


def test_a_copied_cache_branches_and_a_refused_call_leaves_it_as_it_was(runner: OnnxRunner) -> None:
    ids = token_ids(1, 7)
    cache = runner(ids[:, :5]).past_key_values
    branch = copy.deepcopy(cache)
    with pytest.raises(InvalidInputError, match="ids from 256"):
        runner(torch.tensor([[256]]), past_key_values=cache)
    first = runner(ids[:, 5:6], past_key_values=cache)
    second = runner(ids[:, 5:6], past_key_values=branch)
    assert torch.equal(first.logits, second.logits)
    assert runner(ids[:, 6:], past_key_values=cache, use_cache=False).past_key_values is None
    assert (cache.get_seq_length(), branch.get_seq_length()) == (7, 6)


@pytest.mark.parametrize("returned", [True, False], ids=["returned", "passed in"])
def test_a_second_turn_continues_the_first(runner: OnnxRunner, returned: bool) -> None:
    def turns(model: Any) -> Tensor:
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        given = {} if returned else {"past_key_values": DynamicCache(config=model.config)}
        first = model.generate(token_ids(1, 5), **given, **options)
        cache = first.past_key_values if returned else given["past_key_values"]
        more = torch.cat([first.sequences, token_ids(1, 3, seed=1)], dim=1)
        return model.generate(more, past_key_values=cache, **options).sequences

    assert torch.equal(turns(runner), turns(wrapped("llama")))


def test_a_streamer_sees_every_token_once_and_in_order(runner: OnnxRunner) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    collector = Collector()
    ids = token_ids(1, 4)
    found = runner.generate(ids, max_new_tokens=NEW, do_sample=False, streamer=collector)
    assert collector.tokens == found[0].tolist()
    assert collector.ended


def test_generate_stops_at_a_string(runner: OnnxRunner) -> None:
    """`generate` passes the tokenizer of its stop strings on to the model."""
    tokenizer, ids = AutoTokenizer.from_pretrained(TINY_LM), token_ids(1, 4)
    whole = runner.generate(ids, max_new_tokens=8, do_sample=False)
    stop = tokenizer.decode(whole[0, 6])
    found = runner.generate(ids, max_new_tokens=8, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(found, whole[:, :7])


def test_a_chunked_prompt_gives_what_the_whole_prompt_gives(runner: OnnxRunner) -> None:
    ids = token_ids(2, 10)
    whole = runner(ids)
    past = None
    for chunk in ids.split([3, 1, 6], dim=1):
        out = runner(chunk, past_key_values=past)
        past = out.past_key_values
    assert torch.allclose(out.logits, whole.logits, rtol=0, atol=1e-3)
    assert torch.equal(out.selected_layer, whole.selected_layer)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[3, -1]])}, "ids from -1 to 3; allowed are 0 to 255"),
        ({"input_ids": torch.tensor([[256]])}, "ids from 256 to 256"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": torch.tensor([1, 2])}, r"shape \[2\]"),
        ({"input_ids": torch.tensor([[1.0]])}, "torch.float32"),
        (TOKENS | {"attention_mask": torch.ones(1, 2)}, r"must be \[1, 3\]"),
        (TOKENS | {"position_ids": torch.ones(1, 2, dtype=torch.int64)}, r"\[1, 3\]"),
        ({"input_ids": torch.ones(1, 129, dtype=torch.int64)}, "position 128; the model's context is 128 tokens"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, r"shape \[0, 3\]"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.bool)}, r"input_ids is torch\.bool; it must be .*torch\.int64"),
        ({"input_ids": [[1, 2]]}, "input_ids is list; it must be a tensor"),
        (TOKENS | {"attention_mask": [[1, 1, 1]]}, "attention_mask is list"),
        (TOKENS | {"attention_mask": torch.tensor([[2, 1, 0]])}, "attention_mask holds 2; it must be 1 for tokens"),
        (TOKENS | {"attention_mask": torch.tensor([[-1, 1, 1]])}, "holds -1"),
        (TOKENS | {"attention_mask": torch.tensor([[0.5, 1, 1]])}, r"holds 0\.5"),
        (TOKENS | {"attention_mask": torch.ones(1, 1, 3, 3)}, r"shape \[1, 1, 3, 3\]"),
        (TOKENS | {"position_ids": torch.tensor([[-1, 0, 1]])}, "position_ids holds -1; positions begin at 0"),
        (TOKENS | {"position_ids": torch.tensor([[0, 1, 128]])}, "position 128"),
        (TOKENS | {"position_ids": torch.tensor([[0.0, 1.0, 2.0]])}, r"position_ids is torch\.float32"),
        (TOKENS | {"inputs_embeds": torch.ones(1, 3, 64)}, "does not take inputs_embeds. It takes input_ids"),
        (TOKENS | {"atention_mask": torch.ones(1, 3)}, "does not take atention_mask"),
        (TOKENS | {"output_hidden_states": True}, "does not take output_hidden_states"),
        (TOKENS | {"past_key_values": [(torch.zeros(1, 2, 3, 16),) * 2] * 4}, "is a list; it must be a DynamicCache"),
    ],
)
def test_bad_inputs_are_said_clearly(runner: OnnxRunner, inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        runner(**inputs)


def test_what_asks_for_nothing_is_not_refused(runner: OnnxRunner) -> None:
    plain = runner(**TOKENS).logits
    for mask in (torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.int32)):
        found = runner(**TOKENS, attention_mask=mask, use_cache=False, output_attentions=False, labels=None)
        assert torch.equal(found.logits, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs[:3], "holds 6 tensors; the cache of this artifact has 8"),
        (lambda pairs: [*pairs, pairs[0]], "holds 10 tensors; the cache of this artifact has 8"),
        (lambda pairs: [(k.half(), v.half()) for k, v in pairs], r"torch\.float16.* torch\.float32"),
        (lambda pairs: [(k[:, :1], v[:, :1]) for k, v in pairs], r"\[2, 1, 5, 16\] .*must be \[2, 2, 5, 16\]"),
        (lambda pairs: [(k[:1], v[:1]) for k, v in pairs], r"\[1, 2, 5, 16\] .*must be \[2, 2, 5, 16\]"),
        (lambda pairs: [(k[..., :8], v[..., :8]) for k, v in pairs], r"\[2, 2, 5, 8\] .*must be \[2, 2, 5, 16\]"),
        (lambda pairs: [pairs[0], *((k[:, :, 1:], v[:, :, 1:]) for k, v in pairs[1:])], r"\.1\.key .*\[2, 2, 4, 16\]"),
    ],
    ids=["layer missing", "layer too many", "dtype", "heads", "batch", "head size", "length of one layer"],
)
def test_a_cache_that_does_not_fit_is_said_clearly(runner: OnnxRunner, change: Any, message: str) -> None:
    layers = runner(token_ids(2, 5)).past_key_values.layers
    cache = DynamicCache(change([(layer.keys, layer.values) for layer in layers]))
    with pytest.raises(InvalidInputError, match=message):
        runner(token_ids(2, 1), past_key_values=cache)


def test_prompt_lookup_works_where_all_positions_have_logits_and_is_refused_where_not(runner: OnnxRunner) -> None:
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    with pytest.raises(InvalidInputError, match="positions='all'"):
        runner.generate(ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3)
    every = export.load(artifact("llama", "all"))
    found = every.generate(ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, wrapped("llama").generate(ids, max_new_tokens=NEW, do_sample=False))


def test_a_draft_by_early_exit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="a graph runs all of them or none"):
        export.load(artifact("llama", "all")).generate(token_ids(1, 4), max_new_tokens=4, assistant_early_exit=2)


def test_prompt_lookup_is_refused_where_a_state_cannot_go_back() -> None:
    hybrid, ids = export.load(Path(client("qwen3_5_text", "portable").path).parent), torch.tensor([[5, 6, 7, 5, 6]])
    with pytest.raises(ValueError, match="not supported with stateful models"):
        hybrid.generate(ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3)
