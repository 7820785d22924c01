"""An artifact and the model it was made from -> whether they say the same, row by row."""

from __future__ import annotations

import argparse
from typing import Any

from cdsurgery.cli.model import import_export, load, wrap
from cdsurgery.cli.screen import Screen

SUMMARY = "compare an exported artifact with its model"
DESCRIPTION = """\
Run an artifact and the model it was made from on the same inputs and compare logits, entropies, selected layers and
generated tokens. The model is wrapped with the options that the artifact was made with. Exit code 1 if they differ by
more than the stated tolerances."""
EXAMPLE = "cdsurgery verify artifact --against examples/tiny_lm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("artifact", metavar="DIR", help="a folder made by `cdsurgery export`")
    parser.add_argument("--against", metavar="MODEL", required=True, help="the model it was made from")


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Wrap the model as the manifest says, compare, print the report."""
    with screen.stage(f"Reading {options.artifact}"):
        export = import_export()
        from cdsurgery.export.artifact.manifest import read_manifest

        made = read_manifest(options.artifact)
    model = wrap(_cast(load(options.against, screen), made.dtype), made.confident, screen)
    with screen.stage("Comparing"):
        report = export.verify(options.artifact, model)
    screen.result(report.to_dict(), str(report))
    return bool(report.passed)


def _cast(model: Any, dtype: str) -> Any:
    """The model as it was exported: it may have been cast since it was saved."""
    import torch

    return model.to(getattr(torch, dtype))
