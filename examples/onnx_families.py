"""Export a tiny random model of each family to ONNX and print what `to_onnx` measured of it, as a Markdown table.

    python examples/onnx_families.py                                   # every family of docs/onnx.md, float32
    python examples/onnx_families.py --dtype float16
    python examples/onnx_families.py qwen3_5_text --layers 40 --target cpu

Differences from PyTorch are in parts of the row's largest logit. PyTorch's own, from the same model in a wider dtype,
are measured where a difference is above the tolerance (1e-5 in float32, 1e-2 in float16).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch

import cdsurgery
from cdsurgery import export
from cdsurgery.zoo import tiny_config, tiny_model

# fmt: off
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "gemma2", "gemma3_text", "gemma4_text",
            "phi3", "cohere2", "granite", "olmo2", "deepseek_v3", "smollm3", "gpt2", "opt",
            "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")
# fmt: on
COLUMNS = (
    "family",
    "layers",
    "nodes",
    "seconds",
    "final logits",
    "PyTorch's own",
    "entropies",
    "rows moved",
    "unclear",
)


def row(family: str, layers: int | None, dtype: torch.dtype, target: str, folder: Path) -> list[str]:
    """Export one model and read what its manifest says."""
    depth: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    if layers is not None and (kinds := getattr(tiny_config(family), "layer_types", None)):
        depth["layer_types"] = [kinds[index % len(kinds)] for index in range(layers)]
    model = cdsurgery.wrap(tiny_model(family, dtype, **depth), lookback=2)
    start = time.perf_counter()
    export.to_onnx(model, folder, target=target)
    seconds = time.perf_counter() - start
    parity = json.loads((folder / "cdsurgery.json").read_text())["parity"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    noise = f"{parity['noise']['final_logits']:.1e}" if parity["noise"] else "not needed"
    return [
        family,
        str(len(model.anatomy.layers)),
        str(nodes(graph)),
        f"{seconds:.0f}",
        f"{parity['final_logits']:.1e}",
        noise,
        f"{parity['entropy']:.1e}",
        f"{parity['moved'] / parity['rows']:.0%}",
        f"{parity['excluded'] + parity['rerouted']} of {parity['rows']}",
    ]


def nodes(graph: onnx.GraphProto) -> int:
    """How many operators the graph and the bodies inside it have."""
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return len(graph.node) + sum(map(nodes, bodies))


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--target", choices=("portable", "cpu"), default="portable")
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        for family in options.families:
            print(f"exporting {family}", file=sys.stderr)
            dtype = getattr(torch, options.dtype)
            cells = row(family, options.layers, dtype, options.target, Path(place) / family)
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
