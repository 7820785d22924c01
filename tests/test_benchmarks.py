"""The benchmark suite: what it times is what it says, and rows descend as often as asked."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from families import tiny_model, token_ids
from transformers import AutoModelForCausalLM

import benchmarks.__main__
import cdsurgery
from benchmarks.fused_unembedding import unembeddings
from benchmarks.schedule import scheduled
from benchmarks.shapes import SHAPES, random_model
from benchmarks.timing import interleaved


def test_ratios_are_of_the_same_round_and_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(name: str, seconds: float) -> None:
        ran.append(name)
        slowness = [100.0, 1.0, 5.0, 1.0, 1.0][(len(ran) - 1) // 2]  # of the whole machine, in each round
        clock[0] += seconds * slowness

    first, second = interleaved({"a": lambda: work("a", 2.0), "b": lambda: work("b", 3.0)}, rounds=4)
    assert ran == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert (first.ratio, second.ratio, second.low, second.high) == (1.0, 1.5, 1.5, 1.5)
    assert (first.milliseconds, second.milliseconds) == (2000.0, 3000.0)


@pytest.mark.parametrize("scan", ["lazy", "full"])
@pytest.mark.parametrize("rate", [0.0, 0.115, 1.0])
@torch.no_grad()
def test_rows_move_as_often_as_scheduled_and_by_one_layer(scan: str, rate: float) -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=3, scan=scan)
    with scheduled(rate):
        depths = 6 - torch.cat([model(token_ids(8, 25, seed), logits_to_keep=0).selected_layer for seed in range(5)])
    assert set(depths.flatten().tolist()) <= {0, 1}
    # Of 1,000 draws; three standard deviations of a share of 0.115 are 0.03.
    assert depths.float().mean() == pytest.approx(rate, abs=0.03)
    assert 6 - model(token_ids(8, 25), logits_to_keep=0).selected_layer.min() > 1, "the schedule outlived its context"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_is_compared_with_one_row_and_with_all_logits(dtype: torch.dtype) -> None:
    timings = unembeddings(500, 32, 4, dtype, rounds=2)
    names = ["one row's logits", "read W", "logits, then entropy", "fused", "fused, logits written"]
    assert [timing.name for timing in timings] == names
    assert timings[0].ratio == 1.0


def test_all_shapes_can_be_made() -> None:
    for name, config in SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parameters == pytest.approx(
            {"qwen3-0.6b": 0.6e9, "llama-3.1-8b": 8.03e9}.get(name, parameters), rel=0.01
        )
    assert random_model("tiny", torch.float32).training is False


def test_the_command_writes_its_figures_with_machine_versions_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["benchmarks", "step", "prefill", "--shape", "tiny", "--context", "8", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path)])
    benchmarks.__main__.main()
    shown = capsys.readouterr().out
    for part in ("step", "prefill"):
        assert (tmp_path / f"{part}.md").read_text() in shown
        document = json.loads((tmp_path / f"{part}.json").read_text())
        assert [timing["name"] for timing in document["timings"]] == ["unwrapped", "lazy", "full", "published"]
        assert document["timings"][0]["ratio"] == 1.0
        assert {"torch", "reads", "date", "command"} <= set(document["about"])
        assert "--shape tiny" in document["about"]["command"]


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "dance"])
    with pytest.raises(SystemExit, match=r"No such part: dance\. There are step, prefill, onnx, unembedding"):
        benchmarks.__main__.main()
