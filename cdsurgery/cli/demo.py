"""A small model -> the same prompts decoded three ways: final layer, most confident layer, and that in ONNX Runtime.

1. Load the model; decode the prompts as it is.
2. Wrap it; decode them again.
3. Export it to ONNX; decode them in ONNX Runtime.
4. Show the texts side by side, what changed, and whether the two runtimes agree.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from cdsurgery.cli.comparison import Comparison, Summary, comparison_document, comparison_text
from cdsurgery.cli.export_onnx import check_free
from cdsurgery.cli.model import import_export, load, load_tokenizer, wrap
from cdsurgery.cli.screen import Screen, TokenCounter
from cdsurgery.cli.text import encode, pieces
from cdsurgery.cli.wrapping import add_wrapping_arguments, wrapping_config
from cdsurgery.errors import InvalidInputError

SUMMARY = "see it work on a small model, in PyTorch and in ONNX Runtime"
DESCRIPTION = """\
Decode a few prompts from the final layer and from the most confident of the last layers, export the model to ONNX,
decode them again in ONNX Runtime, and show both texts side by side with the tokens that changed. Exit code 1 if the two
runtimes disagree on a token."""
EXAMPLE = "cdsurgery demo"

# Python, because that is what the repository's own model knows.
PROMPTS = ("def ", "def read(", "for name in ")
NEW_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--model", metavar="MODEL", help="another model than the repository's own examples/tiny_lm")
    parser.add_argument("--keep", metavar="DIR", help="keep the ONNX artifact in this new folder")
    add_wrapping_arguments(parser)


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Decode three ways and compare."""
    if options.keep is not None:
        check_free(options.keep)
    source = options.model or small_model()
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.keep or Path(folder) / "artifact"
        comparisons, layers, lookback = compare(source, artifact, options, screen)
    summary = Summary(comparisons)
    screen.result(
        {
            "model": source,
            "artifact": options.keep,
            "layers": layers,
            "lookback": lookback,
            "prompts": [comparison_document(each) for each in comparisons],
            **summary.document(),
        },
        *chain.from_iterable(comparison_text(each, screen.out) for each in comparisons),
        f"{layers} layers, lookback {lookback}: layers {layers - lookback} to {layers} may speak.",
        *summary.text(),
    )
    return summary.passed


def small_model() -> str:
    """The folder of the repository's own model.

    Raises:
        InvalidInputError: this is not a checkout, or the model is not in it.
    """
    import cdsurgery

    folder = Path(cdsurgery.__file__).resolve().parents[1] / "examples" / "tiny_lm"
    if not (folder / "config.json").is_file():
        raise InvalidInputError(
            f"The demo's small model is not at {folder}: it comes with the repository, not with the package. Run "
            "`make demo` in a checkout, or the demo on a model of yours with --model MODEL."
        )
    return str(folder)


def compare(
    source: str, artifact: str | Path, options: argparse.Namespace, screen: Screen
) -> tuple[list[Comparison], int, int]:
    """Decode every prompt three ways; also return L and the lookback in force."""
    with screen.stage("Starting PyTorch"):
        config = wrapping_config(options)
    model: Any = load(source, screen)
    tokenizer = load_tokenizer(source)
    inputs = [encode(tokenizer, prompt, model.config, NEW_TOKENS) for prompt in PROMPTS]

    with screen.stage("Decoding from the final layer") as stage:
        plain = [model.generate(**each, **_greedy(stage))[0, each["input_ids"].shape[1] :].tolist() for each in inputs]

    wrapped = wrap(model, config, screen)
    with screen.stage("Decoding from the most confident layer") as stage:
        from cdsurgery.trace import trace_generation

        confident = [trace_generation(wrapped, each, **_greedy(stage)) for each in inputs]

    with screen.stage("Exporting to ONNX and verifying"):
        export = import_export()
        export.to_onnx(wrapped, artifact, tokenizer=tokenizer)
        runner = export.load(artifact)
    with screen.stage("Decoding in ONNX Runtime") as stage:
        onnx = [trace_generation(runner, each, **_greedy(stage)) for each in inputs]

    def text(each: dict[str, Any], said: list[int], ids: list[int]) -> tuple[str, ...]:
        return pieces(tokenizer, int(each["input_ids"][0, -1]), said, ids)

    comparisons = [
        Comparison(
            prompt=prompt,
            plain="".join(text(each, final, final)),
            confident=trace,
            onnx=onnx_trace,
            said=text(each, trace.ids, trace.ids),
            unsaid=text(each, trace.ids, [token.final_token for token in trace.tokens]),
        )
        for prompt, each, final, trace, onnx_trace in zip(PROMPTS, inputs, plain, confident, onnx, strict=True)
    ]
    return comparisons, len(wrapped.anatomy.layers), int(wrapped.confident.lookback)


def _greedy(stage: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, "streamer": TokenCounter(stage, NEW_TOKENS)}
