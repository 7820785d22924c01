"""A disk that fills up in the middle of an export: a clear error, nothing half written, what was there before intact.

The kernel stands in for the disk: in a process of its own no file may grow beyond RLIMIT_FSIZE, wherever it is.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cdsurgery import ArtifactError
from cdsurgery.export.artifact.staging import staged_folder

# The largest file that is allowed -> the first that does not fit; the sizes themselves are looked at in the end.
LIMITS = {200_000: "model.onnx.data", 20_000: "model.onnx", 8_000: "tokenizer.json"}

CHILD = """
import functools, json, resource, sys
import cdsurgery
from families import tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from cdsurgery import ArtifactError, export
from cdsurgery.export import onnx as exporting

vocabulary = {f"word{number}": number for number in range(600)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0")))
model = cdsurgery.wrap(tiny_model("llama", num_hidden_layers=2), lookback=1)
trace = functools.cache(exporting._trace)  # once, as it is writing that fails
exporting._trace = lambda *of: trace(*of).clone()
for limit in json.loads(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export.to_onnx(model, sys.argv[1], tokenizer=tokenizer, parity=False)
    except ArtifactError as error:
        print(json.dumps(str(error)))
    else:
        print(json.dumps("written"))
"""


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError("4096 requested and 100 written"), True),  # numpy
        (OSError("problem writing element 3072 to file"), True),
        (Exception("No space left on device (os error 28)"), True),  # tokenizers, safetensors
        (Exception("Permission denied (os error 13)"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), False),
    ],
    ids=str,
)
def test_only_a_full_disk_is_called_one(error: Exception, full: bool, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught, staged_folder(tmp_path / "new"):
        raise error
    assert f"new could not be written, and nothing of it was kept: {error}." in str(caught.value)
    assert ("bytes are free in" in str(caught.value)) == full
    assert caught.value.__cause__ is error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_there_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ArtifactError, match="Permission denied"), staged_folder(tmp_path / "new"):
        pass


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "new"):
        raise ZeroDivisionError


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as Linux has it")
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "cdsurgery.json").write_text("mine")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "new"), json.dumps([*LIMITS, 1 << 30])]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    *refused, last = map(json.loads, run.stdout.splitlines())
    assert last == "written"  # which an earlier half of it would have forbidden
    for said in refused:
        assert "new could not be written, and nothing of it was kept: " in said
        assert f"bytes are free in {tmp_path}" in said
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    assert (tmp_path / "old" / "cdsurgery.json").read_text() == "mine"
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    for limit, file in LIMITS.items():
        assert sizes[file] > limit, f"{file} was meant not to fit"
