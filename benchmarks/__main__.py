"""`python -m benchmarks`: run the parts that were asked for, print their tables, and write them down."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, onnx_step, torch_step, unembedding
from benchmarks.timing import Timing

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def parts(options: argparse.Namespace) -> dict[str, Callable[[], list[Timing]]]:
    """Name -> what measures it."""
    dtype, k = DTYPES[options.dtype], options.lookback
    return {
        "step": lambda: torch_step.decode_steps(
            options.shape, dtype, k, options.batch, options.context, options.rate, options.rounds
        ),
        "prefill": lambda: torch_step.prefills(options.shape, dtype, k, options.context, options.rate, options.rounds),
        "onnx": lambda: onnx_step.decode_steps(
            options.shape, k, options.batch, options.context, options.rate, options.rounds
        ),
        "unembedding": lambda: unembedding.products(151936, 1024, options.batch, options.rounds),
    }


def arguments() -> argparse.Namespace:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="*", help="step, prefill, onnx, unembedding; all of them if none is named")
    parser.add_argument("--shape", default="qwen3-0.6b", help="a model's shape (benchmarks/shapes.py)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--lookback", type=int, default=10, metavar="K")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step, or of a product")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache, or of the prompt")
    parser.add_argument("--rate", type=float, default=0.115, help="share of rows that move by a layer (the paper's)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, metavar="DIR", help="write NAME.md and NAME.json there")
    return parser.parse_args()


def main() -> None:
    """Measure and show."""
    options = arguments()
    known = parts(options)
    if unknown := [name for name in options.part if name not in known]:
        sys.exit(f"No such part: {', '.join(unknown)}. There are {', '.join(known)}.")
    about = machine.description() | {"command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])}
    for name in options.part or known:
        print(f"measuring {name} ..", file=sys.stderr, flush=True)
        timings = known[name]()
        page = table(name, timings, about)
        print(page)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            document: dict[str, Any] = {"about": about, "timings": [dataclasses.asdict(t) for t in timings]}
            (options.output / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
            (options.output / f"{name}.md").write_text(page)


def table(name: str, timings: list[Timing], about: dict[str, str]) -> str:
    """One part's figures as Markdown."""
    rows = [f"| {t.name} | {t.ratio:.3f} | {t.low:.3f} .. {t.high:.3f} | {t.milliseconds:.1f} |" for t in timings]
    notes = [f"- {key}: {value}" for key, value in about.items()]
    head = ["| way | ratio | quartiles | ms, here and now |", "|---|---|---|---|"]
    return "\n".join([f"# {name}", "", *head, *rows, "", *notes, ""])


if __name__ == "__main__":
    main()
