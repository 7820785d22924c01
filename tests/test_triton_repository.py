"""What `to_triton` writes: byte-exact configs, and the same bytes again."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from artifacts import contents
from command_line import exit_code
from served import SIGNATURE
from triton_server import ENVIRONMENT, ROOT

from cdsurgery import export
from cdsurgery.errors import ArtifactError
from cdsurgery.export.artifact.manifest import describe_files
from cdsurgery.export.triton.config import step_config, text_config, unary_config

GOLDEN = ROOT / "tests" / "golden"
PYTHON = ENVIRONMENT / "bin" / "python"
GPU = export.ServingOptions(
    kind="gpu", gpus=(0, 1), instances=2, warm_up=False, rate_limit={"memory": 2, "bus": 1}, step="tensorrt"
)


def configs() -> dict[str, str]:
    return {
        "text": text_config("my-llm", export.ServingOptions()),
        "text_gpu": text_config("my-llm", GPU),
        "text_unary": unary_config("my-llm_unary"),
        "step": step_config("my-llm_step", SIGNATURE, export.ServingOptions(step="onnxruntime")),
        "step_gpu": step_config("my-llm_step", SIGNATURE, GPU),
    }


@pytest.mark.parametrize("name", ["text", "text_gpu", "text_unary", "step", "step_gpu"])
def test_configs_are_these_bytes(name: str) -> None:
    assert configs()[name] == (GOLDEN / f"{name}.pbtxt").read_text(encoding="utf-8")


@pytest.mark.skipif(not PYTHON.exists(), reason="make test builds the environment .venv-triton")
@pytest.mark.parametrize("name", ["text", "text_gpu", "text_unary", "step", "step_gpu"])
def test_tritons_own_protobuf_reads_every_field(name: str) -> None:
    text = (GOLDEN / f"{name}.pbtxt").read_text(encoding="utf-8")
    script = ROOT / "tests" / "clients" / "triton_config.py"
    done = subprocess.run([PYTHON, "-I", script], input=text, capture_output=True, text=True, check=True)
    config = json.loads(done.stdout)
    if name.startswith("text"):
        policy = config["model_transaction_policy"]
        assert policy == ({} if name == "text_unary" else {"decoupled": True})  # JSON leaves out what is false
        assert [entry["name"] for entry in config["input"] if not entry.get("optional")] == ["text_input"]
    else:
        assert [entry["name"] for entry in config["input"]] == [spec.name for spec in SIGNATURE.inputs]
        assert [entry["name"] for entry in config["output"]] == [spec.name for spec in SIGNATURE.outputs]
        for entry, spec in zip(config["input"] + config["output"], SIGNATURE.inputs + SIGNATURE.outputs, strict=True):
            assert [int(size) for size in entry["dims"]] == [s if isinstance(s, int) else -1 for s in spec.axes]
    if name.endswith("gpu"):
        (group,) = config["instance_group"]
        assert (group["kind"], group["count"], group["gpus"]) == ("KIND_GPU", 2, [0, 1])
        assert group["rate_limiter"]["resources"] == [{"name": "bus", "count": 1}, {"name": "memory", "count": 2}]


def test_a_second_time_changes_no_byte_and_no_time_and_other_options_change_the_model(
    servable: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    (repository / "another").mkdir(parents=True)
    (repository / "another" / "config.pbtxt").write_text("of somebody else")
    export.to_triton(servable, repository, name="tiny")
    first, times = contents(repository), {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    (repository / "tiny" / "1" / "__pycache__").mkdir()  # as the server leaves it
    assert export.to_triton(servable, repository, name="tiny") == repository / "tiny"
    assert contents(repository) == first
    assert all(path.stat().st_mtime_ns == then for path, then in times.items() if path.name != "1")

    export.to_triton(servable, repository, name="tiny", options=export.ServingOptions(slots=3))
    changed = {name for name, data in contents(repository).items() if first.get(name) != data}
    assert changed == {"tiny/1/serving.json"}
    export.to_triton(servable, repository, name="tiny", options=export.ServingOptions(version=2))
    assert {path.name for path in (repository / "tiny").iterdir()} == {"1", "2", "config.pbtxt", "warmup"}
    assert [path.name for path in tmp_path.iterdir()] == ["repository"], "something was left behind"


def test_the_artifact_inside_is_the_artifact(servable: Path, tmp_path: Path) -> None:
    export.to_triton(servable, tmp_path / "repository", name="tiny")
    assert contents(tmp_path / "repository" / "tiny" / "1" / "artifact") == contents(servable)


def test_through_a_step_model_the_graph_is_there_once(servable: Path, tmp_path: Path) -> None:
    options = export.ServingOptions(step="onnxruntime", bls=True)
    export.to_triton(servable, tmp_path / "repository", name="tiny", options=options)
    found = [path.relative_to(tmp_path / "repository") for path in (tmp_path / "repository").rglob("model.onnx*")]
    assert sorted(map(str, found)) == ["tiny_step/1/model.onnx", "tiny_step/1/model.onnx.data"]


def test_the_unary_twin_is_code_and_a_name_and_can_be_left_out(servable: Path, tmp_path: Path) -> None:
    options = export.ServingOptions(slots=3, queue=4, instances=2)
    export.to_triton(servable, tmp_path / "repository", name="tiny", options=options)
    found = contents(tmp_path / "repository" / "tiny_unary")
    assert found.keys() == {"config.pbtxt", "1/__init__.py", "1/model.py", "1/unary.json"}
    assert json.loads(found["1/unary.json"]) == {"model": "tiny"}
    export.to_triton(servable, tmp_path / "without", name="tiny", options=export.ServingOptions(unary=False))
    assert [path.name for path in (tmp_path / "without").iterdir()] == ["tiny"]


def test_twins_that_are_no_longer_asked_for_are_gone_and_models_called_like_twins_stay(
    servable: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    alone = export.ServingOptions(unary=False)
    export.to_triton(servable, repository, name="tiny", options=export.ServingOptions(step="onnxruntime"))
    export.to_triton(servable, repository, name="tiny", options=alone)
    assert [path.name for path in repository.iterdir()] == ["tiny"]
    export.to_triton(servable, repository, name="tiny_unary", options=alone)  # a model of its own
    before = contents(repository)
    with pytest.raises(ArtifactError, match=r"tiny_unary is the text model of another name, not a unary model"):
        export.to_triton(servable, repository, name="tiny")
    export.to_triton(servable, repository, name="tiny", options=alone)
    assert contents(repository) == before
    assert [path.name for path in tmp_path.iterdir()] == ["repository"], "something was left behind"


def test_no_first_request_is_sent_through_a_step_model_which_runs_only_when_the_server_is_ready(
    servable: Path, tmp_path: Path
) -> None:
    for bls in (False, True):
        options = export.ServingOptions(step="onnxruntime", bls=bls)
        folder = export.to_triton(servable, tmp_path / f"repository-{bls}", name="tiny", options=options)
        assert (folder / "warmup").exists() == ("model_warmup" in (folder / "config.pbtxt").read_text()) == (not bls)


def test_settings_of_generate_are_kept_or_warned_of(servable: Path, tmp_path: Path) -> None:
    source = tmp_path / "artifact"
    shutil.copytree(servable, source)
    manifest = json.loads((source / "cdsurgery.json").read_text())
    asked = {"do_sample": True, "min_p": 0.25, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "num_beams": 1}
    (source / "generation_config.json").write_text(json.dumps(asked))
    (source / "templates").mkdir()
    (source / "templates" / "tools.jinja").write_text("{{ messages }}")
    manifest["files"] = describe_files(source)
    (source / "cdsurgery.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"asks for no_repeat_ngram_size=3, which the server does not do"):
        folder = export.to_triton(source, tmp_path / "repository", name="tiny")
    assert contents(folder / "1" / "artifact") == contents(source)
    told = json.loads((folder / "1" / "serving.json").read_text())
    assert "artifact/templates/tools.jinja" in told["files"]
    assert [told[name] for name in ("temperature", "min_p", "repetition_penalty")] == [1.0, 0.25, 1.5]


def test_the_command_writes_what_the_function_writes(
    servable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--slots", "4", "--queue-timeout-seconds", "2.5", "--rate-limit", "memory=2", "--step", "onnxruntime"]
    arguments = ["export", "triton", str(servable), str(tmp_path / "command"), "--name", "tiny", *options, "--json"]
    assert exit_code(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["models"] == ["tiny", "tiny_unary", "tiny_step"]
    same = export.ServingOptions(slots=4, queue_timeout_seconds=2.5, rate_limit={"memory": 2}, step="onnxruntime")
    export.to_triton(servable, tmp_path / "function", name="tiny", options=same)
    assert contents(tmp_path / "command") == contents(tmp_path / "function")
    assert exit_code(["export", "triton", str(servable), str(tmp_path / "c"), "--name", "a/b"]) == 2

    gpu = ["--kind", "gpu", "--providers", "tensorrt", "--cache", "/var/cache/engines", "--no-unary", "--json"]
    capsys.readouterr()
    assert exit_code(["export", "triton", str(servable), str(tmp_path / "gpu"), "--name", "tiny", *gpu]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["tiny"]
    same = export.ServingOptions(kind="gpu", providers="tensorrt", cache="/var/cache/engines", unary=False)
    export.to_triton(servable, tmp_path / "same", name="tiny", options=same)
    assert contents(tmp_path / "gpu") == contents(tmp_path / "same")
