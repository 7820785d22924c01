"""MODEL and a prompt -> text, from the most confident near-final layer."""

from __future__ import annotations

import argparse
import math
import time
from typing import TYPE_CHECKING, Any

from cdsurgery.cli.model import add_device_argument, is_artifact, load, load_artifact, load_tokenizer, wrap
from cdsurgery.cli.screen import Screen, TokenCounter, visible
from cdsurgery.cli.text import check_prompt, decode, encode
from cdsurgery.cli.wrapping import add_wrapping_arguments, given_flags, wrapping_config
from cdsurgery.errors import InvalidInputError, SurgeryError

if TYPE_CHECKING:
    from cdsurgery.trace import Trace

SUMMARY = "continue a text"
DESCRIPTION = """\
Continue a text, each token chosen by the most confident of the last layers. MODEL is a model, which runs in PyTorch, or
a folder that `cdsurgery export` made, which runs in ONNX Runtime or TensorRT. Greedy unless --sample is given."""
EXAMPLE = 'cdsurgery generate examples/tiny_lm "def " --max-new-tokens 48'
LEAST_TEMPERATURE = 1e-6  # logits divided by less may be infinite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a Hub id, an exported artifact or an engine")
    parser.add_argument("prompt", metavar="PROMPT", help="the beginning of the text")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="stop after N tokens (default 64)")
    parser.add_argument("--plain", action="store_true", help="ordinary decoding from the final layer, to compare")
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    group.add_argument("--temperature", type=float, metavar="T", help="with --sample: below 1 safer, above 1 wilder")
    group.add_argument("--top-p", type=float, metavar="P", help="with --sample: draw from the likeliest P of the mass")
    add_device_argument(parser)
    add_wrapping_arguments(parser)


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Generate, print the text on stdout and what happened on stderr."""
    from cdsurgery.wrap import layers_of

    check_prompt(options.prompt)
    generation = _generation_options(options)
    model, tokenizer = _open(options, screen)
    encoded = encode(tokenizer, options.prompt, model.config, options.max_new_tokens)
    inputs = {name: tensor.to(model.device) for name, tensor in encoded.items()}
    started = time.perf_counter()
    with screen.stage("Generating") as stage:
        generation["streamer"] = TokenCounter(stage, options.max_new_tokens)
        ids, trace = _generate(model, inputs, generation, options.plain)
    seconds = time.perf_counter() - started
    text = decode(tokenizer, ids)
    screen.result(
        {
            "model": options.model,
            "runtime": getattr(model, "runtime", "torch"),
            "prompt": options.prompt,
            "text": text,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "tokens": ids,
            "layers": None if options.plain else layers_of(model),
            "selected_layers": [token.selected_layer for token in trace.tokens] if trace else None,
        },
        visible(options.prompt + text),
    )
    screen.err.print(f"{len(ids)} tokens, {len(ids) / seconds:.1f} a second{_moved(trace)}", style="dim")
    return True


def _generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `generate` of transformers takes, checked here because its own checks come late and as warnings."""
    if options.max_new_tokens < 1:
        raise InvalidInputError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1.")
    if options.temperature is not None and not LEAST_TEMPERATURE <= options.temperature < math.inf:
        raise InvalidInputError(
            f"--temperature is {options.temperature}; it must be a number of at least {LEAST_TEMPERATURE:g}. For the "
            "likeliest token every time, leave --sample out."
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise InvalidInputError(f"--top-p is {options.top_p}; it must be in (0, 1].")
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p")}
    given = {name: value for name, value in sampling.items() if value is not None}
    if given and not options.sample:
        raise InvalidInputError("--temperature and --top-p change how tokens are drawn; add --sample to draw them.")
    # One text, token by token, whatever the model's own generation_config.json asks for.
    one = {"num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None}
    return {"max_new_tokens": options.max_new_tokens, "do_sample": options.sample} | one | given


def _open(options: argparse.Namespace, screen: Screen) -> tuple[Any, Any]:
    """What generates, and its tokenizer."""
    config, fixed = wrapping_config(options), given_flags(options)
    if is_artifact(options.model):
        others = ["--plain"] * options.plain + ["--device"] * (options.device is not None)
        runner = load_artifact(options.model, fixed + others, screen)
        _seed(options.seed)
        return runner, load_tokenizer(options.model)
    if options.plain and fixed:
        raise InvalidInputError(f"--plain decodes from the final layer only; leave out {', '.join(fixed)}.")
    model: Any = load(options.model, screen, options.device)
    tokenizer = load_tokenizer(options.model)
    _seed(options.seed)
    return model if options.plain else wrap(model, config, screen), tokenizer


def _seed(seed: int | None) -> None:
    """Make sampling repeatable; the draws of --probability take the same number through `wrap`."""
    if seed is not None:
        import torch

        torch.manual_seed(seed)


def _generate(
    model: Any, inputs: dict[str, Any], generation: dict[str, Any], plain: bool
) -> tuple[list[int], Trace | None]:
    """The new token ids, and which layer chose each where the model is wrapped."""
    from cdsurgery.trace import trace_generation

    try:
        if plain:
            sequence = model.generate(**inputs, **generation, return_dict_in_generate=False)[0]
            return sequence[inputs["input_ids"].shape[1] :].tolist(), None
        trace = trace_generation(model, inputs, **generation)
        return trace.ids, trace
    except SurgeryError:
        raise
    except ValueError as error:
        raise InvalidInputError(f"Nothing can be generated: {error} See the model's generation_config.json.") from error


def _moved(trace: Trace | None) -> str:
    if trace is None:
        return ", all from the final layer"
    return f", {trace.moved} from before the final layer, mean depth {trace.mean_depth:.2f}"
