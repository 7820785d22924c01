"""The command line on bad input: one message that says what, what is allowed and what to do, and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ESCAPE, exit_code
from transformers import T5Config

from cdsurgery.cli.main import main

MODEL = "<model>"  # stands for the folder of the fixture
BAD_INPUT = {
    "unknown path": (["inspect", "/no/such/model"], "There is no folder /no/such/model"),
    "unknown path, generate": (["generate", "/no/such/model", "x"], "There is no folder /no/such/model"),
    "no config": (["inspect", "<empty>"], "has no config.json"),
    "encoder-decoder": (["inspect", "<t5>"], "encoder-decoder"),
    "lookback 0": (["inspect", MODEL, "--lookback", "0"], "lookback is 0; as an integer it must be at least 1"),
    "lookback negative": (["inspect", MODEL, "--lookback", "-2"], "lookback is -2"),
    "lookback beyond the depth": (["inspect", MODEL, "--lookback", "4"], "Use an integer in [1, 3]"),
    "lookback 0.0": (["inspect", MODEL, "--lookback", "0.0"], "a float in (0, 1]"),
    "lookback 1.5": (["inspect", MODEL, "--lookback", "1.5"], "a float in (0, 1]"),
    "lookback nan": (["inspect", MODEL, "--lookback", "nan"], "a float in (0, 1]"),
    "probability above 1": (["inspect", MODEL, "--probability", "1.1"], "it must be a number in [0, 1]"),
    "probability below 0": (["inspect", MODEL, "--probability", "-0.1"], "it must be a number in [0, 1]"),
    "seed negative": (["generate", MODEL, "x", "--seed", "-1"], "seed is -1"),
    "seed negative, plain": (["generate", MODEL, "x", "--plain", "--seed", "-1"], "seed is -1"),
    "unknown measure": (["inspect", MODEL, "--measure", "variance"], "it must be one of entropy, log_p_squared"),
    "empty prompt": (["generate", MODEL, ""], "The prompt is empty"),
    "beyond the context": (
        ["generate", MODEL, "x y z", "--max-new-tokens", "124"],
        "The prompt has 5 tokens; with 124 new ones that is 129, and the model's context holds 128. Shorten the prompt",
    ),
    "no new tokens": (["generate", MODEL, "x", "--max-new-tokens", "0"], "it must be at least 1"),
    "not UTF-8": (["generate", MODEL, "a\udcff"], "The prompt is not UTF-8"),
    "temperature 0": (["generate", MODEL, "x", "--sample", "--temperature", "0"], "a number of at least 1e-06"),
    "hardly a temperature": (["generate", MODEL, "x", "--sample", "--temperature", "1e-40"], "of at least 1e-06"),
    "a file twice": (["analyze", MODEL, "--text", "a.txt", "a.txt"], "a.txt is named more than once"),
    "a file in two ways": (["analyze", MODEL, "--text", "a.txt", "./a.txt"], "./a.txt, a.txt is named more than once"),
    "top-p above 1": (["generate", MODEL, "x", "--sample", "--top-p", "1.2"], "it must be in (0, 1]"),
    "temperature alone": (["generate", MODEL, "x", "--temperature", "0.5"], "add --sample"),
    "plain with lookback": (["generate", MODEL, "x", "--plain", "--lookback", "2"], "leave out --lookback"),
    "artifact exists": (["export", "onnx", MODEL, "<empty>"], "exists already"),
    "artifact in no folder": (["export", "onnx", MODEL, "<empty>/no/artifact"], "does not exist"),
    "kept artifact exists": (["demo", "--model", MODEL, "--keep", "<empty>"], "exists already"),
    "demo of no model": (["demo", "--model", "/no/such/model"], "There is no folder /no/such/model"),
    "not an artifact": (["verify", "<empty>", "--against", MODEL], "is not an artifact"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    T5Config().save_pretrained(tmp_path / "t5")
    places = {MODEL: str(folder), "<empty>": str(tmp_path / "empty"), "<t5>": str(tmp_path / "t5")}
    for mark, place in places.items():
        arguments = [argument.replace(mark, place) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("cdsurgery: error: ")]
    assert len(errors) == 1 and message in errors[0] and err.splitlines()[-1] == errors[0]
    assert out == "" and "Traceback" not in err and ESCAPE not in err
    assert sorted(tmp_path.rglob("*")) == before, "something was left half written"


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["generate", "model"], ["export", "onnx", "m"], ["inspect", "m", "--lookback", "ten"], ["verify"]],
    ids=" ".join,
)
def test_bad_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(arguments) == 2
    assert "usage: cdsurgery" in capsys.readouterr().err


def test_without_a_command_help_is_printed_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([]) == 2
    assert "examples:" in capsys.readouterr().err


def test_an_error_is_a_json_document_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["type"] == "InvalidInputError" and error["message"] in err


def test_an_export_that_fails_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdsurgery.errors import ArtifactError
    from cdsurgery.export import onnx

    def fail(*_arguments: Any) -> None:
        raise ArtifactError("the graph is not right")

    monkeypatch.setattr(onnx, "_trace", fail)
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact")]) == 2
    assert "the graph is not right" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_message_says_what_to_install(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("cdsurgery.export")
    monkeypatch.delitem(sys.modules, "cdsurgery.export")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact")]) == 2
    assert "pip install 'cdsurgery[onnx]'" in capsys.readouterr().err
