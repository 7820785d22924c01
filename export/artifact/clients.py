"""A wrapped model -> the files that other clients of the artifact read: configs, tokenizer, genai_config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cdsurgery.errors import InvalidInputError, UnsupportedModelError
from cdsurgery.export.signature import Signature

GRAPH_FILE = "model.onnx"
GENAI = "onnxruntime-genai"
RUNNER = "cdsurgery.export.load"

# transformers' model_type -> the name under which onnxruntime-genai 0.18 knows the family; it runs all others as
# "decoder". Left out on purpose: "gpt2", where it wants one tensor for keys and values, and "phi3", where it runs the
# whole prompt again at token 4097.
# https://github.com/microsoft/onnxruntime-genai/blob/main/src/models/model_type.h
GENAI_TYPES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "gemma4_text": "gemma4_text",
    "gpt_oss": "gptoss",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "phi": "phi",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_5_moe_text": "qwen3_5_moe_text",
    "qwen3_5_text": "qwen3_5_text",
    "smollm3": "smollm3",
}
# What a layer may keep between two steps there, and which parts go together.
_GENAI_STATES = ({"key", "value"}, {"conv", "recurrent"})
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def write_client_files(
    folder: Path, model: Any, signature: Signature, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, str]:
    """Write config.json, generation_config.json, genai_config.json and, if given, the tokenizer's files.

    Returns:
        For each client that cannot run this artifact, why: it gets no file of its own.

    Raises:
        InvalidInputError: the tokenizer is none, or the generation config contradicts itself and so is not saved.
    """
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained")):
        raise InvalidInputError(
            f"tokenizer is {tokenizer!r}; it must be a loaded one, such as AutoTokenizer.from_pretrained(folder) "
            "returns, or None."
        )
    not_for = {}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    try:
        model.generation_config.save_pretrained(folder)
    except ValueError as error:
        raise InvalidInputError(
            f"model.generation_config cannot be saved: {error} It says how clients decode; set it right, for example "
            "do_sample=True where there is a temperature, and export again."
        ) from error
    try:
        config = genai_config(model, signature)
        (folder / "genai_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except UnsupportedModelError as error:
        not_for[GENAI] = str(error)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _speak_to_transformers_4(folder / "tokenizer_config.json", tokenizer)
    return not_for


def genai_config(model: Any, signature: Signature) -> dict[str, Any]:
    """What onnxruntime-genai wants to know of a decoder.

    https://onnxruntime.ai/docs/genai/reference/config.html

    Raises:
        UnsupportedModelError: it cannot run this graph, and why.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        raise UnsupportedModelError("the model's config names no max_position_embeddings, which genai needs.")
    sides = {side: _genai_states(side, signature) for side in ("inputs", "outputs")}
    keys = next(spec for spec in signature.inputs if spec.name.endswith(".key"))
    logits = next((spec for spec in signature.outputs if spec.name == "logits"), None)
    if logits is None:
        raise UnsupportedModelError("the graph returns no logits to choose a token from.")
    plain = [spec.name for spec in signature.inputs if _state(spec.name) is None]
    return {
        "model": {
            "type": GENAI_TYPES.get(config.model_type, "decoder"),
            "vocab_size": logits.axes[-1],
            "context_length": context,
            **_special_tokens(model),
            # No "sliding_window": the graph's cache keeps every token, and genai would cut it.
            "decoder": {
                "filename": GRAPH_FILE,
                "hidden_size": config.hidden_size,
                "head_size": keys.axes[3],
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": keys.axes[1],
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {name: name for name in plain} | sides["inputs"],
                "outputs": {"logits": logits.name} | sides["outputs"],
            },
        },
        "search": {
            "max_length": context,
            # A cache that grows by concatenation cannot share its buffer between past and present.
            "past_present_share_buffer": False,
            **{name: value for name in _SEARCH if (value := getattr(model.generation_config, name, None)) is not None},
        },
    }


def _state(name: str) -> tuple[str, int, str] | None:
    """ "past_key_values.3.key" -> ("past_key_values.%d.key", 3, "key"); None for what is no layer's state."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(\w+)", name)
    return match and (f"{match[1]}.%d.{match[3]}", int(match[2]), match[3].removesuffix("_state"))


def _genai_states(side: str, signature: Signature) -> dict[str, str]:
    """For each kind of state a template of its names, such as past_key_names: "past_key_values.%d.key"."""
    names: dict[str, str] = {}
    layers: dict[int, dict[str, Any]] = {}
    for spec in getattr(signature, side):
        if (state := _state(spec.name)) is not None:
            template, layer, part = state
            names[f"{'past' if side == 'inputs' else 'present'}_{part}_names"] = template
            layers.setdefault(layer, {})[part] = spec.axes
    for layer, parts in layers.items():
        if not any(parts.keys() == group for group in _GENAI_STATES):
            raise UnsupportedModelError(
                f"layer {layer} keeps {', '.join(sorted(parts))}; genai knows keys and values, or a convolution and a "
                "recurrent state."
            )
        if parts.get("key") != parts.get("value"):
            raise UnsupportedModelError(
                f"layer {layer} has keys {list(parts['key'])} and values {list(parts['value'])}; genai gives both the "
                "same shape."
            )
    return names


def _special_tokens(model: Any) -> dict[str, Any]:
    """The ids that begin, end and pad a text, as `generate` uses them: the generation config goes first."""
    configs = (model.generation_config, model.config.get_text_config())
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {
        name: next((value for config in configs if (value := getattr(config, name, None)) is not None), None)
        for name in names
    }
    if tokens["pad_token_id"] is None:  # genai insists on one
        eos = tokens["eos_token_id"]
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return {name: value for name, value in tokens.items() if value is not None}


def _speak_to_transformers_4(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what transformers 4, and so optimum, reads otherwise from a tokenizer that transformers 5 saved.

    It does not know the class TokenizersBackend, and where no inputs are named it makes token_type_ids, which
    `generate` refuses.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = list(tokenizer.model_input_names)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
