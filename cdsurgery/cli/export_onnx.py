"""MODEL -> an ONNX artifact: a folder that decodes from the selected layer without PyTorch."""

from __future__ import annotations

import argparse
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
        choices=("last", "all"),
        default="last",
        help="logits for the last token only, as decoding needs (default), or for all, as scoring does",
    )
    add_wrapping_arguments(parser)


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Load, wrap, export."""
    check_free(options.folder)
    config = wrapping_config(options)
    model = load(options.model, screen)
    tokenizer = load_tokenizer(options.model)
    wrapped = wrap(model, config, screen)
    with screen.stage("Exporting to ONNX"):
        folder = import_export().to_onnx(wrapped, options.folder, tokenizer=tokenizer, positions=options.positions)
    sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
    screen.result({"artifact": str(folder), "positions": options.positions, "files": sizes}, file_table(sizes))
    screen.err.print(f"Check it: cdsurgery verify {options.folder} --against {options.model}", style="dim")
    return True


def check_free(folder: str) -> None:
    """Refuse a folder that exists before a large model is loaded for it, though the export would refuse it too."""
    if Path(folder).exists():
        raise InvalidInputError(f"{folder} exists already. Give a folder that does not exist; nothing is overwritten.")


def file_table(sizes: dict[str, int]) -> Table:
    """The files of an artifact with their sizes in bytes."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column()
    for name, size in sizes.items():
        table.add_row(f"{size:,} bytes", name)
    return table
