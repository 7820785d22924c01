"""Build an engine of a tiny random model of each family, in each precision, and print a Markdown table.

    python examples/tensorrt_families.py                            # every family of docs/onnx.md
    python examples/tensorrt_families.py qwen3_5_text --dtype float16
    python examples/tensorrt_families.py --into docs/tensorrt.md    # replace the table there (make tensorrt-families)

A cell says how large the engine is and how long the build took, or what stopped it, in TensorRT's words. Where there
is a GPU the engine is run against the model too (`export.verify`); a dash says that there was none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from onnx_families import FAMILIES

import cdsurgery
from cdsurgery import export
from cdsurgery.export.tensorrt.manifest import read_engine_manifest
from cdsurgery.export.tensorrt.package import import_tensorrt
from cdsurgery.zoo import tiny_model

DTYPES = ("float32", "float16", "bfloat16")
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def cell(family: str, dtype: str, folder: Path, package: str | None) -> tuple[str, str]:
    """What came of one family in one precision: the build, and the run."""
    model = cdsurgery.wrap(tiny_model(family, getattr(torch, dtype)), lookback=2)
    # What TensorRT makes of a graph is asked here. Its parity with PyTorch is what examples/onnx_families.py measures,
    # and bfloat16 has no kernels on the CPU.
    export.to_onnx(model, folder / "artifact", parity=False)
    try:
        export.to_tensorrt(folder / "artifact", folder / "engine", package=package)
    except cdsurgery.ArtifactError as error:
        stage = "does not parse" if " cannot read " in str(error).splitlines()[0] else "does not build"
        return f"{stage}: {_cell(error)}", "-"
    made = read_engine_manifest(folder / "engine")
    built = f"{made.engine['size'] / 1e6:.1f} MB, {made.build_seconds:.0f} s"
    if not torch.cuda.is_available():
        return built, "-"
    try:
        report = export.verify(folder / "engine", model.to("cuda"))
    except cdsurgery.SurgeryError as error:  # an engine for other GPUs than this one, for example
        return built, _cell(error)
    return built, f"{'passed' if report.passed else 'FAILED'}, {report.final_logits:.1e}"


def _cell(error: Exception) -> str:
    """Its last line, which is TensorRT's own where TensorRT said something."""
    return str(error).splitlines()[-1].strip().replace("|", " ")


def rows(families: list[str], dtypes: list[str], package: str | None) -> list[str]:
    """The table's lines, each also printed as soon as it is known."""
    heads = [name for dtype in dtypes for name in (f"builds {dtype}", "runs")]
    lines = [f"| family | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    print("\n".join(lines), flush=True)
    for family in families:
        cells = []
        for dtype in dtypes:
            print(f"building {family} in {dtype}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as place:
                cells += cell(family, dtype, Path(place), package)
        lines.append(f"| {family} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the table; with --into, also put it into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--package", choices=("tensorrt", "tensorrt_rtx"))
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    trt = import_tensorrt(options.package)
    lines = rows(options.families, options.dtype or list(DTYPES), options.package)
    if options.into is not None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        made = f"{trt.__name__} {trt.__version__}, torch {torch.__version__}, {gpu}."
        before, rest = options.into.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        table = "\n".join([BEGIN, "", made, "", *lines, "", END])
        options.into.write_text(f"{before}{table}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
