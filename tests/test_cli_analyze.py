"""`cdsurgery analyze`: every token of the texts is predicted once, and what it says of that is what was found."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CONTEXT, ESCAPE, LAYERS
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import cdsurgery
from cdsurgery import export
from cdsurgery.analysis import Analysis, Prediction
from cdsurgery.cli.main import main
from cdsurgery.cli.windows import text_windows

LONG = "def f(x):\n    return x + 1\n\n\nclass A:\n    import os\n" * 3
SHORT = "import os"


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "long.py", tmp_path / "short.py"]
    for path, text, encoding in zip(paths, (LONG, SHORT), ("utf-8", "utf-8-sig"), strict=True):  # one with a mark
        path.write_text(text, encoding=encoding, newline="")
    return [str(path) for path in paths]


def analyzed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["analyze", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7, 50, CONTEXT])
def test_every_token_but_the_first_of_a_text_is_predicted_once(
    tokens: int, folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = analyzed(capsys, str(folder), "--text", *texts, "--tokens", str(tokens))
    plain, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses, right, windows = [], [], set()
    for number, text in enumerate((LONG, SHORT)):
        ids = torch.tensor(tokenizer(text).input_ids)
        for place in range(1, len(ids)):
            window = (place - 1) // tokens
            windows.add((number, window))
            logits = plain(ids[None, window * tokens : place]).logits[0, -1]
            losses.append(float(torch.nn.functional.cross_entropy(logits.double(), ids[place])))
            right.append(int(logits.argmax()) == int(ids[place]))
    assert found["positions"] == len(losses) == sum(found["depths"])
    assert (found["windows"], found["window_tokens"], found["texts"]) == (len(windows), tokens, texts)
    assert found["final"]["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["final"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert (found["layers"], found["lookback"], found["measure"], found["runtime"]) == (LAYERS, 3, "entropy", "torch")
    assert found["shares"] == pytest.approx([count / len(losses) for count in found["depths"]])


def test_a_window_is_256_tokens_or_the_context(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LONG.encode())))
    found = analyzed(capsys, str(folder))
    assert (found["window_tokens"], found["texts"]) == (CONTEXT, ["standard input"])
    config = LlamaConfig.from_pretrained(folder)
    shutil.copytree(folder, tmp_path / "model")
    config.max_position_embeddings = 512
    config.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LONG.encode())))
    assert analyzed(capsys, str(tmp_path / "model"))["window_tokens"] == 256


@pytest.mark.parametrize("tokens", [1, 2, 5, 100])
def test_every_window_begins_as_the_tokenizer_has_a_text_begin(tokens: int, folder: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(folder), LlamaConfig.from_pretrained(folder)
    body = tokenizer(SHORT).input_ids
    tokenizer.bos_token = "<end>"
    mark = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", mark)])
    assert tokenizer(SHORT).input_ids == [mark, *body]
    windows = [window.tolist() for window in text_windows(tokenizer, "text", SHORT, config, tokens)]
    assert all(window[0] == mark for window in windows)
    assert [token for window in windows for token in window[1:]] == body
    assert [len(window) - 1 for window in windows[:-1]] == [tokens] * (len(windows) - 1)


def test_it_says_in_words_what_it_prints_as_json(
    folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = analyzed(capsys, str(folder), "--text", *texts)
    assert main(["analyze", str(folder), "--text", *texts]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["layer", "selected", "share", "entropy", "in", "nats"]
    for depth, row in enumerate(lines[1 : LAYERS + 1]):
        count, share, entropy = found["depths"][depth], found["shares"][depth], found["entropy"][depth]
        bar = "#" * round(32 * count / max(found["depths"]))
        assert row == [str(LAYERS - depth), str(count), f"{share:.1%}", f"{entropy:.3f}", *([bar] if bar else [])]
    for name in ("final", "selected"):
        each = found[name]
        numbers = f"{each['entropy']:.3f} {each['nll']:.4f} {each['perplexity']:.2f} {each['accuracy']:.1%}"
        assert [name, "layer", *numbers.split()] in lines
    positions, moved, changed = (found[name] for name in ("positions", "moved", "changed"))
    assert f"{positions} positions in 2 windows of up to 128 tokens." in out
    assert f"{moved} ({moved / positions:.1%}) move to an earlier layer, mean depth {found['mean_depth']:.2f}" in out
    assert f"entropy falls by {found['mean_fall']:.3f} nats on average" in out
    assert f"The most likely token changes at {changed} ({changed / positions:.1%})." in out
    assert "Reading the text" in err and ESCAPE not in out + err


def test_examples_are_in_their_places_in_the_text(
    folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = analyzed(capsys, str(folder), "--text", *texts)
    assert 0 < len(found["changes"]) <= found["changed"]
    for change in found["changes"]:
        assert change["context_text"] + change["text"] in LONG + SHORT
        assert change["final_token"] != change["selected_token"]
        assert change["selected_layer"] < LAYERS and change["selected_entropy"] < change["final_entropy"]


@pytest.mark.parametrize(
    ("nll", "verdict"),
    [
        (2.75, "The selected layers predict this text worse than the final one: 0.7500 nats a token more."),
        (1.5, "The selected layers predict this text better than the final one: 0.5000 nats a token less."),
        (2.0, "The selected layers predict this text as well as the final one."),
        (float("nan"), "cannot be compared"),
    ],
    ids=str,
)
def test_it_says_which_layer_predicts_the_text_better(
    nll: float, verdict: str, folder: Path, texts: list[str], monkeypatch: Any, capsys: Any
) -> None:
    final = Prediction(1.0, 2.0, 0.5)
    made = Analysis(LAYERS, (3, 1), 0, (1.0, 1.1), final, replace(final, nll=nll), ())
    monkeypatch.setattr("cdsurgery.analysis.analyze", lambda *_arguments, **_options: made)
    assert main(["analyze", str(folder), "--text", *texts]) == 0
    assert verdict in capsys.readouterr().out.splitlines()[-1]


def test_an_artifact_reads_as_its_model_does(
    folder: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, artifact = AutoTokenizer.from_pretrained(folder), str(tmp_path / "artifact")
    export.to_onnx(cdsurgery.wrap(folder, lookback=2), artifact, tokenizer=tokenizer, positions="all", parity=False)
    arguments = ["--text", *texts, "--tokens", "20"]
    model, made = analyzed(capsys, str(folder), *arguments, "--lookback", "2"), analyzed(capsys, artifact, *arguments)
    assert (model["runtime"], made["runtime"]) == ("torch", "onnxruntime")
    counts = ("positions", "windows", "depths", "changed", "layers", "lookback", "measure")
    assert [model[name] for name in counts] == [made[name] for name in counts]
    for name in ("final", "selected"):
        assert made[name] == pytest.approx(model[name], rel=1e-4)
    assert main(["analyze", artifact, *arguments, "--device", "cpu", "--seed", "1", "--lookback", "2"]) == 2
    assert "Leave out --lookback, --seed, --device" in capsys.readouterr().err
    manifest = tmp_path / "artifact" / "cdsurgery.json"
    manifest.write_text(manifest.read_text().replace('"positions": "all"', '"positions": "last"'))
    assert main(["analyze", artifact, *arguments]) == 2
    assert "was made with positions='last', and a text is read at every position" in capsys.readouterr().err


BAD_INPUT = {
    "no tokens": (["<empty>"], "has length 0 in tokens; it must be at least 2"),
    "one token": (["<one>"], "has length 1 in tokens; it must be at least 2"),
    "no file": (["/no/such/text"], "/no/such/text cannot be read: No such file or directory"),
    "a folder": (["<folder>"], "cannot be read: Is a directory"),
    "not UTF-8": (["<latin>"], "latin is not UTF-8: byte 3 cannot be decoded"),
    "no tokens at once": (["<long>", "--tokens", "0"], "--tokens is 0; it must be at least 1"),
    "beyond the context": (["<long>", "--tokens", "129"], "--tokens is 129, and the model's context holds 128"),
    "ordinary decoding": (["<long>", "--probability", "0"], "no layer is selected"),
    "lookback": (["<long>", "--lookback", "4"], "Use an integer in [1, 3]"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    for name, content in {"empty": b"", "one": b"x", "latin": b"caf\xe9", "long": LONG.encode()}.items():
        (tmp_path / name).write_bytes(content)
    file, *flags = arguments
    path = file if file.startswith("/") else str(tmp_path / file.strip("<>"))
    assert main(["analyze", str(folder), "--text", path, *flags]) == 2
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1] and err.count("cdsurgery: error: ") == 1
    assert out == "" and "Traceback" not in err


def test_without_a_text_a_model_or_a_tokenizer_it_says_what_to_do(
    folder: Path, texts: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "bare")
    for model, message in {
        str(tmp_path / "bare"): "No tokenizer could be loaded",
        "/no/such/model": "There is no folder /no/such/model",
    }.items():
        assert main(["analyze", model, "--text", *texts]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["analyze", str(folder)]) == 2
    assert "There is no text. Name files with --text FILE" in capsys.readouterr().err
