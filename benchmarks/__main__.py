"""`python -m benchmarks`: run the parts that were asked for, print their tables, and write them down."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.parts import fused, generation, memory, onnx, step, sweep, tensorrt, unembedding, wrapping
from benchmarks.report import Table, markdown, stacked, write
from benchmarks.setting import DTYPES, Setting
from benchmarks.shapes import SHAPES, has_experts

Part = Callable[[Setting, machine.Limits], Table]

PARTS: dict[str, Part] = {
    "step": step.decode_steps,
    "compiled": step.compiled_steps,
    "prefill": step.prefills,
    "generation": generation.generations,
    "onnx": onnx.decode_steps,
    "sweep": sweep.sweep,
    "memory": memory.peaks,
    "wrapping": wrapping.seconds,
    "unembedding": unembedding.products,
    "fused": fused.unembeddings,
    "tensorrt": tensorrt.decode_steps,
}
OWN_BATCHES = ("sweep", "wrapping", "tensorrt")  # parts that --batch does not change


def arguments() -> argparse.Namespace:
    """What the command takes."""
    usual = Setting()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)}; every one that runs here if none is named")
    parser.add_argument("--shape", choices=SHAPES, default=usual.shape, help="a model's shape (benchmarks/shapes.py)")
    parser.add_argument("--dtype", choices=DTYPES, default=usual.dtype)
    parser.add_argument("--lookback", type=int, default=usual.lookback, metavar="K")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[usual.batch],
        help="rows of a step, a prompt, or a product; with several numbers each in turn",
    )
    parser.add_argument("--context", type=int, default=usual.context, help="tokens in the cache, or of the prompt")
    parser.add_argument(
        "--rate", type=float, default=usual.rate, help="share of rows that move by a layer (the paper's)"
    )
    parser.add_argument("--new", type=int, default=usual.new, help="tokens of a generated text")
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="how often each way is timed")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write PART.md and PART.json there")
    return parser.parse_args()


def without_place(given: list[str]) -> list[str]:
    """The arguments that say what was measured: all but --output and its folder."""
    place = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    place.add_argument("--output")
    return place.parse_known_args(given)[1]


def measured(part: Part, setting: Setting, batches: list[int], limits: machine.Limits) -> Table:
    """What a part finds with each batch; of several, those that a GPU's memory does not hold are said not to fit."""
    if len(batches) == 1:
        return part(replace(setting, batch=batches[0]), limits)
    tables: dict[int, Table | None] = {}
    for batch in batches:
        try:
            tables[batch] = part(replace(setting, batch=batch), limits)
        except torch.OutOfMemoryError:
            tables[batch] = None
    return stacked(tables)


def refusal(name: str, dtype: str) -> str | None:
    """Why a part does not run here, or None."""
    if name == "tensorrt" and not machine.GPU:
        return "The speed of an engine is a GPU's, and PyTorch sees none here."
    if name == "onnx" and dtype == "bfloat16" and not machine.GPU:
        return "ONNX Runtime's CPU has no bfloat16. Measure onnx in float32."
    return None


def main() -> None:
    """Measure and show."""
    options = arguments()
    if unknown := [name for name in options.part if name not in PARTS]:
        sys.exit(f"No such part: {', '.join(unknown)}. There are {', '.join(PARTS)}.")
    if refused := [why for name in options.part if (why := refusal(name, options.dtype)) is not None]:
        sys.exit(refused[0])
    if options.rounds < 2:
        sys.exit(f"--rounds is {options.rounds}; it must be at least 2, to have quartiles.")
    if machine.GPU and options.dtype != "bfloat16" and has_experts(options.shape):
        sys.exit(f"On a GPU, PyTorch runs experts without looking only in bfloat16, and not in {options.dtype}.")
    given = {field.name: getattr(options, field.name) for field in fields(Setting)}
    setting = Setting(**given | {"batch": options.batch[0]})
    limits = machine.limits(setting.torch_dtype)
    about = machine.description(limits, setting.dtype)
    about["command"] = shlex.join(["python", "-m", "benchmarks", *without_place(sys.argv[1:])])
    for name in options.part or [name for name in PARTS if refusal(name, options.dtype) is None]:
        print(f"measuring {name} ..", file=sys.stderr, flush=True)
        table = measured(PARTS[name], setting, options.batch[: 1 if name in OWN_BATCHES else None], limits)
        print(markdown(name, table, about))
        if options.output is not None:
            write(options.output, name, table, about)


if __name__ == "__main__":
    main()
