"""MODEL, as it is typed -> something that generates, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdsurgery.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cdsurgery.cli.screen import Screen
    from cdsurgery.config import ConfidentConfig
    from cdsurgery.head import ConfidentHead


def is_artifact(source: str) -> bool:
    """Whether this is a folder that `cdsurgery export` made, and not a model."""
    return (Path(source) / "cdsurgery.json").is_file()


def load(source: str, screen: Screen) -> PreTrainedModel:
    """The plain model, under a stage of its own."""
    with screen.stage(f"Loading {source}"):
        silence_transformers()
        from cdsurgery.loading import load_causal_lm

        return load_causal_lm(source)


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
