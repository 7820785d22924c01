"""A wrapped model whose weights lie on two ranks (gloo, on the CPU)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import mostly, tiny_model

RANK = Path(__file__).with_name("tensor_parallel.py")


# A softcap between its head and its logits; a vocabulary that two ranks cannot share evenly; a bias.
@pytest.mark.parametrize("family", mostly(["gemma2"], ["gemma2", "llama", "phi"]))
def test_two_ranks_select_what_one_does_and_gather_no_candidates(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    if family == "llama":
        model.resize_token_embeddings(model.config.vocab_size - 5)
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ranks = subprocess.run([*launch, str(RANK), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ranks.returncode == 0, ranks.stderr[-6000:]
