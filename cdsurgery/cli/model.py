"""MODEL, as it is typed -> something that generates, and its tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdsurgery.errors import InvalidInputError, SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cdsurgery.cli.screen import Screen
    from cdsurgery.config import ConfidentConfig
    from cdsurgery.head import ConfidentHead


def is_artifact(source: str) -> bool:
    """Whether this is a folder that `cdsurgery export` made, and not a model."""
    return (Path(source) / "cdsurgery.json").is_file()


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Declare where PyTorch runs the model."""
    parser.add_argument("--device", metavar="NAME", help="where PyTorch runs it, such as cuda or cuda:1 (default cpu)")


def load(source: str, screen: Screen, device: str | None = None) -> PreTrainedModel:
    """The plain model, under a stage of its own, on the CPU unless a device is named.

    Raises:
        InvalidInputError: there is no such device, or no such model.
        SurgeryError: the device's memory does not hold it.
    """
    with screen.stage(f"Loading {source}"):
        silence_transformers()
        from cdsurgery.loading import load_causal_lm

        if device is None:
            return load_causal_lm(source)
        _check_device(device)
        return _moved(load_causal_lm(source), source, device)


def _check_device(device: str) -> None:
    """Before a model is loaded for it."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInputError(
            f"--device is {device}, where PyTorch cannot compute: {reason.rstrip('.')}. Leave it out for the "
            "CPU; a GPU is cuda, or cuda:1 for the second one, where torch.cuda.is_available()."
        ) from error


def _moved(model: Any, source: str, device: str) -> PreTrainedModel:
    import torch

    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        size = model.get_memory_footprint() / 1e9
        raise SurgeryError(
            f"The memory of {device} does not hold {source}, whose weights are {size:.1f} GB. Leave out --device, or "
            "load it in Python with a device_map and wrap it there."
        ) from error


def load_artifact(source: str, given: list[str], screen: Screen) -> Any:
    """An artifact or an engine, open for running, under a stage of its own.

    Args:
        given: the flags of a model that were given with it, as they are typed.

    Raises:
        InvalidInputError: there are such flags.
    """
    if given:
        raise InvalidInputError(
            f"{source} is an exported artifact, whose selection of layers and device were fixed when it was made. "
            f"Leave out {', '.join(given)}, or give the model it was made from."
        )
    with screen.stage(f"Loading {source}"):
        silence_transformers()
        return import_export().load(source)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or in the artifact."""
    from cdsurgery import loading

    return loading.load_tokenizer(source)


def wrap(model: PreTrainedModel, config: ConfidentConfig, screen: Screen) -> ConfidentHead:
    """The wrapped model, under a stage of its own."""
    from cdsurgery import wrap as wrap_model

    with screen.stage("Wrapping: proving on a probe that its logits can be reproduced"):
        return wrap_model(
            model,
            lookback=config.lookback,
            probability=config.probability,
            seed=config.seed,
            measure=config.measure,
        )


def import_export() -> Any:
    """The package `cdsurgery.export`, or what to install."""
    try:
        from cdsurgery import export
    except ImportError as error:
        raise SurgeryError(str(error)) from error
    return export


def silence_transformers() -> None:
    """Keep its warnings and progress bars off stderr, where they would tear our own progress apart."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
