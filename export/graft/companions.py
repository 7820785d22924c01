"""The files beside a foreign model -> those of its artifact, and what they say of the model.

`config.json` is transformers', as optimum writes it; `genai_config.json` is that of onnxruntime-genai's builder. One of
the two is needed: it names the number of layers, which the graph must agree with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.artifact.clients import GRAPH_FILE
from cdsurgery.export.artifact.staging import copy_file

CONFIG, GENERATION, GENAI = "config.json", "generation_config.json", "genai_config.json"
_COPIED = (
    *(CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
# genai_config.json's names in "decoder" -> transformers' names
_GENAI_FACTS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")


@dataclass(frozen=True)
class Facts:
    """What the configuration says of a model.

    Attributes:
        model_type: transformers' name of the family.
        layers: L.
        hidden_size: D.
        heads: key and value heads.
        head_size: of each.
        vocabulary: V.
        context: the most tokens.
    """

    model_type: str
    layers: int
    hidden_size: int
    heads: int
    head_size: int
    vocabulary: int
    context: int


def read_config(model: Path) -> PreTrainedConfig:
    """The configuration beside a model, from either file.

    Raises:
        InvalidInputError: there is neither, or it cannot be read.
    """
    folder = model.parent
    if (folder / CONFIG).is_file():
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
            raise InvalidInputError(f"{folder / CONFIG} cannot be used: {error}") from error
    if (folder / GENAI).is_file():
        try:
            return _from_genai(_read_json(folder / GENAI)["model"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(
                f"{folder / GENAI} cannot be used ({type(error).__name__}: {error}). Put the model's own {CONFIG} "
                "beside it."
            ) from error
    raise InvalidInputError(
        f"Beside {model} there is neither {CONFIG} nor {GENAI}. One is needed: it says how many layers the graph must "
        f"have. Put the {CONFIG} of the model there that was exported."
    )


def read_facts(config: PreTrainedConfig) -> Facts:
    """The numbers in a configuration that a graph does not always show.

    Raises:
        InvalidInputError: it has not all of them.
    """
    try:
        heads: int = config.num_attention_heads
        return Facts(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
        )
    except AttributeError as error:
        raise InvalidInputError(
            f"The configuration of this {config.model_type} names no {error.name}, which is needed beside the graph. "
            f"Add it to {CONFIG}."
        ) from error


def check_companions(model: Path) -> None:
    """Refuse what `write_companions` or clients of the artifact could not read.

    Raises:
        InvalidInputError: a file beside the model says nothing that they understand.
    """
    folder = model.parent
    try:
        if (folder / GENERATION).is_file():
            GenerationConfig.from_pretrained(folder)
        if (folder / GENAI).is_file():
            _read_json(folder / GENAI)["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{GENERATION} or {GENAI} in {folder} cannot be used ({type(error).__name__}: {error}). Mend it, or take "
            "it away: it is optional."
        ) from error


def write_companions(model: Path, folder: Path, config: PreTrainedConfig) -> None:
    """Copy what lies beside the model into the artifact, and write what `load` and clients need beside.

    Args:
        model: the foreign ONNX file.
        folder: the artifact.
        config: from `read_config`.
    """
    templates = (model.parent / CHAT_TEMPLATE_DIR).glob("*.jinja")
    for name in (*_COPIED, *(f"{CHAT_TEMPLATE_DIR}/{template.name}" for template in templates)):
        if (model.parent / name).is_file():
            copy_file(model.parent, folder, name)
    if not (folder / CONFIG).exists():
        config.save_pretrained(folder)
    if not (folder / GENERATION).exists():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    if (model.parent / GENAI).is_file():
        genai = _read_json(model.parent / GENAI)
        genai["model"]["decoder"]["filename"] = GRAPH_FILE
        (folder / GENAI).write_text(json.dumps(genai, indent=1) + "\n", encoding="utf-8")


def _from_genai(model: dict[str, Any]) -> PreTrainedConfig:
    """As much of transformers' configuration as onnxruntime-genai's says; the rest is not the model's own."""
    decoder = model["decoder"]
    return AutoConfig.for_model(
        model["type"],
        **{name: decoder[name] for name in _GENAI_FACTS},
        head_dim=decoder["head_size"],
        vocab_size=model["vocab_size"],
        max_position_embeddings=model["context_length"],
        **{name: model.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
