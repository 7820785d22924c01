"""The benchmark suite: what it times is what it says, and rows descend as often as asked."""

from __future__ import annotations

import copy
import functools
import gc
import json
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny_model, token_ids
from support import Operations, data_dependent

import benchmarks.__main__
import cdsurgery.one_pass
from benchmarks import machine
from benchmarks.machine import Limits
from benchmarks.models import decode_step, filled_cache, wrapped
from benchmarks.parts import dola, step, sweep
from benchmarks.parts.memory import Peak
from benchmarks.picture import overhead_picture
from benchmarks.report import Table
from benchmarks.schedule import scheduled
from benchmarks.setting import Setting
from benchmarks.shapes import SHAPES
from cdsurgery import timing


@pytest.mark.parametrize("way", ["lazy", "full", "fused"])
@pytest.mark.parametrize("rate", [0.0, 0.115, 1.0])
@pytest.mark.parametrize("lookback", [1, 3])
@pytest.mark.parametrize(("rows", "calls"), [(25, 5), (1, 125)], ids=["projected again", "written"])
@torch.no_grad()
def test_rows_move_as_often_as_scheduled_and_by_one_layer(
    way: str, rate: float, lookback: int, rows: int, calls: int
) -> None:
    model = wrapped(tiny_model("llama"), lookback, way)
    with scheduled(rate):
        moved = [model(token_ids(8, rows, seed), logits_to_keep=0).selected_layer for seed in range(calls)]
    depths = 6 - torch.cat(moved)
    assert set(depths.flatten().tolist()) <= {0, 1}
    # Of 1,000 draws; three standard deviations of a share of 0.115 are 0.03.
    assert depths.float().mean() == pytest.approx(rate, abs=0.03)
    deepest = 6 - model(token_ids(8, 25), logits_to_keep=0).selected_layer.min()
    assert deepest == lookback, "the schedule outlived its context"


@pytest.mark.parametrize("family", sorted({family for family, _ in SHAPES.values()}))
@torch.no_grad()
def test_a_step_is_that_after_the_context_and_goes_by_no_value(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step finds its cache where it was; windows are of 8 tokens in the tiny models, fewer than these."""
    monkeypatch.setattr(cdsurgery.one_pass, "can_look", lambda _: False)  # as where a step is captured
    monkeypatch.setattr(machine, "GPU", False)
    plain = tiny_model(family)
    texts = torch.stack([torch.tensor([*range(20), token]) for token in range(3)])
    true = plain(texts, use_cache=False).logits[:, -1:]
    assert not torch.allclose(true[0], true[1], atol=0.1)
    cache = filled_cache(plain, 3, 20)
    outputs: list[Any] = []
    for model in (plain, wrapped(plain, 3, "fused")):
        twin = copy.deepcopy(cache)
        before = [(state.clone(), state.data_ptr()) for layer in twin.layers for state in kept(layer)]
        with Operations() as run:
            hook = model.register_forward_hook(lambda _, __, out: outputs.append(out))
            decode_step(model, twin, 3)()
            hook.remove()
        assert not data_dependent(run.names)
        after = [state for layer in twin.layers for state in kept(layer)]
        assert len(after) == len(before) > 0
        assert all(torch.equal(a, b) and a.data_ptr() == place for a, (b, place) in zip(after, before, strict=True))
        final = getattr(outputs[-1], "final_logits", outputs[-1].logits)
        # A step sums in another order than a prompt; logits are of size 10.
        torch.testing.assert_close(final, true, rtol=0, atol=1e-4)
    assert len(outputs) == 2


def test_what_is_captured_waits_for_its_inputs_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    monkeypatch.setattr(machine, "GPU", True)
    for name, fake in {"Stream": object, "CUDAGraph": Graph, "stream": nullcontext, "graph": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, fake=fake: fake())
    monkeypatch.setattr(machine, "finish", lambda: events.append("wait"))
    token = torch.zeros(1)
    alive = weakref.ref(token)
    replay = machine.captured(lambda given=token: events.append("work"))
    del token
    gc.collect()
    assert events == ["wait", "work", "work", "work", "wait", "work"]
    replay()
    assert events.pop() == "replay"
    assert alive() is not None, "a graph reads the memory of what is gone"


def kept(layer: Any) -> list[torch.Tensor]:
    """Keys and values of a layer of attention."""
    return [layer.keys, layer.values] if getattr(layer, "keys", None) is not None else []


def test_several_batches_make_one_table_and_what_does_not_fit_is_said(small: Setting) -> None:
    limits = Limits(1e9, 1e9)

    def part(setting: Setting, _: Limits) -> Table:
        if setting.batch > 8:
            raise torch.OutOfMemoryError
        return Table(("way", "ratio"), [("unwrapped", 1.0), ("full", float(setting.batch))], ("A note.",))

    table = benchmarks.__main__.measured(part, small, [1, 8, 32], limits)
    assert table.columns == ("batch", "way", "ratio")
    assert table.rows == [
        (1, "unwrapped", 1.0),
        (1, "full", 1.0),
        (8, "unwrapped", 1.0),
        (8, "full", 8.0),
        (32, "does not fit", None),
    ]
    assert table.notes == ("A note.",)
    assert benchmarks.__main__.measured(part, small, [8], limits).columns == ("way", "ratio")
    with pytest.raises(torch.OutOfMemoryError):
        benchmarks.__main__.measured(part, small, [32], limits)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """All parts in a few seconds."""
    sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    monkeypatch.setitem(SHAPES, "tiny", ("llama", sizes | {"num_hidden_layers": 3}))
    monkeypatch.setattr(dola, "ENVIRONMENT", Path("nowhere"))
    return Setting("tiny", lookback=2, context=8, new=3, rounds=2)


def test_every_part_compares_with_the_unwrapped_model(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(1e9, 1e9)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no compiler of C++
    ways = ["unwrapped", "lazy", "full", "fused", "published"]
    captured = [way for way in ways if way != "lazy" or not machine.GPU]
    compiled = [way for way in ways if way != "lazy"]
    for name, expected in {"step": captured, "compiled": compiled, "prefill": ways, "generation": ways}.items():
        table = benchmarks.__main__.PARTS[name](small, limits)
        assert [row[0] for row in table.rows] == expected, name
        assert table.rows[0][1] == 1.0
        assert all(isinstance(row[1], float) and row[1] > 0 for row in table.rows)
    assert benchmarks.__main__.PARTS["wrapping"](small, limits).rows[0][0] == "tiny"


def test_what_a_prompt_takes_behind_the_last_layer_is_that_of_its_tail(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that every product with the unembedding moves on by a second, and all else by none."""
    seconds = [0.0]

    def product(rows: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        seconds[0] += float(weight.shape[0] == 500)
        return linear(rows, weight, bias)

    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    for place in (step, timing):
        monkeypatch.setattr(place, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    table = step.prefills(small, Limits(1e9, 1e9))
    behind = {row[0]: row[-1] for row in table.rows}
    assert table.columns[-1] == "more behind the last layer"
    assert (behind["unwrapped"], behind["full"], behind["published"]) == (0, 1, 1)  # of a prompt of one second


@pytest.mark.thorough
def test_onnx_runtime_compares_a_graph_without_candidates_with_both_scans(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES["tiny"][1], "num_hidden_layers", 2)  # tracing them is what takes long
    table = benchmarks.__main__.PARTS["onnx"](replace(small, lookback=1), Limits(1e9, 1e9))
    assert [row[0] for row in table.rows] == ["unwrapped", "lazy", "full"]
    assert all(isinstance(row[1], float) and row[1] > 0 for row in table.rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_is_compared_with_one_row_and_with_all_logits(small: Setting, dtype: str) -> None:
    rows = benchmarks.__main__.PARTS["fused"](replace(small, dtype=dtype), Limits(1e9, 1e9)).rows
    names = ["one row's logits", "read W", "logits, then entropy", "fused", "fused, logits written"]
    assert [row[0] for row in rows] == names
    assert rows[0][1] == 1.0


def test_memory_is_that_of_the_candidates(small: Setting) -> None:
    found = {way: step for way, step, _ in benchmarks.__main__.PARTS["memory"](small, Limits(1e9, 1e9)).rows}
    logits = 500 * 4 / 1e6  # megabytes of one candidate
    assert isinstance(found["full"], float) and isinstance(found["unwrapped"], float)
    assert found["full"] - found["unwrapped"] > 3 * logits  # three candidates at once, and what measures them
    assert found["unwrapped"] < 20 * logits, "weights or cache were counted"


def test_what_takes_the_place_of_something_held_is_counted() -> None:
    held = [torch.zeros(1000) for _ in range(50)]
    with Peak(held) as peak:
        held.clear()
        made = [torch.zeros(1000) for _ in range(50)]
    assert peak.bytes == len(made) * 4000


def test_a_sweep_has_all_points_lines_through_them_and_the_same_picture_each_time(small: Setting) -> None:
    table = benchmarks.__main__.PARTS["sweep"](small, Limits(1e9, 1e9))
    points = {row[:3] for row in table.rows}
    assert points == {
        (axis, value, way)
        for axis, values in (("batch", sweep.BATCHES), ("K", (1, 2)), ("V", (125, 250, 500)))
        for value in values
        for way in sweep.SCANS
    }
    assert {"full", "fused"} <= set(sweep.SCANS)
    assert len(table.notes) == 3 * len(sweep.SCANS)
    assert table.picture is not None and table.picture.count("roofline") == len(sweep.SCANS)
    line = {"lazy": [(1, 0.25, 0.2), (4, 0.5, 0.4)]}
    assert (
        overhead_picture(line) == overhead_picture(line) != overhead_picture({"lazy": [(1, 0.25, 0.2), (4, 0.6, 0.4)]})
    )


def test_a_slope_is_that_of_the_nearest_line() -> None:
    assert sweep.slope([(1, 5.0), (3, 9.0), (4, 11.0)]) == pytest.approx(2.0)


@torch.no_grad()
def test_a_smaller_vocabulary_is_the_same_model_with_fewer_logits() -> None:
    model = tiny_model("llama")
    ids = token_ids(2, 5)
    assert torch.allclose(sweep.with_vocabulary(model, 40)(ids).logits, model(ids).logits[..., :40])
    assert model.get_output_embeddings().weight.shape[0] > 40


def test_the_command_writes_its_figures_with_machine_versions_and_command(
    small: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shape", "tiny", "--lookback", "2", "--context", "8", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "step", "sweep", *options])
    monkeypatch.setattr(machine, "limits", lambda dtype: Limits(2e9, 3e9))
    benchmarks.__main__.main()
    shown = capsys.readouterr().out
    for part in ("step", "sweep"):
        page = (tmp_path / f"{part}.md").read_text()
        assert page in shown
        assert "- reads: 2 GB/s\n- multiplies: 3 GFLOP/s in float32\n" in page
        document = json.loads((tmp_path / f"{part}.json").read_text())
        assert {"torch", "reads", "date", "command"} <= set(document["about"])
        command = f"python -m benchmarks step sweep {' '.join(options[:-2])}"
        assert document["about"]["command"] == command
        assert f"| {document['rows'][1]['ratio']:.3f} |" in page
    assert "![sweep](sweep.svg)" in page and (tmp_path / "sweep.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "gpu", "message"),
    [
        (["dance"], False, r"No such part: dance\. There are step, compiled, prefill, generation, onnx"),
        (["tensorrt"], False, "PyTorch sees none here"),
        (["onnx", "--dtype", "bfloat16"], False, "CPU has no bfloat16. Measure onnx in float32"),
        (["step", "--rounds", "1"], False, "--rounds is 1; it must be at least 2"),
        (["step", "--shape", "gpt-oss-20b"], True, "only in bfloat16, and not in float32"),
        (["step", "--shape", "qwen3.5-35b-a3b", "--dtype", "float16"], True, "only in bfloat16, and not in float16"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], gpu: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    monkeypatch.setattr(machine, "GPU", gpu)
    with pytest.raises(SystemExit, match=message):
        benchmarks.__main__.main()
