"""Grafted graphs with GroupQueryAttention: what it computes rightly runs, and what it does not is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from grafts import grafted, tokens
from torch import Tensor

from cdsurgery import InvalidInputError, export
from cdsurgery.export import OnnxRunner

ROWS = [8, 3, 6]  # tokens a row


@pytest.fixture(scope="module")
def runner() -> OnnxRunner:
    return export.load(grafted("genai-llama", "last"))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask `[3, 8]`."""
    ids, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for row, length in enumerate(ROWS):
        place = slice(length) if side == "right" else slice(8 - length, 8)
        ids[row, place], mask[row, place] = tokens(1, length, seed=row)[0], 1
    return ids, mask


def test_rows_padded_on_the_right_are_those_alone_and_so_is_what_they_continue_with(runner: OnnxRunner) -> None:
    ids, mask = padded("right")
    first = runner(ids, mask)
    alone = [runner(ids[row : row + 1, :length]) for row, length in enumerate(ROWS)]
    for _ in range(3):
        for row, one in enumerate(alone):
            torch.testing.assert_close(first.logits[row], one.logits[0], rtol=0, atol=1e-4)
            assert torch.equal(first.selected_layer[row], one.selected_layer[0])
        token, mask = first.logits.argmax(-1), torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        first = runner(token, mask, past_key_values=first.past_key_values)
        alone = [runner(one.logits.argmax(-1), past_key_values=one.past_key_values) for one in alone]


def test_padding_on_the_left_is_refused_where_the_graph_counts_tokens_and_right_where_it_does_not(
    runner: OnnxRunner,
) -> None:
    ids, mask = padded("left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with pytest.raises(InvalidInputError, match=r"Row 1 of attention_mask holds a 0 before"):
        runner(ids, mask)
    with pytest.raises(InvalidInputError, match=r"Row 1 of attention_mask .*Pad prompts on the right"):
        runner.generate(ids, attention_mask=mask, **options)
    other = export.load(grafted("optimum-llama", "last"))  # of the same weights
    found = other.generate(ids, attention_mask=mask, **options)[:, 8:]
    for row, length in enumerate(ROWS):
        part = slice(row, row + 1), slice(8 - length, 8)
        alone = runner.generate(ids[part], attention_mask=mask[part], **options)
        assert torch.equal(found[row], alone[0, length:])


@pytest.mark.parametrize(
    ("mask", "cached"),
    [([[1, 0, 1]], 0), ([[1, 1, 0, 1]], 2), ([[1, 1, 1], [1, 1, 0]], 2), ([[0, 1, 1]], 2)],
    ids=["a gap", "padding before a new token", "padding after the prompt", "a prompt that had none"],
)
def test_other_masks_that_it_would_count_wrongly_are_refused(
    runner: OnnxRunner, mask: list[list[int]], cached: int
) -> None:
    ids, given = tokens(len(mask), len(mask[0])), torch.tensor(mask)
    past = runner(ids[:, :cached]).past_key_values if cached else None
    with pytest.raises(InvalidInputError, match="takes the tokens of a row to stand first"):
        runner(ids[:, cached:], given, past_key_values=past)


def test_several_rows_continue_by_one_token_and_one_row_by_several(runner: OnnxRunner) -> None:
    ids = tokens(2, 6)
    past = runner(ids[:, :3]).past_key_values
    with pytest.raises(InvalidInputError, match=r"2 rows continue by 3 tokens; .* Give one token at a time"):
        runner(ids[:, 3:], past_key_values=past)
    one = runner(ids[:1, 3:], past_key_values=runner(ids[:1, :3]).past_key_values)
    for column in range(3, 6):
        found = runner(ids[:, column : column + 1], past_key_values=past)
    torch.testing.assert_close(found.logits[:1], one.logits, rtol=0, atol=1e-4)


def test_an_artifact_from_before_the_manifest_said_so_can_be_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(grafted("genai-llama", "last"), tmp_path / "old"))
    fields = json.loads((folder / "cdsurgery.json").read_text())
    assert fields.pop("group_query_attention")
    (folder / "cdsurgery.json").write_text(json.dumps(fields))
    assert export.load(folder)(tokens(1, 3)).logits.shape == (1, 1, 96)
