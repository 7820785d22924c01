"""`cdsurgery bench`: what it times is the model in the state that it names, on the texts that it says."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import LAYERS
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import cdsurgery
from cdsurgery.cli.main import main

NEW, ROUNDS = 4, 2
SHORT = ["--prompt", "def f(x)", "--max-new-tokens", str(NEW), "--rounds", str(ROUNDS)]


@dataclass
class Written:
    """One text that a model wrote, and how it was wrapped then: "plain" if it was not."""

    way: str
    prompt: Tensor
    text: Tensor
    config: cdsurgery.ConfidentConfig | None
    hooks: int


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Written]:
    """Every text, each of which takes as many seconds as the name of its way has letters."""
    clock, texts = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    inner = LlamaForCausalLM.generate

    def generate(self: Any, input_ids: Tensor, **options: Any) -> Tensor:
        config = getattr(self, "confident", None)
        way = config.scan if config else "plain"
        hooks = sum(len(module._forward_hooks) for module in self.modules())
        text = inner(self, input_ids, **options)
        texts.append(Written(way, input_ids, text, config, hooks))
        clock[0] += len(way)
        return text

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    return texts


def benched(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_way_is_timed_in_its_own_state_beside_the_model_as_it_was(
    folder: Path, written: list[Written], capsys: pytest.CaptureFixture[str]
) -> None:
    found = benched(capsys, str(folder), *SHORT, "--batch", "3", "--lookback", "2", "--probability", "0.5")
    traced, *timed = written
    ways = ["plain", "fused", "lazy", "full"]
    assert [text.way for text in timed] == [*ways, *ways[1:], ways[0], *ways[2:], *ways[:2]]
    assert [(way["name"], way["ratio"], way["low"], way["high"]) for way in found["ways"]] == [
        (way, len(way) / 5, len(way) / 5, len(way) / 5) for way in ways
    ]
    assert [way["tokens_per_second"] for way in found["ways"]] == [3 * NEW / len(way) for way in ways]
    assert {text.hooks for text in timed if text.way == "plain"} == {0}
    hooks = {"fused": 3, "lazy": 2, "full": 2}  # two layers are tapped; a fused scan has one on the norm, too
    assert {text.way: text.hooks for text in timed if text.config} == hooks
    assert {(text.config.lookback, text.config.seed) for text in timed if text.config} == {
        (2, traced.config.seed)  # type: ignore[union-attr]
    }
    assert found["refused"] == {}

    plain, prompt = LlamaForCausalLM.from_pretrained(folder), timed[0].prompt
    assert torch.equal(traced.prompt, prompt[:1])
    assert {tuple(row.sort().values.tolist()) for row in prompt} == {tuple(prompt[0].sort().values.tolist())}
    assert len({tuple(row.tolist()) for row in prompt}) == 3, "texts that are all alike"
    assert all(torch.equal(text.prompt, prompt) for text in timed)
    lengths = {text.text.shape for text in timed}
    assert lengths == {(3, prompt.shape[1] + NEW)}
    own = plain.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert all(torch.equal(text.text, own) for text in timed if text.way == "plain")


def test_moved_tokens_are_those_of_the_first_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = benched(capsys, str(folder), *SHORT)
    assert main(["generate", str(folder), "def f(x)", "--max-new-tokens", str(NEW), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["selected_layers"]
    assert (found["layers"], found["lookback"], found["new_tokens"]) == (LAYERS, LAYERS - 1, NEW)
    assert found["moved"] == sum(layer < LAYERS for layer in layers) > 0
    assert found["mean_depth"] == pytest.approx(sum(LAYERS - layer for layer in layers) / NEW)


def test_no_text_ends_before_it_is_as_long_as_the_others(
    folder: Path, tmp_path: Path, written: list[Written], capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    first = model.generate(torch.tensor([[40, 41]]), max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1]
    written.clear()
    tokens = sorted({*range(model.config.vocab_size)})
    model.generation_config.eos_token_id = model.config.eos_token_id = [int(first), *tokens]
    model.generation_config.num_beams, model.generation_config.max_time = 2, 1e-9
    model.save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    benched(capsys, str(tmp_path), *SHORT)
    assert {text.text.shape[1] - text.prompt.shape[1] for text in written} == {NEW}


def test_a_scan_that_the_model_refuses_is_left_out_and_said(
    folder: Path, written: list[Written], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(folder), *SHORT, "--measure", "log_p_squared"]) == 0
    out = capsys.readouterr().out
    assert {text.way for text in written} == {"auto", "plain", "lazy", "full"}
    assert "fused was left out: scan is 'fused' and measure 'log_p_squared'" in out
    assert [line.split() for line in out.splitlines()[:4]] == [
        ["way", "time", "quartiles", "tokens", "a", "second"],
        ["plain", "1.00", f"{NEW / 5:.1f}"],
        ["lazy", "0.80", "0.80", "to", "0.80", f"{NEW / 4:.1f}"],
        ["full", "0.80", "0.80", "to", "0.80", f"{NEW / 4:.1f}"],
    ]
    assert f"1 text of {NEW} tokens after {written[0].prompt.shape[1]}, 2 rounds; cpu, 1 threads, float32" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds is 1; it must be at least 2"),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt", "x " * 100], "the model's context holds 128. Shorten the prompt"),
        (["--device", "sofa"], "--device is sofa, where PyTorch cannot compute"),
        (["--device", "meta"], "--device is meta, where PyTorch cannot compute"),
        (["--device", "cuda:77"], "--device is cuda:77, where PyTorch cannot compute"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_bad_input_is_said_before_anything_is_timed(
    arguments: list[str], message: str, folder: Path, written: list[Written], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert (out, written) == ("", [])


def test_a_model_that_a_device_does_not_hold_is_an_error_with_its_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nn.Module, "to", full)
    assert main(["generate", str(folder), "x", "--device", "cpu"]) == 2
    assert "The memory of cpu does not hold" in capsys.readouterr().err


def test_a_model_runs_where_it_was_asked_to(
    folder: Path, shown: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(folder), "def ", "--max-new-tokens", "4", "--json"]
    texts = []
    for device in ([], ["--device", "cpu:0"]):
        assert main([*arguments, *device]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1]
    assert main(["generate", str(shown[0]), "def ", "--device", "cpu"]) == 2
    assert "Leave out --device" in capsys.readouterr().err
