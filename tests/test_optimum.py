"""optimum's ORTModelForCausalLM decodes an artifact's folder unchanged, in the environment of `make clients`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import EXPORTED, artifact, padded, wrapped
from families import tiny_model, token_ids

import cdsurgery
from cdsurgery import export

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-optimum" / "bin" / "python"
NEW = 16
TEXT = "def f(x):"
IDS, MASK = token_ids(8, 7), padded(8, 7, "left")

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make clients builds the environment")


def decode(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What optimum makes of the jobs, in one process of its own Python."""
    script = ROOT / "tests" / "clients" / "optimum_decode.py"
    done = subprocess.run(
        [PYTHON, "-I", script], input=json.dumps(jobs), capture_output=True, text=True, cwd=script.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def batch_job(folder: Path, io_binding: bool) -> dict[str, Any]:
    inputs = {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist(), "new_tokens": NEW}
    return {"folder": str(folder), "io_binding": io_binding} | inputs


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in float16, of a model with logits so small that half precision holds their entropies."""
    model = tiny_model("llama", torch.float16, num_hidden_layers=4)
    model.get_output_embeddings().weight.data.div_(8)
    cdsurgery.wrap(model, lookback=2)
    return export.to_onnx(model, tmp_path_factory.mktemp("half") / "artifact")


@pytest.fixture(scope="module")
def answers(half: Path, shown: tuple[Path, Any]) -> dict[tuple[str, bool], dict[str, Any]]:
    """Every job's answer by what was decoded and whether with IO binding."""
    jobs = {(family, bound): batch_job(artifact(family), bound) for family in EXPORTED for bound in (True, False)}
    jobs |= {("half", bound): batch_job(half, bound) for bound in (True, False)}
    jobs["text", True] = {"folder": str(shown[0]), "io_binding": True, "text": TEXT, "new_tokens": NEW}
    return dict(zip(jobs, decode(list(jobs.values())), strict=True))


@pytest.mark.parametrize("io_binding", [True, False])
@pytest.mark.parametrize("family", EXPORTED)
def test_a_left_padded_batch_gets_the_logits_and_tokens_of_pytorch(
    answers: dict[tuple[str, bool], dict[str, Any]], family: str, io_binding: bool
) -> None:
    answer, model = answers[family, io_binding], wrapped(family)
    with torch.no_grad():
        truth = model(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(-1) - 1).clamp(min=0), logits_to_keep=1)
    assert (truth.selected_layer < len(model.anatomy.layers)).any(), (
        "no row is spoken by an earlier layer: final logits would pass too"
    )
    found = torch.tensor(answer["logits"])
    assert (found - truth.logits).abs().max() < 1e-5 * truth.logits.abs().max()
    wanted = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert answer["tokens"] == wanted.tolist()


@pytest.mark.parametrize("io_binding", [True, False])
def test_float16_gives_what_our_own_runner_gives(
    answers: dict[tuple[str, bool], dict[str, Any]], half: Path, io_binding: bool
) -> None:
    """Bit for bit: the graph and the runtime are the same. That they agree with PyTorch, the export proved."""
    runner = export.load(half)
    answer = answers["half", io_binding]
    assert torch.equal(torch.tensor(answer["logits"]), runner(IDS, attention_mask=MASK).logits.double())
    wanted = runner.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert answer["tokens"] == wanted.tolist()


def test_its_older_transformers_reads_the_tokenizer_beside_the_graph(
    answers: dict[tuple[str, bool], dict[str, Any]], shown: tuple[Path, Any]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shown[0])
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert answers["text", True]["input_ids"] == ids.tolist()
    wanted = export.load(shown[0]).generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert answers["text", True]["text"] == tokenizer.decode(wanted[0])
