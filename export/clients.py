"""A wrapped model -> the files that other clients of the artifact read: configs, tokenizer, genai_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

GRAPH_FILE = "model.onnx"


def write_client_files(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write config.json, generation_config.json, genai_config.json and, if given, the tokenizer's files."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "genai_config.json").write_text(json.dumps(genai_config(model), indent=1) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _name_fast_tokenizer(folder / "tokenizer_config.json")


def genai_config(model: Any) -> dict[str, Any]:
    """What onnxruntime-genai wants to know of a decoder.

    https://onnxruntime.ai/docs/genai/reference/config.html
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens["pad_token_id"] is None:  # genai insists on one
        eos = tokens["eos_token_id"]
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return {
        "model": {
            "type": config.model_type,
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": {
                "filename": GRAPH_FILE,
                "hidden_size": config.hidden_size,
                "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # A cache that grows by concatenation cannot share its buffer between past and present.
        "search": {"max_length": config.max_position_embeddings, "past_present_share_buffer": False},
    }


def _name_fast_tokenizer(path: Path) -> None:
    """transformers 5 writes a class name that transformers 4, and so optimum, does not know."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
