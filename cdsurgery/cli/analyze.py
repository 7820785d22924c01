"""MODEL and a text -> what selecting layers does to the model on that text, before anything is served."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Any

from cdsurgery.cli.model import add_device_argument, is_artifact, load, load_artifact, load_tokenizer, wrap
from cdsurgery.cli.screen import Screen, Stage, quoted
from cdsurgery.cli.text import pieces
from cdsurgery.cli.windows import DEFAULT_TOKENS, read_texts, text_windows, window_tokens
from cdsurgery.cli.wrapping import add_wrapping_arguments, given_flags, wrapping_config
from cdsurgery.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from torch import Tensor

    from cdsurgery.analysis import Analysis, Change, Prediction

SUMMARY = "show what selecting layers does to a text of yours"
DESCRIPTION = """\
Have a model read a text, and say what selecting layers does at every position: how often and how far it moves, how much
more certain that is, which tokens it changes, and whether it predicts the text better or worse than the final layer.
MODEL is a model, or a folder that `cdsurgery export` made with --positions all."""
EXAMPLE = "cdsurgery analyze examples/tiny_lm --text examples/tiny_lm/train.py"

UNITS = {"entropy": "nats", "log_p_squared": "nats squared"}
BAR = 32  # with the numbers beside it, a line of a narrow terminal
MOST_CHARACTERS = 20
TEXTS = ("final_text", "selected_text", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a Hub id or an exported artifact")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="texts in UTF-8 (default: standard input)")
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"tokens that the model reads at once (default {DEFAULT_TOKENS}, or its context if that is shorter); more "
        "give each position more context, and take memory for the logits of all candidates",
    )
    add_device_argument(parser)
    add_wrapping_arguments(parser)


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Read the texts window by window, print what was found."""
    if options.tokens is not None and options.tokens < 1:
        raise InvalidInputError(f"--tokens is {options.tokens}; it must be at least 1.")
    if options.probability == 0:
        raise InvalidInputError("--probability is 0, which is ordinary decoding: no layer is selected. Leave it out.")
    texts = read_texts(options.text)
    model, tokenizer, measure = _open(options, screen)
    tokens = window_tokens(options.tokens, model.config)
    windows = list(
        chain.from_iterable(text_windows(tokenizer, name, texts[name], model.config, tokens) for name in texts)
    )
    from cdsurgery.analysis import analyze

    with screen.stage("Reading the text") as stage:
        found = analyze(model, _counted(windows, stage))
    document = {
        "model": options.model,
        "runtime": getattr(model, "runtime", "torch"),
        "texts": list(texts),
        "windows": len(windows),
        "window_tokens": tokens,
        "measure": measure,
        **_document(found, tokenizer),
    }
    screen.result(document, *_shown(document, found))
    return True


def _open(options: argparse.Namespace, screen: Screen) -> tuple[Any, Any, str]:
    """What reads, its tokenizer, and what it goes by."""
    config = wrapping_config(options)
    if is_artifact(options.model):
        others = [f"--{name}" for name in ("seed", "device") if getattr(options, name) is not None]
        runner = load_artifact(options.model, given_flags(options) + others, screen)
        made = runner.manifest
        if made.options.positions != "all":
            raise InvalidInputError(
                f"{options.model} was made with positions='{made.options.positions}', and a text is read at every "
                "position. Export with --positions all, or give the model it was made from."
            )
        return runner, load_tokenizer(options.model), made.confident.measure
    model = load(options.model, screen, options.device)
    tokenizer = load_tokenizer(options.model)
    return wrap(model, config, screen), tokenizer, config.measure


def _counted(windows: list[Tensor], stage: Stage) -> Iterator[Tensor]:
    for count, window in enumerate(windows, start=1):
        stage.note(f"{count}/{len(windows)} windows")
        yield window


def _document(found: Analysis, tokenizer: Any) -> dict[str, Any]:
    """What was found, as JSON takes it."""
    return {
        "layers": found.layers,
        "lookback": len(found.depths) - 1,
        "positions": found.positions,
        "moved": found.moved,
        "changed": found.changed,
        "mean_depth": found.mean_depth,
        "mean_fall": found.mean_fall,
        "depths": found.depths,
        "shares": [count / found.positions for count in found.depths],
        "entropy": found.entropy,
        "final": _prediction(found.final),
        "selected": _prediction(found.selected),
        "changes": [_change(each, tokenizer) for each in found.changes],
    }


def _prediction(prediction: Prediction) -> dict[str, float]:
    return asdict(prediction) | {"perplexity": prediction.perplexity}


def _change(change: Change, tokenizer: Any) -> dict[str, Any]:
    """The change with the text of its tokens."""
    tokens = (change.final_token, change.selected_token, change.token)
    texts = [pieces(tokenizer, change.context[-1], [], [token])[0] for token in tokens]
    return {"context_text": tokenizer.decode(change.context), **dict(zip(TEXTS, texts, strict=True)), **asdict(change)}


def _shown(document: dict[str, Any], found: Analysis) -> Iterator[RenderableType]:
    """The same as tables and a few sentences."""
    measure = document["measure"]
    yield _layers(found, f"{measure} in {UNITS[measure]}")
    yield ""
    yield _predictions(found, f"{measure} in {UNITS[measure]}")
    if found.changes:
        yield ""
        yield _changes(document["changes"], measure)
    yield ""
    windows = "1 window" if document["windows"] == 1 else f"{document['windows']} windows"
    yield f"{found.positions} positions in {windows} of up to {document['window_tokens']} tokens."
    fall = f"; there, {measure} falls by {found.mean_fall:.3f} {UNITS[measure]} on average" if found.moved else ""
    yield f"{_count(found.moved, found)} move to an earlier layer, mean depth {found.mean_depth:.2f}{fall}."
    yield f"The most likely token changes at {_count(found.changed, found)}."
    yield _verdict(found.selected.nll - found.final.nll)


def _count(count: int, found: Analysis) -> str:
    return f"{count} ({count / found.positions:.1%})"


def _verdict(difference: float) -> str:
    if difference == 0:
        return "The selected layers predict this text as well as the final one."
    if math.isnan(difference):
        return "How well this text is predicted cannot be compared: some logits are not finite."
    worse = difference > 0
    return (
        f"The selected layers predict this text {'worse' if worse else 'better'} than the final one: "
        f"{abs(difference):.4f} nats a token {'more' if worse else 'less'}."
    )


def _layers(found: Analysis, measure: str) -> Table:
    table = _table("layer", "selected", "share", measure)
    table.add_column("")
    for depth, (count, entropy) in enumerate(zip(found.depths, found.entropy, strict=True)):
        bar = "#" * round(BAR * count / max(found.depths))
        share = f"{count / found.positions:.1%}"
        table.add_row(str(found.layers - depth), str(count), share, f"{entropy:.3f}", bar)
    return table


def _predictions(found: Analysis, measure: str) -> Table:
    table = _table("", measure, "nats a token", "perplexity", "next token right")
    for name, each in (("final layer", found.final), ("selected layer", found.selected)):
        numbers = f"{each.entropy:.3f}", f"{each.nll:.4f}", f"{each.perplexity:.2f}", f"{each.accuracy:.1%}"
        table.add_row(name, *numbers)
    return table


def _changes(changes: list[dict[str, Any]], measure: str) -> Table:
    table = _table("after", "final", "selected", "text", "layer", measure)
    for column in table.columns[1:4]:
        column.justify = "left"
    for each in changes:
        texts = (quoted(each[name][-MOST_CHARACTERS:]) for name in ("context_text", *TEXTS))
        entropies = f"{each['final_entropy']:.3f} -> {each['selected_entropy']:.3f}"
        table.add_row(*texts, str(each["selected_layer"]), entropies)
    return table


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right")
    return table
