"""What holds for every test: one thread, as sums then have one order, and no log lines; and what several start from."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

# Before anything imports triton, whose own functions are made for its interpreter, or for a GPU, when they are defined.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from artifacts import PLACE, shared
from command_line import save_tiny_model
from transformers import AutoTokenizer

import cdsurgery
from cdsurgery import export
from cdsurgery.cli.main import main

torch.set_num_threads(1)
# It pays where layers are many; here finding out what it may keep takes a fifth of the time of an export.
torch._dynamo.config.fake_tensor_cache_enabled = False
transformers.logging.set_verbosity_error()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="run the tests marked large too")
    parser.addoption("--thorough", action="store_true", help="run the tests marked thorough too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {
        "large": "a model of 2.3 GB; run it with: pytest --large -m large -s",
        "thorough": "like others that ran; make thorough runs it",
    }
    for marker, reason in skipped.items():
        if not config.getoption(f"--{marker}"):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shown(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The artifact that `demo --keep` left, and what the demo printed with --json."""
    artifact = tmp_path_factory.mktemp("kept") / "artifact"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert main(["demo", "--model", str(folder), "--keep", str(artifact), "--lookback", "3", "--json"]) == 0
        return artifact, json.loads(sys.stdout.getvalue())  # type: ignore[attr-defined]


@pytest.fixture
def servable(shown: tuple[Path, Any]) -> Path:
    """An artifact with a tokenizer."""
    return shown[0]


@pytest.fixture(scope="session")
def tiny_lm() -> Path:
    """The artifact of examples/tiny_lm."""
    model = Path(__file__).resolve().parents[1] / "examples" / "tiny_lm"
    tokenizer = AutoTokenizer.from_pretrained(model)
    return shared("tiny_lm", lambda folder: export.to_onnx(cdsurgery.wrap(model), folder, tokenizer=tokenizer))


@pytest.fixture(scope="session", autouse=True)
def place_of_artifacts(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose temporary folders lie in one folder of the run
        place = place.parent
    PLACE.append(place)


@pytest.fixture(autouse=True)
def transformers_as_it_was() -> Iterator[None]:
    """The commands silence transformers for good, which is right for a process of their own only."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
