"""`export.to_tensorrt` with TensorRT-RTX for real: what is built, what the manifests say, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from artifacts import artifact, wrapped
from engines import RTX, TARGETS, engine, needs_rtx
from families import mostly

from cdsurgery import ArtifactError, InvalidInputError, SurgeryError, export
from cdsurgery.cli.main import main
from cdsurgery.export.artifact.manifest import describe_files
from cdsurgery.export.tensorrt import package
from cdsurgery.export.tensorrt.build import _timing_cache
from cdsurgery.export.tensorrt.log import make_log
from cdsurgery.export.tensorrt.manifest import read_engine_manifest
from cdsurgery.export.tensorrt.options import BuildOptions
from cdsurgery.export.tensorrt.package import import_tensorrt

SMALL: dict[str, Any] = {"package": RTX, "targets": ("SM89",), "batch": 1, "sequence": 4, "past": 8}


def _say(folder: Path, **changes: Any) -> Path:
    """Change what an artifact's manifest says."""
    path = folder / "cdsurgery.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def _said_otherwise(folder: Path, **changes: Any) -> Path:
    return _say(shutil.copytree(artifact("llama"), folder), **changes)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@needs_rtx
def test_an_engine_is_built_and_described() -> None:
    folder, source = engine("llama"), artifact("llama")
    made = read_engine_manifest(folder)
    trt = import_tensorrt(RTX)
    assert (made.package, made.version, made.targets) == (RTX, trt.__version__, TARGETS)
    assert made.gpu is None or torch.cuda.is_available()
    assert made.onnx == {name: sha256(source / name) for name in ("model.onnx", "model.onnx.data")}
    plan = folder / "model.engine"
    assert made.engine == {"sha256": sha256(plan), "size": plan.stat().st_size}
    # The weights are in it, not only kernels: as many bytes as the artifact has, at least.
    assert plan.stat().st_size > (source / "model.onnx.data").stat().st_size
    assert made.build_seconds > 0
    assert made.peak_memory_bytes > plan.stat().st_size
    assert [(one.name, {axis: str(size) for axis, size in one.axes.items()}) for one in made.profiles] == [
        ("prefill", {"batch": "1 to 4", "sequence": "1 to 32", "past": "0 to 95"}),
        ("decode", {"batch": "1 to 4", "sequence": "1 to 1", "past": "0 to 95"}),
    ]
    assert "Engine generation completed" in (folder / "build.log").read_text()


@needs_rtx
def test_the_folder_describes_the_artifact_and_every_file(tmp_path: Path) -> None:
    source = shutil.copytree(artifact("llama"), tmp_path / "artifact")
    (source / "templates").mkdir()
    (source / "templates" / "tools.jinja").write_text("{{ messages }}")
    _say(source, files=describe_files(source))
    folder = export.to_tensorrt(source, tmp_path / "engine", **SMALL)
    made, of = (json.loads((place / "cdsurgery.json").read_text()) for place in (folder, source))
    for name in ("signature", "confident", "options", "layers", "dtype", "model_type"):
        assert made[name] == of[name]
    assert made["parity"] is None  # the graph's, which does not speak for the engine
    whole = [path for path in folder.rglob("*") if path.is_file() and path.name != "cdsurgery.json"]
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in whole}
    assert {name: said["sha256"] for name, said in made["files"].items()} == files
    own = {"model.engine", "engine.json", "build.log"}
    assert files.keys() == {*own, "config.json", "generation_config.json", "templates/tools.jinja"}


@needs_rtx
@pytest.mark.parametrize("dtype", mostly([torch.bfloat16], [torch.float16, torch.bfloat16]), ids=str)
def test_half_precision_builds_though_no_cpu_runs_bfloat16(tmp_path: Path, dtype: torch.dtype) -> None:
    export.to_onnx(wrapped("mistral", dtype), tmp_path / "artifact", parity=False)
    folder = export.to_tensorrt(tmp_path / "artifact", tmp_path / "engine", **SMALL)
    specs = {spec.name: spec.dtype for spec in read_engine_manifest(folder).signature.outputs}
    assert specs["present.0.key"] == str(dtype).removeprefix("torch.")
    assert specs["entropy"] == "float32"


@needs_rtx
def test_products_stay_whole_and_nan_stays_nan() -> None:
    trt = import_tensorrt(RTX)
    builder = trt.Builder(make_log(trt))
    config = builder.create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32)  # TensorRT's default
    BuildOptions().configure(trt, config)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.STRICT_NANS)
    assert not config.get_flag(trt.BuilderFlag.REFIT)
    BuildOptions(targets=("SM86", "SM120"), weight_streaming=True).configure(trt, config)
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    assert [config.get_compute_capability(n).name for n in range(config.num_compute_capabilities)] == ["SM86", "SM120"]


@needs_rtx
def test_an_engine_for_later_versions_brings_no_code_for_the_host() -> None:
    flags = BuildOptions(version_compatible=True).flags()
    assert flags == ["STRICT_NANS", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
    trt = import_tensorrt(RTX)
    with pytest.raises(InvalidInputError, match="tensorrt_rtx builds no engines for its later versions"):
        BuildOptions(version_compatible=True).configure(trt, trt.Builder(make_log(trt)).create_builder_config())


@needs_rtx
def test_progress_comes_in_order(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    export.to_tensorrt(artifact("llama"), tmp_path / "engine", **SMALL, progress=lambda *told: seen.append(told))
    shares = [share for phase, share in seen if phase == "Building engine"]
    assert all(0 <= share <= 1 for _, share in seen)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert len(shares) > 2


@needs_rtx
def test_what_progress_raises_stops_the_build_and_leaves_nothing(tmp_path: Path) -> None:
    def stop(_phase: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.to_tensorrt(artifact("llama"), tmp_path / "engine", **SMALL, progress=stop)
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"targets": ("SM75",)}, ArtifactError, r"cannot build an engine(.|\n)*FP32 GEMM is not supported"),
        ({"targets": ("SM42",)}, InvalidInputError, r"\('SM42',\); for tensorrt_rtx it must be a list of .*SM89"),
        ({"targets": "SM89"}, InvalidInputError, "must be a list of"),
        ({"hardware_compatible": True}, InvalidInputError, "Pass targets instead"),
        ({"batch": (4, 2, 8)}, InvalidInputError, "smallest 4, tuned for 2, largest 8"),
        ({"batch": 0}, InvalidInputError, "batch is 0"),
        ({"sequence": 2.5}, InvalidInputError, r"sequence is 2\.5"),
        ({"package": "tensorflow"}, InvalidInputError, "package is 'tensorflow'"),
        ({"timing_cache": "file"}, InvalidInputError, "measures nothing while it builds"),
    ],
)
def test_what_cannot_be_built_is_refused_in_clear_words(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        export.to_tensorrt(artifact("llama"), tmp_path / "engine", **(SMALL | options))
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_timing_cache_is_there_before_an_engine_is_built_for_minutes(tmp_path: Path) -> None:
    config = SimpleNamespace(create_timing_cache=lambda known: known, set_timing_cache=lambda cache, mismatch: True)
    assert _timing_cache(SimpleNamespace(), config, tmp_path / "new" / "kernels") == b""
    assert (tmp_path / "new").is_dir()


@needs_rtx
def test_a_graph_that_tensorrt_cannot_read_is_quoted_by_its_node(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    source = shutil.copytree(artifact("llama"), tmp_path / "artifact")
    path = source / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node.append(helper.make_node("NoSuchOperator", ["input_ids"], ["odd"], name="the_odd_one"))
    model.graph.output[0].name = "odd"
    onnx.save(model, path)
    files = json.loads((source / "cdsurgery.json").read_text())["files"]
    files["model.onnx"] = {"sha256": sha256(path), "size": path.stat().st_size}
    _say(source, files=files)
    with pytest.raises(ArtifactError, match=r"cannot read .*It said:\n.*NoSuchOperator the_odd_one"):
        export.to_tensorrt(source, tmp_path / "engine", **SMALL)
    assert not (tmp_path / "engine").exists()


@needs_rtx
def test_a_builder_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = import_tensorrt(RTX)

    def nothing(log: Any) -> Any:
        log.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", nothing)
    with pytest.raises(ArtifactError, match=r"cannot start a builder for (.|\n)*failure with error: 35"):
        export.to_tensorrt(artifact("llama"), tmp_path / "engine", **SMALL)
    assert not list(tmp_path.iterdir())


def test_artifacts_of_other_kinds_are_refused_before_tensorrt_is_asked_for(tmp_path: Path) -> None:
    changed = shutil.copytree(artifact("llama"), tmp_path / "changed")
    with (changed / "model.onnx.data").open("r+b") as file:
        file.write(b"other weights")
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    cpu = _said_otherwise(tmp_path / "cpu", options={"positions": "last", "target": "cpu", "upcast": False})
    int8 = _said_otherwise(tmp_path / "int8", quantization={"scheme": "int8", "head": True, "float": []})
    for source, kind, message in (
        (tmp_path / "model.onnx", InvalidInputError, r"is a file; .*export\.graft"),
        (tmp_path / "empty", ArtifactError, r"is not an artifact: it has no cdsurgery\.json"),
        (changed, ArtifactError, r"model\.onnx\.data was changed"),
        (cpu, InvalidInputError, "'target': 'cpu'.* operators that only ONNX Runtime has"),
        (int8, InvalidInputError, "'scheme': 'int8'"),
    ):
        with pytest.raises(kind, match=message):
            export.to_tensorrt(source, tmp_path / "engine", package="tensorrt")
    assert not (tmp_path / "engine").exists()


def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match=r"tensorrt or tensorrt_rtx is needed .*cdsurgery\[tensorrt-rtx\]"):
        export.to_tensorrt(artifact("llama"), "engine")
    with pytest.raises(SurgeryError, match=r"^tensorrt is needed .*cdsurgery\[tensorrt\]'\.$"):
        export.to_tensorrt(artifact("llama"), "engine", package="tensorrt")


CHILD = """
import resource, sys
from cdsurgery import ArtifactError, export
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    export.to_tensorrt(sys.argv[1], sys.argv[2], package="tensorrt_rtx", targets=["SM89"], batch=1, sequence=4, past=8)
except ArtifactError as error:
    print(error)
"""


@needs_rtx
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as Linux has it")
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(artifact("llama")), str(tmp_path / "engine")]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "engine could not be written, and nothing of it was kept: " in run.stdout, run.stderr[-2000:]
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_the_command_builds_and_prints_what_was_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "2", "--sequence", "1,2,4", "--past", "8", "--target", "SM89", "--package", RTX]
    command = ["export", "tensorrt", str(artifact("llama")), str(tmp_path / "engine"), *sizes]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["package"] == RTX
    assert found["profiles"]["prefill"]["sequence"] == {"minimum": 1, "optimum": 2, "maximum": 4}
    assert found["files"]["model.engine"] == (tmp_path / "engine" / "model.engine").stat().st_size
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path / "other"), "--batch", "many"]) == 2
    assert "--batch is 'many'; it must be a number such as 8" in capsys.readouterr().err


def test_importing_the_exporters_imports_no_tensorrt() -> None:
    script = "import sys; from cdsurgery import export; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "onnxruntime" in loaded
    assert not {"tensorrt", "tensorrt_rtx"} & loaded
