"""What a machine could do at best: worked out by hand, and by the plan of readings that the fused scan follows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import Limits
from benchmarks.models import bytes_of, filled_cache
from benchmarks.roofline import Roofline
from benchmarks.shapes import config_of, random_model
from cdsurgery.readings import reading_plan

H200 = Limits(4.3e12, 790e12)
SIZES = {  # in billions of parameters, those of the texts alone
    "qwen3-0.6b": 0.596,
    "llama-3.1-8b": 8.03,
    "gpt-oss-20b": 20.9,
    "qwen3.5-9b": 8.95,
    "qwen3.5-35b-a3b": 34.7,
    "gemma-4-31b": 30.7,
}


def test_configs_are_of_the_size_that_their_names_say() -> None:
    for name, billions in SIZES.items():
        parameters = sum(parameter.numel() for parameter in on_paper(name).parameters())
        assert parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert random_model("tiny", torch.float32).training is False


def test_the_roofline_is_that_of_the_written_one() -> None:
    """Worked out by hand for an H200, context 4096, K = 10: the share of a step that one pass adds, to a digit."""
    llama = on_paper("llama-3.1-8b")
    shares = {batch: share(Roofline(llama, H200), batch, cached(llama, batch)) for batch in (1, 8, 32, 128)}
    assert shares[1] < 0.0015
    assert shares == {1: shares[1]} | {
        batch: pytest.approx(written, rel=0.2) for batch, written in ((8, 0.005), (32, 0.041), (128, 0.10))
    }


PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "README.md"


def on_the_page(shape: str) -> list[float]:
    """What the page says of a shape under "On paper"."""
    table = PAGE.read_text(encoding="utf-8").partition("## On paper")[2]
    (row,) = [line for line in table.splitlines() if line.lower().startswith(f"| {shape} |")]
    return [float(cell) for cell in row.strip("|").split("|")[1:]]


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "gpt-oss-20b", "gemma-4-31b"])
def test_on_paper_a_fused_step_is_free_for_few_rows_and_a_second_reading_is_not(shape: str) -> None:
    """Percent of a step that it adds at best at batch 1, 8, 32 and 128, and that a second reading would at batch 1."""
    model = on_paper(shape)
    roofline, cache = Roofline(model, H200), cached(model, 1)
    least = {batch: roofline.steps(batch, batch * cache, 10, 0.115) for batch in (1, 8, 32, 128)}
    shares = {
        batch: {way: 100 * (step / steps["unwrapped"] - 1) for way, step in steps.items()}
        for batch, steps in least.items()
    }
    found = [round(share["fused"], 1) for share in shares.values()]
    assert [*found, round(shares[1]["full"], 1)] == on_the_page(shape)


@pytest.mark.parametrize("layers", [1, 2, 3, 10])
def test_no_other_first_reading_takes_less_time_on_an_accelerator(layers: int) -> None:
    """In readings of the unembedding: rows in excess of 184 take longer, and a layer alone leaves some row to go on.

    The kernel multiplies rows by the 128.
    """

    def multiplied(first: int, rows: int) -> int:
        return next(blocks * 128 for blocks in itertools.count(1) if blocks * 128 >= (first + 1) * rows)

    for rows in range(1, 600):
        times = {
            first: max(1, multiplied(first, rows) / 184) + (1 if first == 1 < layers else 0)
            for first in range(1, layers + 1)
        }
        plan = reading_plan(torch.device("meta"), rows, layers)
        assert sum(plan) == layers and len(plan) <= 2
        assert times[plan[0]] == min(times.values())
        # What comes for nothing is taken.
        assert plan[0] == layers or multiplied(plan[0] + 1, rows) > multiplied(plan[0], rows)


def test_on_a_cpu_each_later_reading_takes_as_many_layers_as_have_been_read() -> None:
    assert reading_plan(torch.device("cpu"), 7, 10) == [1, 1, 2, 4, 2]
    assert [reading_plan(torch.device("cpu"), 7, layers) for layers in (1, 2, 3)] == [[1], [1, 1], [1, 1, 1]]


def test_a_cache_is_what_each_kind_of_layer_keeps_of_the_context() -> None:
    keys = 2 * 4096 * 4 * 256 * 2
    linear = (2 * 16 + 32) * 128 * 4 * 2 + 32 * 128 * 128 * 4  # a convolution in bfloat16, a state in float32
    assert cached(on_paper("qwen3.5-9b"), 3) == 3 * (8 * keys + 24 * linear)
    windows, whole = 2 * 1023 * 16 * 256 * 2, 2 * 4096 * 4 * 512 * 2
    assert cached(on_paper("gemma-4-31b"), 1) == 50 * windows + 10 * whole


def test_the_roofline_of_a_scan_counts_its_products() -> None:
    """Where only reading W counts, one row more is free; where only multiplying does, a row is a row."""
    model = on_paper("tiny")
    head = 32000 * 256
    reading, computing = Roofline(model, Limits(2.0, 1e30)), Roofline(model, Limits(1e30, 2.0))
    steps = reading.steps(batch=2, cache=0, lookback=3, rate=0.5)
    assert steps["lazy"] - steps["unwrapped"] == pytest.approx(head * 1.75)  # one of two rows moves in 3 of 4 steps
    assert steps["one pass"] - steps["unwrapped"] == pytest.approx(2 * 3 * 2 * 32000 * 2)  # logits
    assert steps["fused"] - steps["unwrapped"] == pytest.approx(3 * 2 * 32000)  # products, in bfloat16
    steps = computing.steps(batch=2, cache=0, lookback=3, rate=0.5)
    assert steps["unwrapped"] == pytest.approx(2 * sum(p.numel() for p in model.parameters()) - 2 * head)
    assert steps["full"] - steps["unwrapped"] == pytest.approx(6 * head)
    assert steps["fused"] - steps["unwrapped"] == pytest.approx(6 * head)  # an accelerator would not mind
    assert steps["lazy"] - steps["unwrapped"] == pytest.approx((2 + 0.75) * head)
    computing = Roofline(
        random_model("tiny", torch.float32), Limits(1e30, 2.0)
    )  # a CPU, which reads one layer after another
    steps = computing.steps(batch=2, cache=0, lookback=3, rate=0.5)
    assert steps["fused"] - steps["unwrapped"] == pytest.approx((2 + 0.75) * head)


def test_a_prefill_multiplies_all_tokens_and_unembeds_the_last_one() -> None:
    model = on_paper("tiny")
    head, body = 32000 * 256, sum(p.numel() for p in model.parameters()) - 2 * 32000 * 256
    steps = Roofline(model, Limits(1e30, 2.0)).steps(batch=2, cache=0, lookback=3, rate=0.5, tokens=5)
    assert steps["unwrapped"] == pytest.approx(2 * 5 * body + 2 * head)
    assert steps["full"] - steps["unwrapped"] == pytest.approx(6 * head)
    # On two cores, which read 33 GB and multiply 185 GFLOP a second, all that can be measured of it is noise.
    two_cores = Roofline(on_paper("qwen3-0.6b"), Limits(33e9, 185e9))
    steps = two_cores.steps(batch=1, cache=0, lookback=10, rate=0.115, tokens=4096)
    assert max(steps.values()) / steps["unwrapped"] < 1.001


def share(roofline: Roofline, batch: int, cache: int) -> float:
    steps = roofline.steps(batch, cache, 10, 0.115)
    return steps["one pass"] / steps["unwrapped"] - 1


def cached(model: Any, batch: int) -> int:
    return bytes_of(filled_cache(model, batch, 4096))


def on_paper(shape: str) -> Any:
    """The model without its numbers, in bfloat16 as it is served."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)
