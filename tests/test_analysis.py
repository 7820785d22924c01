"""`analyze`: what it counts and averages is what loops over the plain model's own states count and average."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import cdsurgery
from cdsurgery import ConfidentOutput, InvalidInputError
from cdsurgery.analysis import CONTEXT_TOKENS, MOST_CHANGES, Analysis, Change, Prediction, analyze

LAYERS, LOOKBACK, VOCABULARY = 5, 3, 61
LENGTHS = (2, 41, 7, 24)  # uneven, so that a mean of means shows


@pytest.fixture
def plain() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # the default leaves the logits near uniform, where every layer says the same
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def windows(plain: Any) -> list[Tensor]:
    """Half of each text is what the model would say, so that some tokens are likely."""
    generator = torch.Generator().manual_seed(1)
    texts = []
    for length in LENGTHS:
        begin = torch.randint(VOCABULARY, (1, (length + 1) // 2), generator=generator)
        options = {"max_length": length, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        texts.append(plain.generate(begin, attention_mask=torch.ones_like(begin), **options)[0])
    assert tuple(map(len, texts)) == LENGTHS
    return texts


@dataclass
class Position:
    """What there is to know of one position, by other means than the code under test."""

    context: list[int]
    token: int
    said: list[int]  # by layer L, L-1, ..
    entropies: list[float]
    nlls: list[float]
    depth: int


@torch.no_grad()
def positions(plain: Any, windows: list[Tensor]) -> Iterator[Position]:
    for window in windows:
        states = plain(window[None], output_hidden_states=True).hidden_states
        normed = [states[LAYERS], *(plain.model.norm(states[LAYERS - k]) for k in range(1, LOOKBACK + 1))]
        logits = torch.cat([plain.lm_head(state) for state in normed]).double()
        for t in range(len(window) - 1):
            entropies, nlls = [], []
            for row in logits[:, t]:
                weights = [math.exp(z) for z in row.tolist()]
                entropies.append(-sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights))
                nlls.append(float(torch.nn.functional.cross_entropy(row, window[t + 1])))
            depth = 0
            while depth < LOOKBACK and entropies[depth + 1] < entropies[depth]:
                depth += 1
            said = logits[:, t].argmax(-1).tolist()
            yield Position(window[: t + 1].tolist(), int(window[t + 1]), said, entropies, nlls, depth)


def mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def test_all_numbers_are_those_of_loops_over_the_plain_model(plain: Any, windows: list[Tensor]) -> None:
    truth = list(positions(plain, windows))
    found = analyze(cdsurgery.wrap(plain, lookback=LOOKBACK), windows)
    assert found.positions == len(truth) == sum(LENGTHS) - len(LENGTHS)
    assert found.depths == tuple(sum(p.depth == k for p in truth) for k in range(LOOKBACK + 1))
    assert min(found.depths) > 0, "no position goes that far: this test shows little"
    assert found.changed == sum(p.said[p.depth] != p.said[0] for p in truth) > 0
    assert found.entropy == pytest.approx([mean(p.entropies[k] for p in truth) for k in range(LOOKBACK + 1)], rel=1e-5)
    assert (found.final.entropy, found.final.nll) == pytest.approx(
        (mean(p.entropies[0] for p in truth), mean(p.nlls[0] for p in truth)), rel=1e-5
    )
    assert (found.selected.entropy, found.selected.nll) == pytest.approx(
        (mean(p.entropies[p.depth] for p in truth), mean(p.nlls[p.depth] for p in truth)), rel=1e-5
    )
    assert found.final.accuracy == pytest.approx(mean(p.said[0] == p.token for p in truth))
    assert found.selected.accuracy == pytest.approx(mean(p.said[p.depth] == p.token for p in truth))
    assert 0 < found.selected.accuracy < found.final.accuracy < 1, "the two are alike: one could be the other"
    falls = [p.entropies[0] - p.entropies[p.depth] for p in truth if p.depth > 0]
    assert found.mean_fall == pytest.approx(sum(falls) / len(falls), rel=1e-4)


def test_changes_are_those_whose_entropy_falls_most(plain: Any, windows: list[Tensor]) -> None:
    changed = [p for p in positions(plain, windows) if p.said[p.depth] != p.said[0]]
    changed.sort(key=lambda p: p.entropies[p.depth] - p.entropies[0])
    found = analyze(cdsurgery.wrap(plain, lookback=LOOKBACK), windows).changes
    assert len(found) == MOST_CHANGES < len(changed)
    for change, p in zip(found, changed, strict=False):
        assert change.context == tuple(p.context[-CONTEXT_TOKENS:])
        said = (p.token, p.said[0], p.said[p.depth], LAYERS - p.depth)
        assert (change.token, change.final_token, change.selected_token, change.selected_layer) == said
        entropies = p.entropies[0], p.entropies[p.depth]
        assert (change.final_entropy, change.selected_entropy) == pytest.approx(entropies, rel=1e-4)


class Said:
    """A model of three layers that says of two tokens what is written here."""

    device = torch.device("cpu")
    config = LlamaConfig(vocab_size=2)
    manifest = SimpleNamespace(layers=3)

    def __init__(self, final: list[list[float]], logits: list[list[float]], layer: list[int], **fields: Any) -> None:
        self.output = ConfidentOutput(
            final_logits=torch.tensor([final]),
            logits=torch.tensor([logits]),
            selected_layer=torch.tensor([layer]),
            **fields,
        )

    def forward(self, input_ids: Tensor) -> ConfidentOutput:
        return self.output

    __call__ = forward


def test_a_case_by_hand() -> None:
    """Two positions: one stays at 1/4 to 3/4; one moves from 1/2 to 1/2 to all but sure, of the wrong token."""
    even, sure = [0.0, 0.0], [0.0, -20.0]
    entropy = torch.tensor([[[0.5623351, 0.6, 0.7], [0.6931472, 4.3e-8, 0.1]]])
    model = Said([[0.0, math.log(3)], even], [[0.0, math.log(3)], sure], [3, 2], entropy=entropy)
    found = analyze(model, [torch.tensor([0, 1, 1])])
    assert (found.positions, found.depths, found.moved, found.changed, found.mean_depth) == (2, (1, 1, 0), 1, 0, 0.5)
    assert found.final == Prediction(pytest.approx(0.62774115), pytest.approx(math.log(8 / 3) / 2), 0.5)
    assert found.final.perplexity == pytest.approx(math.sqrt(8 / 3))
    assert found.selected == Prediction(pytest.approx(0.28116757), pytest.approx((math.log(4 / 3) + 20) / 2), 0.5)
    assert found.mean_fall == pytest.approx(0.69314716)
    assert found.changes == ()


def test_a_likelihood_near_1_is_none_of_1() -> None:
    model = Said([[0.0, -20.0]], [[0.0, -20.0]], [3], entropy=torch.zeros(1, 1, 3))
    assert analyze(model, [torch.tensor([0, 0])]).final.nll == pytest.approx(math.log1p(math.exp(-20)))


def test_where_nothing_moves_there_is_no_fall_and_a_broken_row_breaks_its_means() -> None:
    model = Said([[0.0, math.inf]], [[0.0, math.inf]], [3], entropy=torch.tensor([[[math.nan, 0.1, 0.2]]]))
    found = analyze(model, [torch.tensor([0, 0])])
    assert (found.moved, found.entropy[1:]) == (0, pytest.approx((0.1, 0.2)))
    assert math.isnan(found.mean_fall) and math.isnan(found.final.entropy)
    assert (found.final.nll, found.final.perplexity) == (math.inf, math.inf)
    assert Prediction(0.0, 1000.0, 0.0).perplexity == math.inf


def test_layers_that_a_lazy_scan_leaves_out_have_no_mean(plain: Any, windows: list[Tensor]) -> None:
    full = analyze(cdsurgery.wrap(plain, lookback=LOOKBACK), windows)
    lazy = analyze(cdsurgery.wrap(cdsurgery.unwrap(plain), lookback=LOOKBACK, scan="lazy"), windows)
    assert lazy.depths == full.depths
    assert lazy.entropy[:2] == pytest.approx(full.entropy[:2])
    assert all(math.isnan(entropy) for entropy in lazy.entropy[2:])
    assert lazy.selected.nll == pytest.approx(full.selected.nll)


def test_the_logits_of_one_window_are_gone_before_the_next_one_is_read(plain: Any, windows: list[Tensor]) -> None:
    model, returned = cdsurgery.wrap(plain, lookback=LOOKBACK), []

    def note(_model: Any, _args: Any, output: ConfidentOutput) -> None:
        returned.extend(weakref.ref(logits) for logits in (output.logits, output.final_logits))

    def watched() -> Iterator[Tensor]:
        for window in windows:
            assert [each for each in returned if each() is not None] == []
            yield window

    model.register_forward_hook(note)
    analyze(model, watched())
    assert len(returned) == 2 * len(windows)


def test_what_cannot_be_read_is_refused(plain: Any) -> None:
    model = cdsurgery.wrap(plain, lookback=LOOKBACK)
    with pytest.raises(InvalidInputError, match="no window to read"):
        analyze(model, [])
    for window, found in (
        (torch.tensor([1]), r"shape \[1\] and"),
        (torch.tensor([[1, 2]]), r"shape \[1, 2\] and"),
        (torch.tensor([1.0, 2.0]), r"shape \[2\] and dtype torch.float32; it must be"),
        (torch.tensor([1, -100]), "token ids from -100 to 1; the model has those from 0"),
        (torch.tensor([1, 999]), "token ids from 1 to 999; the model has those from 0"),
    ):
        with pytest.raises(InvalidInputError, match=f"A window has {found}"):
            analyze(model, [window])
    with pytest.raises(InvalidInputError, match="returns the logits of the last position"):
        analyze(Said([[0.0, 0.0]], [[0.0, 0.0]], [3], entropy=torch.zeros(1, 1, 3)), [torch.tensor([0, 0, 0])])
    model = cdsurgery.unwrap(model)
    with pytest.raises(InvalidInputError, match=r"This LlamaForCausalLM selects no layers\. Give what cdsurgery\.wrap"):
        analyze(model, [torch.tensor([1, 2])])
    model = cdsurgery.wrap(model, probability=0)
    with pytest.raises(InvalidInputError, match="selects no layers"):
        analyze(model, [torch.tensor([1, 2])])


def test_counts_follow_from_the_depths() -> None:
    final, selected = Prediction(1.0, 2.0, 0.5), Prediction(0.7, 2.5, 0.25)
    change = Change((1,), 2, 3, 4, 9, 1.0, 0.5)
    found = Analysis(10, (6, 3, 1), 1, (1.0, 1.1, 1.2), final, selected, (change,))
    assert (found.positions, found.moved, found.mean_depth) == (10, 4, 0.5)
    assert found.mean_fall == pytest.approx(0.75)
