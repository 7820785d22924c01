"""MODEL -> an ONNX artifact: a folder that decodes from the selected layer without PyTorch."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cdsurgery.cli.model import import_export, load, load_tokenizer, wrap
from cdsurgery.cli.screen import Screen
from cdsurgery.cli.wrapping import add_wrapping_arguments, wrapping_config
from cdsurgery.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "to one ONNX graph for prefill and decode"
DESCRIPTION = """\
Write a folder with one ONNX graph for prefill and decode, which selects layers as the wrapped model does. Any client of
ONNX decoders reads its logits: ONNX Runtime, onnxruntime-genai, optimum. The folder must not exist yet; it appears
whole or not at all."""
EXAMPLE = "cdsurgery export onnx examples/tiny_lm artifact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a folder that save_pretrained wrote, or a Hub id")
    parser.add_argument("folder", metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--positions",
        choices=("last", "all", "score"),
        default="last",
        help="logits for the last token only, as decoding needs (default), or for all; or log-probabilities of given "
        "tokens, which takes the least memory",
    )
    parser.add_argument(
        "--target",
        choices=("portable", "cpu", "cuda"),
        default="portable",
        help="standard operators (default), or the faster ones of a provider of ONNX Runtime",
    )
    parser.add_argument(
        "--upcast", action="store_true", help="keep half-precision weights as they are and compute in float32"
    )
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="project layers before the last two for rows that get that far alone: for runtimes that take tensors of "
        "any number of rows, as ONNX Runtime does",
    )
    parser.add_argument(
        "--no-parity",
        action="store_true",
        help="do not run the artifact against the model: for graphs that cannot run on this machine",
    )
    parser.add_argument(
        "--quantize",
        choices=("int4", "int8"),
        help="round the matrices to 4 bits, or to 8 bits and the activations with them (default: leave them)",
    )
    parser.add_argument(
        "--keep-head", action="store_true", help="leave the unembedding, and a tied embedding, out of --quantize"
    )
    add_wrapping_arguments(parser)


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Load, wrap, export."""
    check_free(options.folder)
    if options.keep_head and options.quantize is None:
        raise InvalidInputError("--keep-head says what not to quantise; it needs --quantize int4 or --quantize int8.")
    config = wrapping_config(options)
    export = import_export()  # before what takes long, as it may not be installed
    model = load(options.model, screen)
    tokenizer = load_tokenizer(options.model)
    wrapped = wrap(model, config, screen)
    with screen.stage("Exporting to ONNX"):
        folder = export.to_onnx(
            wrapped,
            options.folder,
            tokenizer=tokenizer,
            positions=options.positions,
            target=options.target,
            upcast=options.upcast,
            scan="lazy" if options.lazy else "static",
            parity=not options.no_parity,
            quantization=options.quantize,
            quantize_head=not options.keep_head,
        )
    sizes = file_sizes(folder)
    from cdsurgery.export.artifact.manifest import read_manifest

    not_for = read_manifest(folder).not_for
    document = {"artifact": str(folder), "positions": options.positions, "files": sizes, "not_for": not_for}
    screen.result(document, file_table(sizes))
    say_not_for(not_for, screen)
    if not options.no_parity:  # where it cannot run, it cannot be checked
        check = shlex.join(["cdsurgery", "verify", options.folder, "--against", options.model])
        screen.err.print(f"Check it: {check}", style="dim", markup=False)
    return True


def check_free(folder: str) -> None:
    """Refuse a folder that exists before a large model is loaded for it, though the export would refuse it too."""
    if Path(folder).exists():
        raise InvalidInputError(f"{folder} exists already. Give a folder that does not exist; nothing is overwritten.")


def say_not_for(not_for: dict[str, str], screen: Screen) -> None:
    """Print which clients cannot run an artifact, and why."""
    for client, reason in not_for.items():
        screen.err.print(f"Not for {client}: {reason}", markup=False)


def file_sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file of an artifact, those in folders of it included, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def file_table(sizes: dict[str, int]) -> Table:
    """The files of an artifact with their sizes in bytes."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column()
    for name, size in sizes.items():
        table.add_row(f"{size:,} bytes", name)
    return table
