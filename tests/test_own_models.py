"""Models that nobody has seen: proven and wrapped, or refused; with an anatomy passed to help, proven all the same."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_model
import pytest
import torch
from families import Truth, algorithm_1, token_ids
from own_model import OwnConfig, OwnForCausalLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForTokenClassification, PreTrainedModel

import cdsurgery
from cdsurgery import Anatomy, InvalidInputError, Transform, UnsupportedModelError
from cdsurgery.zoo import tiny_config

LOOKBACK = 3
IDS = token_ids(3, 12)
RUNGS = tuple(f"ladder.{i}" for i in range(6))


class Scattered(OwnForCausalLM):
    """Its layers are in no list, and one of them is called by a name of its own."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        first, second, third, *_ = self.ladder
        del self.ladder
        self.bottom, self.middle, self.top = first, second, third

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        x = self.letters(input_ids)
        for rung in (self.bottom, self.middle, self.top):
            x = rung(x=x)["stream"]
        return own_model.CausalLMOutputWithPast(logits=self.speech(self.between(self.plumb(x))))


class Gains(OwnForCausalLM):
    """It multiplies the normed state by a number of its own."""

    def between(self, x: Tensor) -> Tensor:
        return x * self.config.gain


GAIN = Transform("gain", "gain", lambda x, gain: x * gain, "Gains.between")


class InSequence(OwnForCausalLM):
    """A norm and a projection that stand in a container at the end are no layers, though they are a chain."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.plumb = nn.Sequential(self.plumb, nn.Linear(config.width, config.width))


def tiny(kind: Callable[[OwnConfig], PreTrainedModel]) -> Any:
    """With weights under which the layer that speaks changes."""
    torch.manual_seed(0)
    model = kind(OwnConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def truth(model: Any, layers: list[nn.Module]) -> Truth:
    """As in `families`, for layers that are named and return a dict."""
    states: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: states.append(out["stream"])) for layer in layers]
    final = model(IDS).logits
    for hook in hooks:
        hook.remove()
    count = min(LOOKBACK, len(layers) - 1)
    earlier = torch.cat(states[-2 : -2 - count : -1])
    swap = layers[-1].register_forward_hook(lambda _, __, out: out | {"stream": earlier})
    candidates = torch.cat([final[None], model(torch.cat([IDS] * count)).logits.unflatten(0, (count, -1))])
    swap.remove()
    log_p = candidates.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).movedim(0, -1)
    depth = torch.tensor([[algorithm_1(row) for row in rows] for rows in entropy.tolist()])
    logits = torch.stack([torch.stack([candidates[k, b, t] for t, k in enumerate(ks)]) for b, ks in enumerate(depth)])
    return Truth(candidates, entropy, len(layers) - depth, logits)


@torch.no_grad()
def agree(model: Any, true: Truth) -> None:
    out = model(IDS)
    assert torch.equal(out.final_logits, true.candidates[0])
    assert torch.equal(out.selected_layer, true.layer) and true.layer.unique().numel() > 1
    assert torch.equal(out.logits, true.logits)
    torch.testing.assert_close(out.entropy.double(), true.entropy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [OwnForCausalLM, InSequence])
def test_a_class_of_ones_own_with_odd_names_is_found_and_proven(kind: type[OwnForCausalLM]) -> None:
    plain = tiny(kind)
    true = truth(plain, list(plain.ladder))
    model = cdsurgery.wrap(plain, lookback=LOOKBACK)
    assert model.anatomy == Anatomy(RUNGS, ("plumb", "speech"))
    agree(model, true)
    text = IDS
    for _ in range(4):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False), text)


def test_parts_that_are_in_no_list_are_found_with_the_anatomy_passed() -> None:
    plain = tiny(Scattered)
    true = truth(plain, [plain.bottom, plain.middle, plain.top])
    with pytest.raises(UnsupportedModelError, match=r"pass them: wrap\(model, anatomy=cdsurgery.Anatomy\(layers, tail"):
        cdsurgery.wrap(plain)
    agree(cdsurgery.wrap(plain, anatomy=Anatomy(("bottom", "middle", "top"), ("plumb", "speech"))), true)


def test_what_is_done_without_a_module_is_passed_as_a_transform() -> None:
    plain = tiny(Gains)
    true = truth(plain, list(plain.ladder))
    with pytest.raises(UnsupportedModelError, match="after 'plumb' the state is changed by something that is not a mo"):
        cdsurgery.wrap(plain)
    agree(cdsurgery.wrap(plain, lookback=LOOKBACK, anatomy=Anatomy(RUNGS, ("plumb", GAIN, "speech"))), true)


UNPROVEN = [
    (RUNGS, ("speech",), "the tail speech does not reproduce the model's logits from x"),
    (RUNGS, ("plumb", "speech"), "the tail plumb -> speech does not reproduce the model's logits from x"),
    (RUNGS[:-1], ("plumb", GAIN, "speech"), r"does not reproduce the model's logits from x\^\(L\)"),
    (RUNGS[::-1], ("plumb", GAIN, "speech"), r"ran in the order \[0, 1, 2, 3, 4, 5\], not each once and in order"),
    (RUNGS[::2] + RUNGS[-1:], ("plumb", GAIN, "speech"), "'ladder.2' does not start from what 'ladder.0' returned"),
    (("ladder.4.turn", "ladder.5"), ("plumb", GAIN, "speech"), "'ladder.5' does not start from what 'ladder.4.turn'"),
    (RUNGS[-1:], ("plumb", GAIN, "speech"), "has one decoder layer"),
]


@pytest.mark.parametrize(("layers", "tail", "found"), UNPROVEN, ids=[row[2][:40] for row in UNPROVEN])
def test_an_anatomy_passed_is_proven_all_the_same(layers: Any, tail: Any, found: str) -> None:
    model = tiny(Gains)
    with pytest.raises(UnsupportedModelError, match=found):
        cdsurgery.wrap(model, anatomy=Anatomy(layers, tail))
    assert type(model) is Gains


@pytest.mark.parametrize(
    ("layers", "tail", "found"),
    [
        (("ladder.0", "ladder.9"), ("plumb", "speech"), r"names \['ladder.9'\].*named_modules"),
        (RUNGS, ("model.norm", "lm_head"), r"names \['model.norm', 'lm_head'\]"),
        ((), ("plumb", "speech"), "names no layers or no modules of a tail"),
        (RUNGS, (GAIN,), "names no layers or no modules of a tail"),
    ],
)
def test_an_anatomy_of_another_model_is_bad_input(layers: Any, tail: Any, found: str) -> None:
    with pytest.raises(InvalidInputError, match=found):
        cdsurgery.wrap(tiny(OwnForCausalLM), anatomy=Anatomy(layers, tail))


class Mute(PreTrainedModel):
    """It cannot generate."""

    config_class, forward, between = OwnConfig, OwnForCausalLM.forward, OwnForCausalLM.between

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        vars(self).update(vars(OwnForCausalLM(config)))

    def get_output_embeddings(self) -> Any:
        return self.speech


def test_what_a_class_cannot_do_its_wrapped_one_cannot_do_either() -> None:
    plain, able = tiny(Mute), tiny(OwnForCausalLM)
    names = ("generate", "prepare_inputs_for_generation")
    mute = cdsurgery.wrap(plain, lookback=2)
    assert not any(hasattr(mute, name) for name in names)
    signatures = [inspect.signature(getattr(able, name)) for name in names]
    speaking = cdsurgery.wrap(able, lookback=2)
    assert [inspect.signature(getattr(speaking, name)) for name in names] == signatures


class Says(OwnForCausalLM):
    """It returns something else than logits for every token."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return self.say(super().forward(input_ids))


OTHERWISE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a tensor": (lambda out: out.logits, "no language head: for ids of shape .* it returned a Tensor with no logits"),
    "one row": (lambda out: type(out)(logits=out.logits[:, -1]), r"with logits of shape \[2, 256\]; needed are logits"),
    "labels": (
        lambda out: type(out)(logits=out.logits[..., :7]),
        "returns 7 numbers a position for a vocabulary of 256",
    ),
    "nothing": (lambda out: out.logits[9], "does not run on token ids alone .IndexError"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_returns_no_logits_of_tokens_is_refused(what: str) -> None:
    model = tiny(Says)
    model.say, found = OTHERWISE[what]
    with pytest.raises(UnsupportedModelError, match=found):
        cdsurgery.wrap(model)


def test_a_head_that_names_tokens_and_not_the_next_one_is_refused() -> None:
    model = LlamaForTokenClassification(tiny_config("llama", num_labels=5))
    with pytest.raises(UnsupportedModelError, match=r"has no language head: get_output_embeddings\(\) is None"):
        cdsurgery.wrap(model)


@pytest.fixture
def folder_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose code is in its folder, as trust_remote_code wants it; running it leaves a mark."""
    folder = tmp_path / "theirs"
    tiny(OwnForCausalLM).save_pretrained(folder)
    code = Path(own_model.__file__).read_text(encoding="utf-8")
    (folder / "code.py").write_text(f"{code}\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    return folder


def test_a_folder_with_code_is_not_run_and_the_model_that_was_trusted_is_wrapped(folder_with_code: Path) -> None:
    mark = folder_with_code.parent / "ran"
    with pytest.raises(InvalidInputError, match=r"\(trust_remote_code\) must be loaded by you and passed as objects"):
        cdsurgery.wrap(folder_with_code)
    assert not mark.exists()
    plain = tiny(OwnForCausalLM)
    true = truth(plain, list(plain.ladder))
    theirs = AutoModelForCausalLM.from_pretrained(folder_with_code, trust_remote_code=True)
    assert mark.exists() and type(theirs) is not OwnForCausalLM
    agree(cdsurgery.wrap(theirs, lookback=LOOKBACK), true)
