"""Artifacts that score: the log-probability of every token of a text, without the logits of all candidates at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import LOOKBACK, artifact, padded
from artifacts import wrapped as wrapped_model
from families import tiny_model, token_ids
from torch import Tensor

import cdsurgery
from cdsurgery import InvalidInputError, export
from cdsurgery.export import OnnxRunner

TOLERANCE = 1e-4  # nats: of logits around 30 in float32, 1e-5 of the largest


@pytest.fixture(scope="module")
def runner() -> OnnxRunner:
    return export.load(artifact("llama", "score"))


@torch.no_grad()
def truth(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the selected and of the final layer, layers and entropies, from PyTorch's logits."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = wrapped_model("llama")(ids, attention_mask=mask, position_ids=positions)
    scored = [
        z[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        for z in (out.logits, out.final_logits)
    ]
    return *scored, out.selected_layer[:, :-1], out.entropy[:, :-1]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_scores_are_the_log_probabilities_that_pytorch_gives(runner: OnnxRunner, side: str, chunk: int) -> None:
    ids, mask = token_ids(3, 30), padded(3, 30, side)
    found = runner.score(ids, mask, chunk=chunk)
    selected, final, layers, entropy = truth(ids, mask)
    real = (mask[:, 1:] * mask[:, :-1]).bool()
    assert (found.logprobs - selected)[real].abs().max() < TOLERANCE
    assert (found.final_logprobs - final)[real].abs().max() < TOLERANCE
    assert torch.equal(found.selected_layer[real], layers[real])
    assert (found.entropy - entropy)[real].abs().max() < TOLERANCE
    assert not found.logprobs[~real].any()
    moved = real & (layers < layers.max())
    assert (selected - final)[moved].abs().max() > 0.1  # the two differ where a layer was selected


def test_a_graph_that_scores_returns_no_logits_and_takes_targets(runner: OnnxRunner) -> None:
    names = [spec.name for spec in runner.manifest.signature.results]
    assert names == ["logprobs", "final_logprobs", "selected_layer", "entropy"]
    assert runner.manifest.signature.results[3].axes == ("batch", "sequence", LOOKBACK + 1)
    assert not (artifact("llama", "score") / "genai_config.json").exists()


def test_what_scores_does_nothing_else_and_nothing_else_scores(runner: OnnxRunner) -> None:
    ids = token_ids(1, 4)
    with pytest.raises(InvalidInputError, match="positions='score', which takes targets"):
        runner(ids)
    with pytest.raises(InvalidInputError, match="positions='last', which takes no targets"):
        export.load(artifact("llama")).score(ids)
    with pytest.raises(InvalidInputError, match=r"ids up to 256; .* up to 255"):
        runner(ids, targets=torch.full_like(ids, 256))
    with pytest.raises(InvalidInputError, match="at least two tokens"):
        runner.score(ids[:, :1])
    with pytest.raises(InvalidInputError, match="chunk is 0; it must be at least 1"):
        runner.score(ids, chunk=0)
    with pytest.raises(InvalidInputError, match="input_ids is list; it must be a tensor"):
        runner.score([[1, 2, 3]])  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="attention_mask is list"):
        runner.score(ids, [[1, 1, 1, 1]])  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"attention_mask has shape \[1, 3\]; .* must be \[1, 4\]"):
        runner.score(ids, torch.ones(1, 3, dtype=torch.int64))


MEASURE = """
import sys
sys.path[:0] = [{tests!r}]
from families import token_ids
from cdsurgery import export

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

runner, ids = export.load({folder!r}), token_ids(1, 512)
runner(ids[:, :8], targets=ids[:, :8])
before = peak()
runner(ids, targets=ids)
print(peak() - before)
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_what_scoring_holds_does_not_grow_with_the_candidates(tmp_path: Path) -> None:
    """512 positions of a vocabulary of 32,768: the logits of one candidate are 64 MB."""
    one = 512 * 32768 * 4 / 1024
    used = []
    for lookback in (1, 2):
        model = tiny_model("llama", num_hidden_layers=lookback + 1, vocab_size=32768, max_position_embeddings=512)
        wrapped = cdsurgery.wrap(model, lookback=lookback)
        folder = export.to_onnx(wrapped, tmp_path / str(lookback), positions="score", parity=False)
        script = MEASURE.format(tests=str(Path(__file__).parent), folder=str(folder))
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        used.append(int(run.stdout) / one)
    assert used[0] > 1  # the measurement sees what the graph holds
    assert used[1] < used[0] + 0.5, used
