"""Names of real models -> models of their shape with random weights: what decoding costs does not depend on them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# As in the config.json of each on the Hub: the family, and what is not transformers' default for it.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
    # Of these three, the text part.
    "qwen3.5-9b": ("qwen3_5_text", {}),
    "qwen3.5-35b-a3b": ("qwen3_5_moe_text", {}),
    "gemma-4-31b": (
        "gemma4_text",
        {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 262144,
        },
    ),
    # Small enough to see in a minute that everything runs.
    "tiny": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
        },
    ),
}


def config_of(shape: str) -> PretrainedConfig:
    """The config, made when it is asked for: an older transformers lacks some of the families."""
    family, fields = SHAPES[shape]
    return AutoConfig.for_model(family, **fields)


def has_experts(shape: str) -> bool:
    """Whether it is a mixture of experts."""
    config = config_of(shape)
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))


def random_model(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that shape, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype).eval()
