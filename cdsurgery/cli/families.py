"""Every family of causal LMs in transformers -> a table: proven or refused, with tail, layers and the reason."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from cdsurgery.cli.model import silence_transformers
from cdsurgery.cli.screen import Screen

if TYPE_CHECKING:
    from rich.table import Table

    from cdsurgery.families import Family

SUMMARY = "show which families of models can be wrapped, by wrapping a tiny one of each"
DESCRIPTION = """\
Build a tiny random model of every family of causal LMs that the installed transformers knows, wrap it, and print what
was proven, or why it was refused. About a minute for all of them."""
EXAMPLE = "cdsurgery families llama gemma3n rwkv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("family", metavar="FAMILY", nargs="*", help="model types such as llama (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/families.md")


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Examine the families one by one."""
    with screen.stage("Wrapping a tiny model of each family") as stage:
        silence_transformers()
        import transformers

        from cdsurgery.families import FAMILIES, examine, markdown

        names, families = list(dict.fromkeys(options.family or FAMILIES)), []
        for count, name in enumerate(names):
            stage.note(f"{count}/{len(names)} {name}")
            families.append(examine(name))
    document = {
        "transformers": transformers.__version__,
        "families": [asdict(family) | {"verdict": family.verdict} for family in families],
    }
    screen.result(document, markdown(families) if options.markdown else _table(families))
    return True


def _table(families: list[Family]) -> Table:
    """One family after the other: its verdict, then its tail and layers where it has them, and what is to be said."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for family in families:
        found = [family.tail, family.layers, *family.note.split("; ")]
        table.add_row(family.model_type, family.verdict, "\n".join(filter(None, found)))
    return table
