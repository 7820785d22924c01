"""A model of more than 2 GB: one file of weights, written and verified within 1.5 times their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "large_export.py"


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_DATA as Linux counts it")
def test_a_model_of_2_gb_is_exported_within_one_and_a_half_times_its_weights(tmp_path: Path) -> None:
    """In a process of its own, which the kernel stops if its private memory goes beyond that."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "artifact")]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    print(run.stdout)
    found = json.loads(run.stdout)
    assert found["weights"] > 2**31
    # Once, in one file: what is not a parameter are a few numbers.
    assert found["weights"] <= found["data"] < found["weights"] + 100_000
    assert found["graph"] < 2_000_000
    assert 1 < found["private"] < 1.5
