"""MODEL -> what selecting layers costs on this machine: texts of the plain and the wrapped model, written in turns."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cdsurgery.cli.model import add_device_argument, load, load_tokenizer, wrap
from cdsurgery.cli.screen import Screen
from cdsurgery.cli.text import encode
from cdsurgery.cli.wrapping import add_wrapping_arguments, wrapping_config
from cdsurgery.errors import InvalidInputError, SurgeryError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor

    from cdsurgery.config import ConfidentConfig

SUMMARY = "measure what selecting layers costs on this machine"
DESCRIPTION = """\
Have the model write texts as it is and with each way to scan its layers, in turns, and divide the times that it takes.
All texts are greedy and as long as asked for. A scan costs the more the more tokens move to another layer, which the
weights and the prompt decide: take those that matter."""
EXAMPLE = "cdsurgery bench examples/tiny_lm --batch 4"

PLAIN, SCANS = "plain", ("fused", "lazy", "full")
PROMPT = (
    "The library is open every day except Monday. Visitors can borrow up to five books at a time and keep them for "
    "three weeks. If somebody else is waiting for a book, it has to be returned when the three weeks are over;"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a folder that save_pretrained wrote, or a Hub id")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="their beginning (default: three sentences)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="tokens of a text (default 32)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="texts written together (default 1)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each way is timed (default 5)")
    add_device_argument(parser)
    add_wrapping_arguments(parser)


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Write texts in each way in turn, print how long that takes beside the plain model."""
    for name, least in {"max_new_tokens": 1, "batch": 1, "rounds": 2}.items():
        if (value := getattr(options, name)) < least:
            raise InvalidInputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
    config = wrapping_config(options)
    model: Any = load(options.model, screen, options.device)
    prompt = encode(load_tokenizer(options.model), options.prompt, model.config, options.max_new_tokens)["input_ids"]
    document = {"model": options.model} | _measured(model, prompt.to(model.device), config, options, screen)
    screen.result(document, *_shown(document))
    return True


def _measured(
    model: Any, prompt: Tensor, config: ConfidentConfig, options: argparse.Namespace, screen: Screen
) -> dict[str, Any]:
    """What was found, as JSON takes it."""
    import torch
    from transformers import GenerationConfig

    from cdsurgery.timing import interleaved
    from cdsurgery.trace import trace_generation

    # Nothing ends before it is as long as was asked for, and all is as plain in one way as in the other.
    model.generation_config = GenerationConfig(pad_token_id=0)
    writing = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    texts = turned(prompt, options.batch)
    selecting = wrap(model, config, screen)
    config = selecting.confident
    with screen.stage("Writing texts in turns") as stage:
        traced = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        trace = trace_generation(model, traced, **writing)
        refused = _refused(model, config)
        ways = [PLAIN, *(scan for scan in SCANS if scan not in refused)]
        turns, of = itertools.count(1), (options.rounds + 1) * len(ways)

        def before(way: str) -> None:
            stage.note(f"{next(turns)}/{of}")
            _become(model, way, config)

        def write() -> None:
            model.generate(texts, attention_mask=torch.ones_like(texts), **writing)

        timings = interleaved(dict.fromkeys(ways, write), options.rounds, before)
    tokens = options.batch * options.max_new_tokens
    return {
        "batch": options.batch,
        "prompt_tokens": prompt.shape[1],
        "new_tokens": options.max_new_tokens,
        "rounds": options.rounds,
        "layers": len(selecting.anatomy.layers),
        "lookback": config.lookback,
        "moved": trace.moved,
        "mean_depth": trace.mean_depth,
        "ways": [asdict(timing) | {"tokens_per_second": 1e3 * tokens / timing.milliseconds} for timing in timings],
        "refused": refused,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def turned(prompt: Tensor, batch: int) -> Tensor:
    """`[1, S]` -> `[B, S]`: all but the first token go round by one more in each row, so that texts are others."""
    import torch

    return torch.cat([torch.cat([prompt[:, :1], prompt[:, 1:].roll(-row, dims=1)], dim=1) for row in range(batch)])


def _become(model: Any, way: str, config: ConfidentConfig) -> None:
    """Make the model one that decodes in this way, in place."""
    import cdsurgery

    if isinstance(model, cdsurgery.ConfidentHead):
        cdsurgery.unwrap(model)
    if way != PLAIN:
        cdsurgery.wrap(model, **asdict(replace(config, scan=way)))


def _refused(model: Any, config: ConfidentConfig) -> dict[str, str]:
    """Which scans the model does not allow, and why."""
    reasons = {}
    for scan in SCANS:
        try:
            _become(model, scan, config)
        except SurgeryError as error:
            reasons[scan] = str(error)
    return reasons


def _shown(found: dict[str, Any]) -> Iterator[RenderableType]:
    """The same as a table and a few sentences."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("way")
    for title in ("time", "quartiles", "tokens a second"):
        table.add_column(title, justify="right")
    for way in found["ways"]:
        quartiles = "" if way["name"] == PLAIN else f"{way['low']:.2f} to {way['high']:.2f}"
        table.add_row(way["name"], f"{way['ratio']:.2f}", quartiles, f"{way['tokens_per_second']:.1f}")
    yield table
    texts = "1 text" if found["batch"] == 1 else f"{found['batch']} texts together"
    yield ""
    yield (
        f"The plain model's time is 1. {texts} of {found['new_tokens']} tokens after {found['prompt_tokens']}, "
        f"{found['rounds']} rounds; {found['device']}, {found['threads']} threads, {found['dtype']}, "
        f"torch {found['torch']}."
    )
    yield (
        f"Lookback {found['lookback']} of {found['layers']} layers: {found['moved']} of the first text's "
        f"{found['new_tokens']} tokens moved to an earlier layer, mean depth {found['mean_depth']:.2f}."
    )
    for scan, reason in found["refused"].items():
        yield f"{scan} was left out: {reason}"
