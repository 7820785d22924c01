"""The house: what is packaged, what an import loads, and that modules depend on each other in one direction only."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import cdsurgery

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "peft",
    "rich",
    "tensorrt",
    "tritonclient",
    "vllm",
}

PUBLIC = [
    "Anatomy",
    "ArtifactError",
    "ConfidentConfig",
    "ConfidentHead",
    "ConfidentOutput",
    "InvalidInputError",
    "SurgeryError",
    "Transform",
    "UnsupportedModelError",
    "unwrap",
    "wrap",
]


def source_files() -> dict[str, Path]:
    """Every module of the package by its dotted name; the folder export/ is cdsurgery.export."""
    files: dict[str, Path] = {}
    for name, folder in (("cdsurgery", ROOT / "cdsurgery"), ("cdsurgery.export", ROOT / "export")):
        link = folder / "export"
        for path in sorted(folder.rglob("*.py")):
            if not path.is_relative_to(link):  # whether rglob follows links depends on the version of Python
                parts = path.relative_to(folder).with_suffix("").parts
                files[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return files


FILES = source_files()
# What is copied into a Triton repository runs there without this package, under another name.
SERVING, UNARY = "cdsurgery.export.triton.serving", "cdsurgery.export.triton.unary"
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
COPIED = {TREES[name] for name in FILES if name.startswith(f"{SERVING}.")}
# The modules of cdsurgery/*.py, which stand alone: those of its subpackages build on them.
CORE = [name for name, path in FILES.items() if path.parent == ROOT / "cdsurgery"]


def imports(tree: ast.Module) -> Iterator[str]:
    """The dotted names that a module imports, anywhere in it: those inside functions are dependencies too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = tree in COPIED and node.level == 1
            assert (node.level == 0 or relative) and node.module, f"line {node.lineno}: relative import"
            module = f"{SERVING}.{node.module}" if relative else node.module
            submodules = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else module for name in submodules)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_files_of_all_three_packages_are_found() -> None:
    assert {"cdsurgery", "cdsurgery.entropy", "cdsurgery.cli", "cdsurgery.export"} <= FILES.keys()
    assert "cdsurgery.trough" in CORE
    assert not [name for name in CORE if is_inside(name, "cdsurgery.export") or is_inside(name, "cdsurgery.cli")]


def test_the_list_of_packages_is_that_of_the_folders() -> None:
    folders = {path.parent: name for name, path in FILES.items() if path.name == "__init__.py"}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders.values())
    assert {path.parent for path in FILES.values()} == folders.keys(), "a folder of modules without __init__.py"


def test_setuptools_and_the_link_find_export_in_the_same_folder() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"cdsurgery.export": "export"}
    link = ROOT / "cdsurgery" / "export"
    assert link.is_symlink()
    assert link.readlink() == Path("../export")
    assert link.resolve() == ROOT / "export"


def test_types_are_shipped() -> None:
    assert (ROOT / "cdsurgery" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["cdsurgery"]


def test_import_loads_nothing_heavy_beyond_what_torch_and_transformers_load() -> None:
    script = (
        "import json, sys, torch, transformers; before = set(sys.modules); import cdsurgery; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "cdsurgery" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_nothing_but_torch_transformers_and_the_standard_library(name: str) -> None:
    roots = {imported.partition(".")[0] for imported in imports(TREES[name])}
    assert roots - sys.stdlib_module_names <= {"torch", "transformers", "safetensors", "cdsurgery"}


def test_the_triton_language_is_imported_where_kernels_are_written_and_started_and_nowhere_else() -> None:
    users = {name for name, tree in TREES.items() if any(is_inside(imported, "triton") for imported in imports(tree))}
    assert users == {"cdsurgery.kernels.tiles", "cdsurgery.kernels.troughs", "cdsurgery.kernels.launch"}
    starts = {name for name, tree in TREES.items() if "cdsurgery.kernels.launch" in imports(tree)}
    assert starts == {f"cdsurgery.kernels.{name}" for name in ("unembed_sums", "pick_trough", "compact")}
    at_import = [node for node in TREES["cdsurgery.kernels.unembed_sums"].body if isinstance(node, ast.ImportFrom)]
    assert "cdsurgery.kernels.launch" not in {node.module for node in at_import}


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_neither_the_exporters_nor_the_command_line(name: str) -> None:
    above = ("cdsurgery.export", "cdsurgery.cli")
    assert not [imported for imported in imports(TREES[name]) if any(is_inside(imported, package) for package in above)]


@pytest.mark.parametrize("name", [name for name in FILES if is_inside(name, "cdsurgery.export")])
def test_the_exporters_do_not_know_the_command_line(name: str) -> None:
    assert not [imported for imported in imports(TREES[name]) if is_inside(imported, "cdsurgery.cli")]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith((f"{SERVING}.", f"{UNARY}."))])
def test_what_runs_in_triton_imports_its_neighbours_by_relative_names_and_little_else(name: str) -> None:
    absolute = [node.module for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not [module for module in absolute if module and is_inside(module, "cdsurgery")]
    roots = {imported.partition(".")[0] for imported in imports(TREES[name])}
    allowed = {"numpy", "onnxruntime", "tokenizers", "triton_python_backend_utils", "cdsurgery"}
    assert roots - sys.stdlib_module_names <= allowed


def test_modules_depend_on_each_other_without_a_cycle() -> None:
    graph = {name: {imported for imported in imports(tree) if imported in FILES} for name, tree in TREES.items()}
    assert graph["cdsurgery.trough"] == {"cdsurgery.entropy"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", FILES)
def test_every_import_of_this_package_names_a_module_that_exists(name: str) -> None:
    own = [imported for imported in imports(TREES[name]) if is_inside(imported, "cdsurgery")]
    assert not [imported for imported in own if imported not in FILES]


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_in_its_first_line_what_it_offers(name: str) -> None:
    docstring = ast.get_docstring(TREES[name])
    assert docstring
    assert docstring.splitlines()[0].strip()


def test_the_public_names_are_these() -> None:
    modules = {name for name, value in vars(cdsurgery).items() if isinstance(value, ModuleType)}
    assert sorted(set(vars(cdsurgery)) - modules - {name for name in vars(cdsurgery) if name[0] == "_"}) == PUBLIC
    assert not modules & set(PUBLIC)
    assert isinstance(cdsurgery.__version__, str)
