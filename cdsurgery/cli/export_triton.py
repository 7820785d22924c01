"""An artifact -> a model in a Triton repository that takes text and returns text."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from cdsurgery.cli.model import import_export, silence_transformers
from cdsurgery.cli.screen import Screen

SUMMARY = "to a model repository of Triton Inference Server"
DESCRIPTION = """\
Write a model into a Triton repository: text in, text out, streamed, with requests that join and leave a running batch.
It runs in Triton's Python backend with tokenizers, numpy and onnxruntime and nothing of this package. A model that this
command wrote before under the same name is replaced; others in the repository stay."""
EXAMPLE = "cdsurgery export triton artifact repository --name my-llm"

# Option of the command -> type and help; each is a field of `ServingOptions`, which has the defaults.
NUMBERS: dict[str, tuple[type, str]] = {
    "version": (int, "number of the version folder (default: 1)"),
    "instances": (int, "processes with a copy of the model each (default: 1)"),
    "slots": (int, "requests that decode at the same time (default: 32)"),
    "chunk": (int, "prompt tokens taken in between two steps of the running requests (default: 128)"),
    "queue": (int, "requests that may wait for a slot; more are refused (default: 256)"),
    "queue-timeout-seconds": (float, "a request that waited so long gets an error (default: 60)"),
    "request-timeout-seconds": (float, "a request that took so long gets an error (default: never)"),
    "max-tokens": (int, "of an answer whose request names none (default: 16)"),
    "context": (int, "tokens of prompt and answer together (default: the model's)"),
    "threads": (int, "of ONNX Runtime in an instance (default: one a core)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("artifact", metavar="DIR", help="a folder made by `cdsurgery export onnx` or `export graft`")
    parser.add_argument("repository", metavar="REPOSITORY", help="the model repository; made if it does not exist")
    parser.add_argument("--name", required=True, help="of the model: letters, digits, '_', '-' and dots")
    parser.add_argument("--kind", choices=("cpu", "gpu"), help="where it runs (default: cpu)")
    parser.add_argument("--gpus", type=int, nargs="+", metavar="INDEX", help="which GPUs (default: all)")
    for name, (kind, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    parser.add_argument(
        "--providers", choices=("tensorrt",), help="run the graph in ONNX Runtime's TensorRT provider, with --kind gpu"
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="absolute path on the server's machine where TensorRT keeps engines and timings"
    )
    parser.add_argument(
        "--no-warm-up", action="store_true", help="be ready before a first request has gone through the model"
    )
    parser.add_argument(
        "--rate-limit",
        nargs="+",
        default=[],
        metavar="RESOURCE=N",
        help="resources of Triton's rate limiter that an instance holds while it runs",
    )
    parser.add_argument(
        "--no-unary", action="store_true", help="do not write NAME_unary, which answers KServe's unary requests"
    )
    parser.add_argument(
        "--step", choices=("onnxruntime", "tensorrt"), help="also write NAME_step, the bare graph, for this backend"
    )
    parser.add_argument("--bls", action="store_true", help="run the graph through NAME_step")
    parser.add_argument("--engine", metavar="FILE", help="the TensorRT plan of the graph, for --step tensorrt")


def run(options: argparse.Namespace, screen: Screen) -> bool:
    """Write the model folders."""
    names = ["kind", "gpus", "providers", "cache", "step", *(name.replace("-", "_") for name in NUMBERS)]
    given: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "gpus" in given:
        given["gpus"] = tuple(given["gpus"])
    given |= {
        "warm_up": not options.no_warm_up,
        "unary": not options.no_unary,
        "bls": options.bls,
        "rate_limit": _resources(options.rate_limit),
    }
    with screen.stage(f"Writing {options.name} into {options.repository}"):
        export = import_export()
        silence_transformers()
        folder: Path = export.to_triton(
            options.artifact,
            options.repository,
            name=options.name,
            options=export.ServingOptions(**given),
            engine=options.engine,
        )
    twins = {"_unary": not options.no_unary, "_step": options.step is not None}
    models = [options.name, *(f"{options.name}{ending}" for ending, written in twins.items() if written)]
    document = {"repository": str(options.repository), "models": models, "folder": str(folder)}
    screen.result(document, *(f"{options.repository}/{model}" for model in models))
    serve = shlex.join(["tritonserver", f"--model-repository={options.repository}"])
    screen.err.print(f"Serve it: {serve}", style="dim", markup=False)
    return True


def _resources(pairs: list[str]) -> dict[str, int]:
    """["memory=2"] -> {"memory": 2}."""
    from cdsurgery.errors import InvalidInputError

    resources = {}
    for pair in pairs:
        name, _, count = pair.partition("=")
        if not name or not count.isdecimal():
            raise InvalidInputError(f"--rate-limit {pair!r}: give a name and a number, such as memory=1.")
        resources[name] = int(count)
    return resources
