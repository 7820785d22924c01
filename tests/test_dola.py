"""DoLa's process: it writes the text that it is asked for, and what goes wrong in it is not taken for a time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import benchmarks.__main__
import benchmarks.dola
from benchmarks.machine import Limits
from benchmarks.parts import dola
from benchmarks.setting import Setting
from benchmarks.shapes import SHAPES

SETTING = Setting("tiny", lookback=1, batch=2, context=8, new=3, rounds=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    monkeypatch.setitem(SHAPES, "tiny", ("llama", sizes | {"num_hidden_layers": 2}))


def environment(place: Path, script: str) -> Path:
    """One whose Python is this shell script."""
    python = place / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return place


def test_its_texts_are_timed_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    script = (
        f'echo "$@" > {said}.call; while read -r way; do echo "$way" >> {said}; echo done; done; echo end >> {said}'
    )
    monkeypatch.setattr(dola, "ENVIRONMENT", environment(tmp_path, script))
    timings = dola.generations(SETTING)
    first, low, high = dola.WAYS
    assert [timing.name for timing in timings] == [first, low, high]
    assert said.read_text().splitlines() == [first, low, high, low, high, first, high, first, low, "end"]
    assert Path(f"{said}.call").read_text() == f"-m benchmarks.dola {json.dumps(asdict(SETTING))}\n"


@pytest.mark.parametrize("script", ["exit 3", "read -r way; echo donut; exit 3"])
def test_a_process_that_fails_is_an_error(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dola, "ENVIRONMENT", environment(tmp_path, script))
    with pytest.raises((subprocess.CalledProcessError, BrokenPipeError)):
        dola.generations(SETTING)


def test_without_its_environment_it_is_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dola, "ENVIRONMENT", Path("nowhere"))
    (note,) = benchmarks.__main__.PARTS["generation"](SETTING, Limits(1e9, 1e9)).notes
    assert note == "DoLa was not measured: nowhere/bin/python is not there: make .venv-dola/ready makes it."


def test_the_process_writes_a_text_for_each_name_and_says_nothing_but_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts: list[dict[str, Any]] = []

    def generate(self: Any, ids: torch.Tensor, **options: Any) -> None:
        print("a remark")
        texts.append(
            {"prompts": tuple(ids.shape), "dola": options.get("dola_layers"), "new": options["max_new_tokens"]}
        )

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    monkeypatch.setattr(sys, "argv", ["dola", json.dumps(asdict(SETTING))])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{way}\n" for way in reversed(dola.WAYS))))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # it puts another in its place
    benchmarks.dola.main()
    assert texts == [{"prompts": (2, 8), "dola": layers, "new": 3} for layers in ("high", "low", None)]
    assert capsys.readouterr() == ("done\n" * 3, "a remark\n" * 3)
