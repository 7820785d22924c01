"""`wrap` and `unwrap`: on every family the layers' own logits, then the plain model back."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DTYPES, FAMILIES, LAYERS, Truth, tiny_model, token_ids, truth
from torch import Tensor
from transformers import AutoModelForCausalLM

import cdsurgery
from cdsurgery import ConfidentHead, ConfidentOutput, SurgeryError

LOOKBACK = 4
IDS = token_ids(3, 12)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class Case:
    """One wrapped forward of one family in one dtype, and what is true of it."""

    out: ConfidentOutput
    candidates: Tensor
    true: Truth


@functools.cache
def case(family: str, dtype: torch.dtype) -> Case:
    true = truth(tiny_model(family, dtype), LOOKBACK, input_ids=IDS)
    seen: list[Tensor] = []
    wrapped = cdsurgery.wrap(tiny_model(family, dtype), lookback=LOOKBACK)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        select = cdsurgery.head.select_beside
        patch.setattr(
            cdsurgery.head,
            "select_beside",
            lambda z, earlier, *rest: (seen.append(torch.cat([z[None], earlier])), select(z, earlier, *rest))[1],
        )
        out = wrapped(IDS)
    (candidates,) = seen
    return Case(out, candidates, true)


@every_dtype
@every_family
def test_final_logits_are_bitwise_those_of_the_plain_model(family: str, dtype: torch.dtype) -> None:
    run = case(family, dtype)
    assert run.out.final_logits.dtype == dtype
    assert run.out.final_logits.isfinite().all()
    assert torch.equal(run.out.final_logits, run.true.candidates[0])


@every_dtype
@every_family
def test_each_candidate_is_bitwise_what_the_model_says_from_that_layers_state(family: str, dtype: torch.dtype) -> None:
    run = case(family, dtype)
    for k, candidate in enumerate(run.candidates):
        assert torch.equal(candidate, run.true.candidates[k]), f"layer L-{k}"


@every_dtype
@every_family
def test_entropies_are_those_of_the_true_candidates_in_float64(family: str, dtype: torch.dtype) -> None:
    run = case(family, dtype)
    assert run.out.entropy.dtype == torch.float32
    # 1e-6 relative: what float32 sums of 256 terms leave (measured 2e-7, docs/numerics.md).
    torch.testing.assert_close(run.out.entropy.double(), run.true.entropy, rtol=1e-6, atol=0)


@every_dtype
@every_family
def test_the_layer_of_algorithm_1_is_selected_and_its_logits_returned(family: str, dtype: torch.dtype) -> None:
    run = case(family, dtype)
    assert run.out.selected_layer.dtype == torch.int64
    assert torch.equal(run.out.selected_layer, run.true.layer)
    assert torch.equal(run.out.logits, run.true.logits)


@every_dtype
@every_family
def test_selection_moves_some_tokens_and_leaves_others(family: str, dtype: torch.dtype) -> None:
    """Against tautology: on models where nothing moves, the tests above would pass without any surgery."""
    run = case(family, dtype)
    depths = set((LAYERS - run.out.selected_layer).flatten().tolist())
    assert {0, 1, 2} <= depths
    moved = run.out.logits.argmax(-1) != run.out.final_logits.argmax(-1)
    assert 0 < moved.sum() < moved.numel() / 2
    gaps = run.true.entropy.diff(dim=-1).abs() / run.true.entropy[..., 1:]
    assert gaps.min() > 4e-6, "two entropies are too near for float32 to order them: take another seed"


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@every_family
def test_unwrap_gives_the_plain_model_back(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    plain_class, attributes = type(model), dict(model.__dict__)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    state_names, signature = list(model.state_dict()), inspect.signature(model.forward)
    wrapped = cdsurgery.wrap(model, lookback=LOOKBACK)
    assert wrapped is model
    assert isinstance(wrapped, ConfidentHead) and isinstance(wrapped, plain_class)
    assert type(wrapped).__name__ == plain_class.__name__
    assert {name: parameter.data_ptr() for name, parameter in wrapped.named_parameters()} == addresses
    assert list(wrapped.state_dict()) == state_names
    assert inspect.signature(wrapped.forward) == signature
    assert cdsurgery.unwrap(wrapped) is model
    assert type(model) is plain_class
    assert model.__dict__.keys() == attributes.keys()
    assert all(model.__dict__[name] is value for name, value in attributes.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, case(family, dtype).true.candidates[0])


@every_family
def test_every_field_of_the_plain_output_is_there_and_unchanged(family: str) -> None:
    asked = {"input_ids": IDS, "use_cache": True, "output_hidden_states": True}
    with torch.no_grad():
        plain = tiny_model(family)(**asked)
        wrapped = cdsurgery.wrap(tiny_model(family), lookback=LOOKBACK)
        out, as_tuple = wrapped(**asked), wrapped(**asked, return_dict=False)
    assert isinstance(out, type(plain)) and isinstance(out, ConfidentOutput)
    assert list(out)[: len(plain)] == list(plain)
    assert list(out)[len(plain) :] == ["final_logits", "selected_layer", "entropy"]
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(out)
    for name, ours, positional in zip(out, out.to_tuple(), as_tuple, strict=True):
        if name == "past_key_values":
            assert ours.get_seq_length() == positional.get_seq_length() == IDS.shape[1]
            continue
        assert_same(ours, positional)
        if name != "logits" and name in plain:
            assert_same(ours, plain[name])


def assert_same(a: Any, b: Any) -> None:
    """Equal tensors, or tuples of equal tensors."""
    for x, y in zip(*((v if isinstance(v, tuple) else (v,)) for v in (a, b)), strict=True):
        assert torch.equal(x, y)


@every_family
def test_saving_a_wrapped_model_writes_the_files_of_the_plain_one(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "plain")
    cdsurgery.wrap(model).save_pretrained(tmp_path / "wrapped")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"config.json", "model.safetensors"} <= names == {path.name for path in (tmp_path / "wrapped").iterdir()}
    for name in names:
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "wrapped")
    assert type(again) is type(cdsurgery.unwrap(model))
    with torch.no_grad():
        assert torch.equal(
            cdsurgery.wrap(again, lookback=LOOKBACK)(IDS).logits, case(family, torch.float32).true.logits
        )


@pytest.mark.parametrize(("lookback", "moves"), [(1, 1), (5, 5), (10, 5), (0.4, 3), (1.0, 5)])
def test_lookback_is_the_number_of_moves_and_its_default_and_shares_are_clipped(lookback: float, moves: int) -> None:
    true = truth(tiny_model("llama"), moves, input_ids=IDS)
    with torch.no_grad():
        out = cdsurgery.wrap(tiny_model("llama"), lookback=lookback)(IDS)
    assert out.entropy.shape == (*IDS.shape, moves + 1)
    assert torch.equal(out.logits, true.logits)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 7, 4])], ids=["last", "last three", "indices"])
def test_only_the_rows_asked_for_are_returned(keep: int | Tensor) -> None:
    full = case("gemma3_text", torch.float32).out
    rows = slice(-keep, None) if isinstance(keep, int) else keep
    with torch.no_grad():
        out = cdsurgery.wrap(tiny_model("gemma3_text"), lookback=LOOKBACK)(IDS, logits_to_keep=keep)
    assert torch.equal(out.selected_layer, full.selected_layer[:, rows])
    # Fewer rows make matrix products of another shape, whose sums differ in the last digits of float32.
    for name in ("logits", "final_logits", "entropy"):
        torch.testing.assert_close(out[name], full[name][:, rows], rtol=1e-5, atol=1e-5)


def test_a_head_that_grows_after_wrapping_is_the_one_that_selects() -> None:
    grown = [tiny_model("llama"), cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)]
    for model in grown:
        torch.manual_seed(5)
        model.resize_token_embeddings(300, mean_resizing=False)
    true = truth(grown[0], LOOKBACK, input_ids=IDS)
    with torch.no_grad():
        assert torch.equal(grown[1](IDS).logits, true.logits)


def test_what_is_wrapped_cannot_be_wrapped_and_what_is_not_cannot_be_unwrapped() -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    with pytest.raises(SurgeryError, match=r"wrapped already, with .*lookback=4.*unwrap"):
        cdsurgery.wrap(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, case("llama", torch.float32).true.logits)
    with pytest.raises(SurgeryError, match="LlamaForCausalLM is not wrapped"):
        cdsurgery.unwrap(cdsurgery.unwrap(model))


def test_arguments_that_the_plain_forward_does_not_take_are_refused_as_it_does() -> None:
    plain, model = tiny_model("llama"), cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    for args, kwargs, message in (
        ((IDS,), {"input_ids": IDS}, r"forward\(\) got multiple values for .*input_ids"),
        ((IDS, *[None] * 30), {}, r"forward\(\) takes .* positional arguments"),
    ):
        for each in (plain, model):
            with pytest.raises(TypeError, match=message):
                each(*args, **kwargs)


def test_a_forward_put_in_its_place_has_to_go_before_the_model_is_unwrapped() -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)
    model.forward = functools.partial(model.forward)  # type: ignore[method-assign]  # as torch.compile would
    with pytest.raises(
        SurgeryError, match=r"put on this LlamaForCausalLM after .* Remove it first: del model\.forward"
    ):
        cdsurgery.unwrap(model)
    del model.forward
    assert not isinstance(cdsurgery.unwrap(model), ConfidentHead)
