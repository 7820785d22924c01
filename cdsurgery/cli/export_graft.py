"""An ONNX decoder that somebody else exported -> an artifact with the layer selection in it."""

from __future__ import annotations

import argparse

from cdsurgery.cli.export_onnx import check_free, file_sizes, file_table, say_not_for
from cdsurgery.cli.model import import_export, silence_transformers
from cdsurgery.cli.screen import Screen
from cdsurgery.cli.wrapping import NAMES, add_wrapping_arguments, wrapping_config

SUMMARY = "from an ONNX decoder that exists already"
DESCRIPTION = """\
Take a decoder that optimum, onnxruntime-genai's model builder (int4 included) or transformers exported, find its
residual stream, final norm and head, and add the layer selection beside them. No PyTorch weights are needed. Before the
folder appears, both graphs have run on the same inputs: the final logits are those of the file, bit for bit. What
cannot be proven is refused."""
EXAMPLE = "cdsurgery export graft their/model.onnx artifact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "model", metavar="FILE", help="the ONNX file; its config.json or genai_config.json lies beside it"
    )
    parser.add_argument("folder", metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--positions",
        choices=("last", "all"),
        default="last",
        help="logits for the last token only, as decoding needs (default), or for every new token",
    )
    add_wrapping_arguments(parser)


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Graft, and say what was proven."""
    check_free(options.folder)
    config = wrapping_config(options)
    with screen.stage(f"Grafting {options.model}: finding its parts, joining the head, running old and new"):
        export = import_export()
        silence_transformers()
        wrapping = {name: getattr(config, name) for name in NAMES}
        folder = export.graft(options.model, options.folder, positions=options.positions, **wrapping)
        from cdsurgery.export.artifact.manifest import read_manifest

        made = read_manifest(folder)
    sizes = file_sizes(folder)
    lookback, proof = made.confident.lookback, made.parity
    assert proof is not None
    document = {"artifact": str(folder), "positions": made.options.positions, "layers": made.layers}
    screen.result(
        document | {"lookback": lookback, "proof": proof, "files": sizes, "not_for": made.not_for},
        file_table(sizes),
        f"{made.layers} layers found, lookback {lookback}. Final logits are the file's own, bit for bit, in "
        f"{proof['steps_bitwise']} of {proof['steps']} steps; largest difference {proof['final_logits']:.1e} relative.",
    )
    say_not_for(made.not_for, screen)
    return True
