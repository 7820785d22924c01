"""What a wrapped forward holds and computes: the kept rows of K layers, and nothing of the length of a long prompt."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from families import HIDDEN, LAYERS, VOCABULARY, decoder_layers, tiny_model, token_ids
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import cdsurgery
import cdsurgery.taps
from benchmarks.parts.memory import Peak

LOOKBACK, LENGTH = 5, 4096
IDS = token_ids(1, LENGTH)
ONE_STATE = LENGTH * HIDDEN * 4  # bytes of S x D in float32


@torch.no_grad()
def peak(model: nn.Module, keep: int) -> int:
    with Peak(model.parameters()) as measured:
        model(IDS, logits_to_keep=keep, use_cache=False)
    return measured.bytes


def model_of_long_prompts() -> Any:
    return tiny_model("llama", max_position_embeddings=LENGTH)


def test_a_prefill_of_4096_tokens_holds_no_state_of_another_layer() -> None:
    plain, wrapped = (peak(model, 1) for model in (model_of_long_prompts(), wrap_deep(model_of_long_prompts())))
    assert plain > ONE_STATE, "the measurement sees nothing"
    # K kept rows of D, and M rows of V in a handful of float32 copies: far less than the state of one layer.
    assert 0 <= wrapped - plain < ONE_STATE // 8


def test_the_measurement_sees_a_slice_that_keeps_its_whole_prompt_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against tautology: with the tap's slice a view, K states of the prompt stay until the forward ends."""
    plain = peak(model_of_long_prompts(), 1)

    def tap_a_view(tap: Any, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if tap.taps.keep is not None:
            tap.taps.states[tap.index] = output[:, -tap.taps.keep :]

    monkeypatch.setattr(cdsurgery.taps._Tap, "__call__", tap_a_view)
    assert peak(wrap_deep(model_of_long_prompts()), 1) - plain > 2 * ONE_STATE


def wrap_deep(model: Any) -> Any:
    return cdsurgery.wrap(model, lookback=LOOKBACK)


@pytest.mark.parametrize(("keep", "rows"), [(1, 1), (7, 7), (torch.tensor([3, 90, 5]), 3), (0, 128)])
@torch.no_grad()
def test_only_the_kept_rows_of_the_candidates_are_normed_and_projected(keep: Any, rows: int) -> None:
    model, ids = wrap_deep(tiny_model("llama")), token_ids(2, 128)
    normed, projected, held = [], [], []
    model.model.norm.register_forward_pre_hook(lambda _, args: normed.append(tuple(args[0].shape)))
    model.lm_head.register_forward_pre_hook(lambda _, args: projected.append(tuple(args[0].shape)))
    cat = torch.cat

    def note(states: Any, *rest: Any, **options: Any) -> Tensor:
        if len(states) == LOOKBACK:  # the model puts other things together, two at a time
            held.extend(state.untyped_storage().nbytes() for state in states)
        return cat(states, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cdsurgery.anatomy.torch, "cat", note)
        out = model(ids, logits_to_keep=keep)
    assert normed == [(2, 128, HIDDEN), (LOOKBACK * 2, rows, HIDDEN)]  # the model's own call, and ours
    assert projected == [(2, rows, HIDDEN), (LOOKBACK * 2, rows, HIDDEN)]
    assert held == [2 * rows * HIDDEN * 4] * LOOKBACK
    assert out.logits.shape == out.final_logits.shape == (2, rows, VOCABULARY)


@torch.no_grad()
def test_all_rows_of_a_text_take_the_logits_of_their_candidates_once() -> None:
    model, ids = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="full"), token_ids(32, 128)
    with Peak(model.parameters()) as measured:
        model(ids, use_cache=False)
    one = ids.numel() * VOCABULARY * 4
    # K candidates, the final and the selected logits, and what is picked; and some states, a quarter of that each.
    assert (LOOKBACK + 2) * one < measured.bytes < (LOOKBACK + 6) * one


@torch.no_grad()
def test_nothing_is_held_once_the_forward_has_returned() -> None:
    model = wrap_deep(tiny_model("llama"))
    states: list[StorageWeakRef] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _, __, out: states.append(StorageWeakRef(out.untyped_storage())))
    out = model(token_ids(2, 12), logits_to_keep=0)
    assert len(states) == LAYERS
    assert all(state.expired() for state in states)
    assert out.logits.untyped_storage().nbytes() == out.logits.nbytes, "the selection is a view of all candidates"


@torch.no_grad()
def test_parameters_are_not_copied() -> None:
    model = tiny_model("gemma3_text", tie_word_embeddings=True)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters(remove_duplicate=False)}
    with Peak() as made:
        wrapped = wrap_deep(model)
    assert {name: p.data_ptr() for name, p in wrapped.named_parameters(remove_duplicate=False)} == addresses
    assert wrapped.lm_head.weight is wrapped.model.embed_tokens.weight
    own = {parameter.untyped_storage()._cdata for parameter in wrapped.parameters()}
    assert own & made.alive.keys(), "the measurement does not tell parameters from copies"
    held = sum(size for key, (reference, size) in made.alive.items() if key not in own and not reference.expired())
    assert held == 0, "the probe, or a copy of something, is still there"


PEAK = """
import resource, torch, cdsurgery
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=50_000, hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4)
model = cdsurgery.wrap(LlamaForCausalLM(LlamaConfig(**sizes)), scan="fused")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    model(torch.zeros(1, 256, dtype=torch.int64))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes, as Linux does")
def test_the_process_itself_grows_by_less_than_the_logits_of_all_candidates() -> None:
    """What is held is little, but where it lies decides whether memory that was freed can be used again."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    one = 256 * 50_000 * 4  # the logits of one layer in float32; there are eleven, and the model's own are returned
    assert int(done.stdout) < 6 * one
