"""MODEL -> its anatomy as surgery found and proved it."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from cdsurgery.cli.model import load, wrap
from cdsurgery.cli.screen import Screen
from cdsurgery.cli.wrapping import add_wrapping_arguments, wrapping_config

if TYPE_CHECKING:
    from rich.table import Table

    from cdsurgery.head import ConfidentHead

SUMMARY = "show what a model is made of and whether it can be wrapped"
DESCRIPTION = """\
Load a model, find its decoder layers, its final norm, its unembedding and whatever happens to the logits after it, and
prove on a probe that the model's logits can be reproduced from them bit for bit. A model that does not prove out is
refused with the reason."""
EXAMPLE = "cdsurgery inspect Qwen/Qwen3-0.6B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a folder that save_pretrained wrote, or a Hub id")
    add_wrapping_arguments(parser)


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Wrap the model, which proves it, and describe what was found."""
    config = wrapping_config(options)
    model = wrap(load(options.model, screen), config, screen)
    document = {"model": options.model} | anatomy_document(model)
    screen.result(document, _table(document))
    return True


def anatomy_document(model: ConfidentHead) -> dict[str, Any]:
    """The anatomy of a wrapped model as JSON takes it."""
    from cdsurgery.anatomy import layer_types

    plain: Any = model
    anatomy, confident = model.anatomy, model.confident
    head = model.get_submodule(anatomy.unembedding)
    weight = next(head.parameters())
    return {
        "model_type": plain.config.model_type,
        "class": type(model).__name__,
        "parameters": plain.num_parameters(),
        "dtype": str(plain.dtype).removeprefix("torch."),
        "layers": {
            "count": len(anatomy.layers),
            "paths": list(anatomy.layers),
            "types": layer_types(plain, anatomy),
        },
        "tail": [{"path": path, "class": type(model.get_submodule(path)).__name__} for path in anatomy.modules],
        "unembedding": {
            "path": anatomy.unembedding,
            "shape": list(weight.shape),
            "tied": weight is plain.get_input_embeddings().weight,
            "bias": getattr(head, "bias", None) is not None,
        },
        "transforms": [
            {
                "name": transform.name,
                "option": transform.option,
                "value": _printable(transform.value(plain)),
                "source": transform.source,
            }
            for transform in anatomy.transforms
        ],
        "confident": {
            "lookback": confident.lookback,
            "probability": confident.probability,
            "measure": confident.measure,
        },
        # wrap() refuses a model whose logits it cannot reproduce with torch.equal, so a wrapped model is a proven one.
        "proof": "bitwise",
    }


def _printable(value: Any) -> int | float | str:
    """The value of a transform as JSON takes it: a number as it is, a dtype or a part of the model by its name."""
    return value if isinstance(value, (int, float)) else str(value).partition("(")[0]


def _table(document: dict[str, Any]) -> Table:
    """The document as a newcomer reads it: one line a part."""
    from rich.table import Table

    layers, head, confident = document["layers"], document["unembedding"], document["confident"]
    first, last = layers["paths"][0], layers["paths"][-1]
    types = ", ".join(f"{count} {name}" for name, count in Counter(layers["types"]).items())
    vocabulary, hidden = head["shape"]
    deepest = layers["count"] - confident["lookback"]
    rows = [
        ("model", f"{document['model']} ({document['model_type']}, {document['class']})"),
        ("size", f"{document['parameters']:,} parameters, {document['dtype']}"),
        ("layers", f"{layers['count']}: {types}"),
        ("", f"{first} ... {last}"),
        ("tail", " -> ".join(f"{part['path']} ({part['class']})" for part in document["tail"])),
        (
            "unembedding",
            f"{head['path']}: vocabulary {vocabulary:,} x hidden {hidden:,}, "
            f"{'tied to the input embedding' if head['tied'] else 'weights of its own'}, "
            f"{'with bias' if head['bias'] else 'no bias'}",
        ),
    ]
    for transform in document["transforms"]:
        rows.append(("logits", f"{transform['name']}: {transform['option']} = {transform['value']}"))
        rows.append(("", transform["source"]))
    if not document["transforms"]:
        rows.append(("logits", "as the unembedding makes them, no transform"))
    rows += [
        ("lookback", f"{confident['lookback']}: layers {deepest} to {layers['count']} may speak"),
        ("rule", f"one layer back while {confident['measure']} falls, for {confident['probability']:.0%} of tokens"),
        ("proof", "held: the tail gives the model's own logits, bit for bit"),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    return table
