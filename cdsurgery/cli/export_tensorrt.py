"""An ONNX artifact -> a TensorRT engine with the layer selection inside."""

from __future__ import annotations

import argparse
from typing import Any

from cdsurgery.cli.export_onnx import check_free, file_sizes, file_table
from cdsurgery.cli.model import import_export, silence_transformers
from cdsurgery.cli.screen import Screen
from cdsurgery.errors import InvalidInputError

SUMMARY = "from an ONNX artifact to a TensorRT engine"
DESCRIPTION = """\
Build a TensorRT engine of an ONNX artifact, with two profiles: prefill and decode. Its precision is the artifact's.
TensorRT builds for the GPU of this machine; TensorRT-RTX builds ahead of time and needs none. Sizes are the largest, or
three numbers, SMALLEST,TUNED,LARGEST; what is not given follows from the model's context and --cache-memory."""
EXAMPLE = "cdsurgery export tensorrt artifact engine --batch 8 --past 1023"
SIZES = {"batch": "rows of a run", "sequence": "new tokens of a prefill", "past": "tokens in the cache"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="a folder made by `cdsurgery export onnx`")
    parser.add_argument("folder", metavar="DIR", help="the folder to make")
    parser.add_argument("--package", choices=("tensorrt", "tensorrt_rtx"), help="default: the first that is installed")
    for name, meaning in SIZES.items():
        parser.add_argument(f"--{name}", metavar="SIZE", help=meaning)
    parser.add_argument(
        "--cache-memory", type=int, metavar="BYTES", help="on the GPU, for the cache (default: 8 GiB)", default=8 << 30
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="SM89",
        help="an architecture to build for, TensorRT-RTX only; may be given several times",
    )
    parser.add_argument("--hardware-compatible", action="store_true", help="for every GPU from Ampere on")
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="for later versions of TensorRT too, with the lean runtime of this one",
    )
    parser.add_argument("--weight-streaming", action="store_true", help="weights may stay in the host's memory")
    parser.add_argument("--refittable", action="store_true", help="weights can be replaced later")
    parser.add_argument("--timing-cache", metavar="FILE", help="what TensorRT measured of kernels, read and written")


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Build, and say what the engine is."""
    check_free(options.folder)
    sizes = {name: _size(name, getattr(options, name)) for name in SIZES}
    export = import_export()
    silence_transformers()
    with screen.stage(f"Building an engine of {options.artifact}") as stage:
        folder = export.to_tensorrt(
            options.artifact,
            options.folder,
            package=options.package,
            cache_memory=options.cache_memory,
            targets=options.target,
            hardware_compatible=options.hardware_compatible,
            version_compatible=options.version_compatible,
            weight_streaming=options.weight_streaming,
            refittable=options.refittable,
            timing_cache=options.timing_cache,
            progress=lambda phase, share: stage.note(f"{phase}, {share:.0%}"),
            **sizes,
        )
    from cdsurgery.export.tensorrt.manifest import read_engine_manifest

    made = read_engine_manifest(folder)
    files = file_sizes(folder)
    profiles = {one.name: {axis: vars(size) for axis, size in one.axes.items()} for one in made.profiles}
    document = {"engine": str(folder), "package": made.package, "version": made.version, "profiles": profiles}
    shown = [f"{one.name}: {', '.join(f'{axis} {size}' for axis, size in one.axes.items())}" for one in made.profiles]
    screen.result(document | {"build_seconds": made.build_seconds, "files": files}, file_table(files), *shown)
    return True


def _size(name: str, text: str | None) -> Any:
    """ "8" or "1,8,32", as `to_tensorrt` takes it."""
    if text is None:
        return None
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3):
        raise InvalidInputError(f"--{name} is {text!r}; it must be a number such as 8, or three such as 1,8,32.")
    return numbers[0] if len(numbers) == 1 else numbers
