"""An artifact -> folders of a Triton model repository, which `tritonserver` starts as they are.

1. Check: the artifact's hashes, that it has logits and a tokenizer, that the name is a name.
2. Write aside: a version folder with the artifact, the serving code and `serving.json`, and `config.pbtxt`.
3. Move into place: a version folder that is already the same stays untouched.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer

from cdsurgery.errors import ArtifactError, InvalidInputError, UnsupportedModelError
from cdsurgery.export.artifact.clients import GRAPH_FILE
from cdsurgery.export.artifact.external_data import check_external_data
from cdsurgery.export.artifact.manifest import NAME as MANIFEST
from cdsurgery.export.artifact.manifest import Manifest, check_files, check_runner, read_manifest
from cdsurgery.export.artifact.staging import copy_file, workplace
from cdsurgery.export.tensorrt.manifest import ENGINE_FILE, read_engine_manifest
from cdsurgery.export.tensorrt.manifest import NAME as ENGINE_MANIFEST
from cdsurgery.export.triton.config import STEP_FILES, WARM_UP_FILE, step_config, text_config, unary_config
from cdsurgery.export.triton.options import ServingOptions
from cdsurgery.export.triton.serving import settings as serving
from cdsurgery.export.triton.settings import serving_settings

ARTIFACT = "artifact"
UNARY_SETTINGS = "unary.json"  # as `unary.model`, which only a server can import, calls it
# Kind of model -> one of these lies in its version folders.
MARKS = {"text": (serving.NAME,), "unary": (UNARY_SETTINGS,), "step": tuple(STEP_FILES.values())}
# A letter or digit first; no separators, so that a name is never a path and never hidden.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
# Text that a tokenizer could cut otherwise in the server than here.
PROBE = "def f(x):\n    return x  # \N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} 1234\n"


def to_triton(
    artifact: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str,
    options: ServingOptions | None = None,
    engine: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model that serves an artifact as text into a Triton model repository.

    Args:
        artifact: what `to_onnx` or `graft` wrote, with a tokenizer.
        repository: a folder; it is made if its parent exists. Other models in it stay as they are.
        name: of the model; what this function wrote under that name before is replaced, its twins included.
        options: how to serve it; None for the defaults of `ServingOptions`.
        engine: a TensorRT plan of this artifact's graph, for `step="tensorrt"`; TensorRT-RTX's are not for Triton.

    Returns:
        The folder of the model, `repository/name`.

    Raises:
        InvalidInputError: the name is not a name, or options do not fit each other or the model.
        ArtifactError: the artifact is incomplete or changed, has no tokenizer, or a folder of that name is not ours.
        UnsupportedModelError: its graph returns no logits, or keeps its cache in a dtype that numpy does not have.
    """
    options = ServingOptions() if options is None else options
    source, target = Path(artifact), Path(repository).absolute()
    if not MODEL_NAME.fullmatch(name) or ".." in name:
        raise InvalidInputError(
            f"The model name is {name!r}; it must be letters, digits, '_', '-' and single dots, and begin with a "
            "letter or digit: it becomes the name of a folder and part of a URL."
        )
    if (engine is None) != (options.step != "tensorrt"):
        raise InvalidInputError("engine and step='tensorrt' belong together: a plan of this artifact's graph.")
    manifest = read_manifest(source)
    if ENGINE_FILE in manifest.files:
        raise InvalidInputError(
            f"{source} is a TensorRT engine. Give the ONNX artifact that it was built from; with step='tensorrt' its "
            f"{ENGINE_FILE} can be given as engine."
        )
    check_files(source, manifest)
    check_external_data(source / GRAPH_FILE)
    _check_servable(source, manifest, options)
    if engine is not None:
        _check_engine(Path(engine), manifest)
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{repository} is not a folder. Give one that is, or one that does not exist.")
    # Beside the repository, where a server that polls it does not look.
    with workplace(target) as aside:
        _write_text_model(aside / name, name, source, manifest, options)
        if options.unary:
            _write_unary_model(aside / f"{name}_unary", name, options.version)
        if options.step is not None:
            _write_step_model(aside, f"{name}_step", source, manifest, options, engine)
        models = {name: "text", f"{name}_unary": "unary", f"{name}_step": "step"}
        for model, kind in models.items():
            if (aside / model).exists():
                _check_ours(target / model, kind)
        for model, kind in models.items():
            if (aside / model).exists():
                _move(aside / model, target / model, aside)
            elif _kind(target / model) == kind:  # a twin that is no longer wanted has another artifact's weights
                os.replace(target / model, aside / f"old-{model}")
    return Path(repository) / name


def _check_servable(source: Path, manifest: Manifest, options: ServingOptions) -> None:
    check_runner(source, manifest)
    if manifest.options.positions == "score":
        raise UnsupportedModelError(
            "This artifact was made with positions='score' and returns no logits to choose a token from. Export the "
            "model again with positions='last'."
        )
    returned = {spec.name for spec in manifest.signature.outputs}
    if absent := {"logits", "final_logits", "selected_layer", "entropy"} - returned:
        raise ArtifactError(f"The manifest of {source} names no output {', '.join(sorted(absent))}. Export it again.")
    if "tokenizer.json" not in manifest.files:
        raise ArtifactError(
            f"{source} has no tokenizer.json, and a server of text needs one. Export the model again with tokenizer=."
        )
    if odd := sorted({spec.dtype for spec in manifest.signature.past} - {"float32", "float16"}):
        raise UnsupportedModelError(
            f"The cache of this artifact is {', '.join(odd)}, which numpy does not have, so requests cannot join a "
            "batch. Export the model with upcast=True or in float16."
        )
    if manifest.group_query_attention and options.slots > 1:
        raise UnsupportedModelError(
            "The GroupQueryAttention of this artifact takes the tokens of a row to stand first, and requests that run "
            f"together have caches padded on the left. slots is {options.slots}; use slots=1, or export the model with "
            "to_onnx."
        )
    from tokenizers import Tokenizer

    cut = AutoTokenizer.from_pretrained(source, trust_remote_code=False)(PROBE)["input_ids"]
    if (alone := Tokenizer.from_file(str(source / "tokenizer.json")).encode(PROBE).ids) != cut:
        raise UnsupportedModelError(
            f"tokenizer.json by itself cuts {PROBE!r} into {alone}, and transformers into {cut}. The server has only "
            "the file, so its text would differ."
        )


def _check_engine(engine: Path, manifest: Manifest) -> None:
    """Of a plan that `to_tensorrt` wrote, what stands beside it: made of this graph, by what Triton's backend loads."""
    if not (engine.parent / ENGINE_MANIFEST).is_file():
        return
    made = read_engine_manifest(engine.parent)
    if made.package != "tensorrt":
        raise InvalidInputError(
            f"{engine} was built by {made.package}, whose engines Triton does not load. Build one of the artifact with "
            "package='tensorrt'."
        )
    if any(manifest.files.get(name, {}).get("sha256") != sha256 for name, sha256 in made.onnx.items()):
        raise InvalidInputError(f"{engine} was built of another graph than this artifact's. Give one of its own.")


def _write_text_model(folder: Path, name: str, source: Path, manifest: Manifest, options: ServingOptions) -> None:
    version = folder / str(options.version)
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text_config(name, options), encoding="utf-8")
    if options.first_request:
        (folder / "warmup").mkdir()
        # Triton's form of a string in a file: its length in four bytes before it.
        text = b"a"
        (folder / "warmup" / WARM_UP_FILE).write_bytes(len(text).to_bytes(4, "little") + text)
    _write_code(serving.__package__, version)
    graph = {GRAPH_FILE, *(entry for entry in manifest.files if entry.startswith(f"{GRAPH_FILE}."))}
    (version / ARTIFACT).mkdir()
    for entry in sorted([*manifest.files, MANIFEST]):
        if not (options.bls and entry in graph):
            copy_file(source, version / ARTIFACT, entry)
    copied = {
        path.relative_to(version).as_posix(): {"sha256": serving.sha256(path), "size": path.stat().st_size}
        for path in sorted((version / ARTIFACT).rglob("*"))
        if path.is_file()
    }
    step_model = f"{name}_step" if options.bls else None
    settings = serving_settings(source, manifest, options, files=copied, step_model=step_model)
    (version / serving.NAME).write_text(settings.to_json(), encoding="utf-8")


def _write_unary_model(folder: Path, model: str, number: int) -> None:
    version = folder / str(number)
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(unary_config(folder.name), encoding="utf-8")
    _write_code(f"{__package__}.unary", version)
    (version / UNARY_SETTINGS).write_text(json.dumps({"model": model}) + "\n", encoding="utf-8")


def _write_code(package: str, version: Path) -> None:
    """The modules of a package into a version folder, where the server's Python runs them."""
    for module in sorted(files(package).iterdir(), key=lambda entry: entry.name):
        if module.name.endswith(".py"):
            (version / module.name).write_bytes(module.read_bytes())


def _write_step_model(
    aside: Path,
    name: str,
    source: Path,
    manifest: Manifest,
    options: ServingOptions,
    engine: str | os.PathLike[str] | None,
) -> None:
    assert options.step is not None
    version = aside / name / str(options.version)
    version.mkdir(parents=True)
    (aside / name / "config.pbtxt").write_text(step_config(name, manifest.signature, options), encoding="utf-8")
    if engine is not None:
        try:
            shutil.copyfile(engine, version / STEP_FILES[options.step])
        except OSError as error:
            raise InvalidInputError(f"The engine {engine} cannot be read: {error}.") from error
        return
    for entry in sorted(manifest.files):
        if entry == GRAPH_FILE or not entry.endswith((".json", ".jinja", ".txt", ".model")):
            copy_file(source, version, entry)


def _check_ours(place: Path, kind: str) -> None:
    """Refuse to touch a model that something else wrote, or that is of another kind."""
    if place.is_symlink() or (place.exists() and not (place / "config.pbtxt").is_file()):
        raise ArtifactError(f"{place} exists and is not a model folder that this wrote. Choose another name.")
    if not place.exists():
        return
    if (found := _kind(place)) is None:
        raise ArtifactError(f"{place} is a model that something else wrote. Choose another name.")
    if found != kind:
        raise ArtifactError(f"{place} is the {found} model of another name, not a {kind} model. Choose another name.")


def _kind(place: Path) -> str | None:
    """Which of `MARKS` a model folder has."""
    return next((kind for kind, names in MARKS.items() if any(any(place.glob(f"*/{name}")) for name in names)), None)


def _move(written: Path, place: Path, aside: Path) -> None:
    """Bring a model folder to its place; what is there already with the same bytes stays as it is."""
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        os.replace(written, place)
        return
    # The version first: a server that polls must not see a config for files that are not there yet.
    for entry in sorted(written.iterdir(), key=lambda path: path.name == "config.pbtxt"):
        there = place / entry.name
        if _same(entry, there):
            continue
        if there.is_dir():
            os.replace(there, aside / f"old-{place.name}-{entry.name}")
        os.replace(entry, there)


def _same(one: Path, other: Path) -> bool:
    """Whether two files, or two folders with all that is in them, are equal byte for byte."""
    if one.is_dir() and other.is_dir():
        names = {path.name for path in one.iterdir()}
        caches = {"__pycache__"}  # the server's Python writes them
        return names == {path.name for path in other.iterdir()} - caches and all(
            _same(one / name, other / name) for name in names
        )
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)
