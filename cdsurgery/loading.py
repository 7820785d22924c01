"""A local folder or a Hub id -> a causal LM and its tokenizer, from safetensors, without running foreign code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cdsurgery.errors import InvalidInputError, UnsupportedModelError

Source = str | os.PathLike[str]


def load_causal_lm(source: Source) -> PreTrainedModel:
    """Load a model with its language head, in the dtype its config names.

    Args:
        source: a folder with `config.json` and safetensors weights, or a Hub id such as "Qwen/Qwen3-0.6B".

    Raises:
        InvalidInputError: nothing usable is there.
        UnsupportedModelError: the config names a model that is not a decoder-only causal LM.
    """
    config = load_config(source)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{source} is a {config.model_type}, an encoder-decoder. Confident decoding needs a decoder-only causal LM."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{source} is a {config.model_type}, for which transformers has no causal LM. Use a decoder-only model."
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidInputError(
            f"The weights of {source} could not be loaded: {_first_line(error)} Allowed are safetensors files; pickled "
            "weights are never loaded. Convert them with save_pretrained on a machine that trusts them."
        ) from error
    except (KeyError, TypeError, AttributeError) as error:  # what a config says that no model of its kind can be
        raise InvalidInputError(
            f"{source} cannot be built from its config.json ({type(error).__name__}: {_first_line(error)}). Correct "
            "it, or give the folder that save_pretrained wrote."
        ) from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise InvalidInputError(
            f"The weights of {source} lack {len(missing)} of the model's tensors, such as {missing[0]}, which would be "
            "random numbers. Its config.json belongs to other weights, or it is a model without its language head."
        )
    return model


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config, or an error that says what to do."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InvalidInputError(
            f"The folder {source} has no config.json, so it is not a model saved by transformers. Give the folder that "
            "save_pretrained wrote."
        )
    if not path.is_dir() and (path.is_absolute() or path.exists() or str(source).startswith(("./", "../", "~"))):
        raise InvalidInputError(
            f"There is no folder {source}. Give a folder with config.json and safetensors weights, or a Hub id."
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{source} is neither a local folder nor a Hub model that can be reached: {_first_line(error)} Check the "
            "spelling; for a gated or offline model, download it first and give the folder. Models that need code of "
            "their own (trust_remote_code) must be loaded by you and passed as objects."
        ) from error
    except Exception as error:  # whatever a config's own checks raise
        raise InvalidInputError(
            f"The config.json of {source} is not that of a model: {_first_line(error)} Correct it, or give the folder "
            "that save_pretrained wrote."
        ) from error


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the model.

    Raises:
        InvalidInputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever the parsers of a dozen formats make of a file
        raise InvalidInputError(
            f"No tokenizer could be loaded from {source}: {_first_line(error)} Save it into the same folder with "
            "tokenizer.save_pretrained."
        ) from error


def _first_line(error: Exception) -> str:
    """Of a message; all of it, on one line, where the first only announces the others."""
    line = str(error).strip().partition("\n")[0].strip()
    return " ".join(str(error).split()) if line.endswith(":") else line
