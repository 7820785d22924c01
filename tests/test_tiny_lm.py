"""The repository's own model: a real language model, on which both runtimes write the same text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from families import mostly
from transformers import AutoTokenizer

import cdsurgery
from cdsurgery import ConfidentHead, export
from cdsurgery.loading import load_causal_lm
from cdsurgery.trace import trace_generation

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "tiny_lm"

BEGINNINGS = ("def ", "class ", "import ", "    return ", "    if ", "self.", "for i in ", '"""', "# ", "raise ")
ENDINGS = ("", "get", "_name", "x", "a list of ", "value", "None", "os", "test", "read", "self", "error", "str", "is ")
PROMPTS = ["".join(pair) for pair in itertools.product(BEGINNINGS, (*ENDINGS, "len(", "open(", "_", "data", "1", "["))]


@pytest.fixture(scope="module")
def wrapped() -> ConfidentHead:
    return cdsurgery.wrap(FOLDER)


def test_it_is_small_deep_and_safe() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 16_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["num_hidden_layers"] >= 12
    assert config["vocab_size"] <= 4096
    assert not [path.name for path in FOLDER.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


def test_it_has_learned_python() -> None:
    """On code it has never seen, this file's own: far below the ln 4096 = 8.3 nats of knowing nothing."""
    model, tokenizer = load_causal_lm(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    text = Path(__file__).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 5.0


@pytest.mark.parametrize("texts", mostly([40], [40, 200]))
def test_texts_of_64_tokens_are_equal_in_pytorch_and_onnx_runtime(
    texts: int, wrapped: ConfidentHead, tiny_lm: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[:: 200 // texts]]
    report = export.verify(tiny_lm, wrapped, prompts=prompts, new_tokens=64)
    print(report)
    assert report.passed
    assert report.texts == texts
    assert report.tokens_equal > 0.99 * texts * 64
    assert report.moved > 0


def test_confident_decoding_changes_some_tokens_and_traces_are_equal_in_both_runtimes(
    wrapped: ConfidentHead, tiny_lm: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    runner = export.load(tiny_lm)
    changed = 0
    for prompt in ("def ", "class ", "import "):
        inputs = dict(tokenizer(prompt, return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        traces = [trace_generation(m, inputs, max_new_tokens=48, do_sample=False) for m in (wrapped, runner)]
        assert traces[0].ids == traces[1].ids
        assert [t.selected_layer for t in traces[0].tokens] == [t.selected_layer for t in traces[1].tokens]
        changed += traces[0].changed
    assert changed > 0
