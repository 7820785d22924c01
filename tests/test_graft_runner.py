"""Grafted artifacts in our own runner: the texts of PyTorch, and what a file does not take is refused or not asked."""

from __future__ import annotations

import pytest
import torch
from grafts import grafted, ones, tokens, wrapped

from cdsurgery import InvalidInputError, UnsupportedModelError, export


@pytest.mark.parametrize("name", ["optimum-llama", "optimum-gemma2", "genai-llama", "genai-qwen3-pruned"])
def test_the_runner_generates_the_tokens_of_pytorch(name: str) -> None:
    """Among them graphs that count their positions themselves and keep keys and values in another order."""
    runner, ids = export.load(grafted(name)), tokens(1, 5)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": ones(1, 5)}
    truth = wrapped(name).generate(ids, **options)  # type: ignore[attr-defined]
    assert torch.equal(runner.generate(ids, **options), truth)


def test_a_graph_that_counts_its_positions_itself_is_asked_for_no_others() -> None:
    runner, mask = export.load(grafted("optimum-gemma2")), ones(2, 5)
    mask[0, 3:] = 0
    out = runner(tokens(2, 5), attention_mask=mask)  # right so far
    longer = torch.cat([mask, ones(2, 1)], dim=-1)
    with pytest.raises(InvalidInputError, match=r"Row 0 of attention_mask holds a 0 between tokens.*: pad on the left"):
        runner(tokens(2, 1), attention_mask=longer, past_key_values=out.past_key_values)
    with pytest.raises(InvalidInputError, match=r"position_ids are not one after another.*Leave them out"):
        runner(tokens(1, 4), position_ids=torch.tensor([[3, 9, 20, 40]]))
    mask = mask.flip(-1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = runner(tokens(2, 5), attention_mask=mask)
    assert torch.equal(runner(tokens(2, 5), attention_mask=mask, position_ids=positions).logits, plain.logits)


# Graphs that take padding on both sides, on the left and on the right alone.
@pytest.mark.parametrize(("name", "rows"), [("optimum-llama", 126), ("optimum-gemma2", 84), ("genai-llama", 30)])
def test_an_artifact_passes_the_verification_of_exported_ones(name: str, rows: int) -> None:
    report = export.verify(grafted(name, "last"), wrapped(name))
    assert report.passed, report
    assert report.rows == rows  # three runs of each row of each shape and side


def test_a_graph_whose_windows_lie_in_place_is_for_its_own_clients() -> None:
    folder = grafted("genai-gemma2", "last")
    for use in (export.load, lambda folder: export.to_triton(folder, folder.parent / "r", name="a")):
        with pytest.raises(UnsupportedModelError, match=r"not for cdsurgery\.export\.load: .*sliding_window_cache"):
            use(folder)
