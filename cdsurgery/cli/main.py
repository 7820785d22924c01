"""Arguments -> one command, its exit code, and any error as one line.

Exit codes: 0 good, 1 a check failed, 2 bad usage or bad input. To add a command, write `cdsurgery/cli/NAME.py` with the
five members of `Command` and name it in `COMMANDS`; a name of two words, such as "export onnx", is `export_onnx.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import Protocol, cast

from cdsurgery.cli.screen import Screen
from cdsurgery.errors import SurgeryError
from cdsurgery.version import __version__

COMMANDS = (
    "demo",
    "inspect",
    "families",
    "generate",
    "export onnx",
    "export graft",
    "export tensorrt",
    "export triton",
    "verify",
    "analyze",
    "bench",
)
GROUPS = {"export": "write a model with its layer selection for another runtime"}

GOOD, CHECK_FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141

DESCRIPTION = """\
Run a language model's most confident near-final layer.

After every token, a language model's last layers each have an opinion on the next one. cdsurgery lets the most
confident of them speak: it looks back from the final layer while the entropy falls, in any decoder-only model of
transformers, in PyTorch and in ONNX Runtime."""


class Command(Protocol):
    """What a module of this folder offers to be a command. Heavy imports belong into `run`: help must be fast."""

    SUMMARY: str
    DESCRIPTION: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare what the command takes."""

    def run(self, options: argparse.Namespace, screen: Screen) -> bool:
        """Do it; return whether every check passed. Bad input is raised as a `SurgeryError`."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    options = parser.parse_args(arguments)
    screen = Screen(as_json=options.json)
    try:
        code = GOOD if cast(Command, options.command).run(options, screen) else CHECK_FAILED
        sys.stdout.flush()
        return code
    except SurgeryError as error:
        screen.error(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing fails when Python ends
        return UNREAD


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; imports their modules, which import nothing heavy."""
    commands = {name: cast(Command, import_module(f"cdsurgery.cli.{name.replace(' ', '_')}")) for name in COMMANDS}
    parser = argparse.ArgumentParser(
        prog="cdsurgery",
        description=DESCRIPTION,
        epilog="\n".join(["examples:", *(f"  {command.EXAMPLE}" for command in commands.values())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cdsurgery {__version__}")
    places = {"": parser.add_subparsers(title="commands", metavar="COMMAND", required=True)}
    for name, command in commands.items():
        group, _, leaf = name.rpartition(" ")
        if group not in places:
            group_parser = places[""].add_parser(
                group, help=GROUPS[group], description=f"{GROUPS[group].capitalize()}."
            )
            places[group] = group_parser.add_subparsers(title="formats", metavar="FORMAT", required=True)
        leaf_parser = places[group].add_parser(
            leaf,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(leaf_parser)
        leaf_parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
        leaf_parser.set_defaults(command=command)
    return parser
