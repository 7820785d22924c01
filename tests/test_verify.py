"""`export.verify`: it passes what is the same, and fails on what is only nearly so."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import LOOKBACK, artifact, wrapped
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import cdsurgery
from cdsurgery import InvalidInputError, export
from cdsurgery.export.parity.lending import plain_generation
from cdsurgery.export.parity.report import TOLERANCES, Report, measure_scale, scan_margin


@pytest.fixture(scope="module")
def report() -> Report:
    return export.verify(artifact("llama"), wrapped("llama"), new_tokens=32)


def test_the_artifact_of_a_model_passes_and_every_figure_is_counted(report: Report) -> None:
    assert report.passed
    assert report.rows == 3 * 3 * (1 + 1 + 2 + 2 + 3 + 4 + 1)  # paddings, runs, batches
    assert 0 < report.moved < report.rows
    assert report.excluded < 0.05 * report.rows
    assert report.tokens >= report.tokens_equal > 0
    assert report.texts == 6
    assert 0 < report.final_logits < 1e-5
    assert 0 < report.entropy < 1e-5


def test_the_report_prints_its_figures_and_is_json(report: Report) -> None:
    text = str(report)
    for part in ("final logits", "entropies", "selected layers", "too close to call", "greedy tokens", "passed"):
        assert part in text
    assert json.loads(json.dumps(report.to_dict()))["passed"]


def nudge_final_norm(model: Any) -> None:
    model.model.norm.weight.data.mul_(1.0001)


def nudge_one_vocabulary_row(model: Any) -> None:
    model.lm_head.weight.data[77] += 1e-3


def nudge_last_layer(model: Any) -> None:
    model.model.layers[-1].mlp.down_proj.weight.data.mul_(1.0001)


def nudge_with_eager_attention(model: Any) -> None:
    """Which in float64 makes NaN of rows beside padding, so that they tell nothing of the model's own rounding."""
    model.set_attn_implementation("eager")
    nudge_final_norm(model)


NUDGES = [nudge_final_norm, nudge_one_vocabulary_row, nudge_last_layer, nudge_with_eager_attention]


@pytest.mark.parametrize("nudge", NUDGES)
def test_a_model_that_differs_by_one_part_in_ten_thousand_fails(nudge: Any) -> None:
    other = copy.deepcopy(wrapped("llama"))
    nudge(other)
    assert not export.verify(artifact("llama"), other).passed


def test_the_overlays_measure_is_held_on_a_scale_of_its_own() -> None:
    """A sum of squares over the vocabulary, in the thousands, of which float16 rounds off more than of an entropy."""
    half, options = torch.float16, {"measure": "log_p_squared"}
    report = export.verify(artifact("llama", dtype=half, **options), wrapped("llama", half, **options))
    assert report.passed and report.entropy_nats > 10, report
    model = copy.deepcopy(wrapped("llama", **options))
    assert export.verify(artifact("llama", **options), model).passed
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0] *= 1.05  # type: ignore[union-attr, index]
    report = export.verify(artifact("llama", **options), model)
    assert not report.passed and report.entropy > report.allowed.entropy


def test_a_context_shorter_than_the_texts_that_are_compared_is_kept(tmp_path: Path) -> None:
    model = cdsurgery.wrap(tiny_model("gpt2", num_hidden_layers=2, n_positions=16), lookback=1)
    report = export.verify(export.to_onnx(model, tmp_path / "short"), model)
    assert report.passed
    assert report.texts == 5  # of 1, 2, 3, 5 and 8 tokens, and 8 more of each
    runner: Any = export.load(tmp_path / "short")
    runner.config.n_positions = 2
    with pytest.raises(InvalidInputError, match="context is 2 tokens, and the least that is compared is one and two"):
        export.verify(runner, model)


def test_a_wrapped_model_with_other_options_is_refused() -> None:
    other = cdsurgery.wrap(tiny_model("llama", num_hidden_layers=4), lookback=LOOKBACK - 1)
    with pytest.raises(InvalidInputError, match="made with lookback=2, the model is wrapped with lookback=1"):
        export.verify(artifact("llama"), other)
    with pytest.raises(InvalidInputError, match="is not wrapped"):
        export.verify(artifact("llama"), tiny_model("llama"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: copy.deepcopy(wrapped("llama")).bfloat16(), "has bfloat16, 4 layers"),
        (lambda: cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK), "has float32, 6 layers and 256 tokens"),
        (lambda: cdsurgery.wrap(tiny_model("llama", vocab_size=200), lookback=LOOKBACK), "6 layers and 200 tokens"),
    ],
    ids=["dtype", "layers", "vocabulary"],
)
def test_a_model_that_the_artifact_was_not_made_from_is_refused(model: Any, message: str) -> None:
    """A model in bfloat16 passed, by the tolerances of bfloat16."""
    with pytest.raises(InvalidInputError, match=rf"it has float32, 4 layers and 256 tokens, .* {message}"):
        export.verify(artifact("llama"), model())


@pytest.mark.parametrize(
    "entries",
    [
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3},
        {"stop_strings": ["a"], "token_healing": True},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_how_the_model_is_meant_to_decode_does_not_matter(entries: dict[str, Any]) -> None:
    model, runner = copy.deepcopy(wrapped("llama")), export.load(artifact("llama"))
    configs = [model.generation_config, runner.generation_config]
    for config, (name, value) in itertools.product(configs, entries.items()):
        setattr(config, name, value)
    found = export.verify(runner, model)
    assert found.passed
    assert found.texts == 6
    assert [model.generation_config, runner.generation_config] == configs
    assert model.generation_config is configs[0] and runner.generation_config is configs[1]


def test_generation_configs_are_lent_with_their_special_tokens_and_come_back_after_an_error() -> None:
    model = copy.deepcopy(wrapped("llama"))
    own = model.generation_config
    own.eos_token_id, own.top_p = [2, 7], 0.5
    lent = []

    def fail() -> None:
        lent.append(model.generation_config)
        raise KeyError

    with pytest.raises(KeyError), plain_generation(model):
        fail()
    assert (lent[0].bos_token_id, lent[0].eos_token_id, lent[0].top_p) == (own.bos_token_id, [2, 7], None)
    assert model.generation_config is own


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, math.nan]), min_size=2, max_size=7))
def test_the_scan_margin_is_the_smallest_gap_that_the_scan_looked_at(entropy: list[float]) -> None:
    smallest = math.inf
    for before, after in itertools.pairwise(entropy):
        gap = after - before
        smallest = min(smallest, 0.0 if math.isnan(gap) else abs(gap))
        if not after < before:
            break
    assert scan_margin(torch.tensor(entropy)).item() == smallest


def rows(layer: int, entropy: list[float], logits: list[float]) -> list[torch.Tensor]:
    z = torch.tensor([logits])
    return [z, torch.tensor([[1.0, 2.0]]), torch.tensor([layer]), torch.tensor([entropy])]


def test_a_wrong_layer_fails_unless_the_runtimes_differ_by_as_much_as_the_choice_hung_on() -> None:
    for found, truth, passes in (
        ([1.0, 0.5], [1.0, 0.5], False),
        ([1.0, 1.0 - 1e-6], [1.0, 1.0 - 1e-6], False),  # close, yet both saw the same
        ([1.0, 1.0], [1.0, 1.0 - 1e-6], True),
    ):
        report = Report(TOLERANCES["float32"], 4)
        report.add_rows(rows(4, [2.0, 3.0], [1.0, 2.0]), rows(4, [2.0, 3.0], [1.0, 2.0]))
        report.add_rows(rows(4, found, [1.0, 2.0]), rows(3, truth, [5.0, 2.0]))
        assert report.passed is passes
        assert report.excluded == passes


def test_entropies_are_held_on_the_scale_of_the_logits_they_are_made_of() -> None:
    for scale, passes in ((1.0, False), (50.0, True)):
        report = Report(TOLERANCES["float32"], 4)
        truth = rows(4, [2.0, 3.0], [1.0, 2.0])
        truth[1] = torch.tensor([[1.0, scale]])
        found = [*truth[:3], truth[3] + 1e-4]
        report.add_rows(found, truth)
        assert report.passed is passes
        assert report.entropy_nats == pytest.approx(1e-4, rel=0.01)


def test_the_scale_of_a_measure_is_how_much_it_changes_with_its_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(64, 300, generator=generator, dtype=torch.float64)
    step = 1e-4 * torch.empty_like(logits).uniform_(-1, 1, generator=generator)
    log_p, other = logits.log_softmax(dim=-1), (logits + step).log_softmax(dim=-1)
    values = -log_p.square().sum(dim=-1, keepdim=True)
    changes = (-other.square().sum(dim=-1, keepdim=True) - values).abs() / 1e-4  # where logits are of scale 1
    scale = measure_scale("log_p_squared", values, torch.ones(64, 1), 300)
    assert (changes <= scale).all()
    assert changes.max() > scale.max() / 50, "far wider than what can happen"
    entropies, largest = torch.tensor([[1e-3, 2.0], [3.0, 0.5]]), torch.tensor([[0.25], [20.0]])
    expected = torch.tensor([[1.0, 1.0], [20.0, 20.0]])
    assert torch.equal(measure_scale("entropy", entropies, largest, 300), expected)


def test_a_difference_of_tokens_passes_only_with_a_margin_that_explains_it() -> None:
    names = ("layer_margin", "token_margin", "routing_margin")
    for margins, passes in (
        ((1.0, 1.0, 1.0), False),
        ((1e-6, 1.0, 1.0), True),
        ((1.0, 1e-6, 1.0), True),
        ((1.0, 1.0, 1e-6), True),
    ):
        report = Report(TOLERANCES["float32"], 4)
        report.add_rows(rows(4, [2.0, 3.0], [1.0, 2.0]), rows(4, [2.0, 3.0], [1.0, 2.0]))
        report.add_text(5, dict(zip(names, margins, strict=True), text=1))
        assert report.passed is passes
        assert (report.tokens, report.tokens_equal) == (6, 5)
        verdict = "explained" if passes else "NOT explained"
        assert re.search(rf"parts at token 5: .*: {verdict}$", str(report), re.MULTILINE)


def test_nothing_compared_and_nan_everywhere_do_not_pass() -> None:
    assert not Report(TOLERANCES["float32"], 4).passed
    report = Report(TOLERANCES["float32"], 4)
    report.add_rows(rows(4, [2.0, 3.0], [math.nan, 2.0]), rows(4, [2.0, 3.0], [1.0, 2.0]))
    assert not report.passed
