"""Names of real models -> models of their shape with random weights: what decoding costs does not depend on them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

# As in the config.json of each on the Hub.
SHAPES: dict[str, PretrainedConfig] = {
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "gpt-oss-20b": GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
    # Small enough to see in a minute that everything runs.
    "tiny": LlamaConfig(
        vocab_size=32000, hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4
    ),
}


def heads_of_cache(config: Any) -> tuple[int, int]:
    """How many heads of keys a layer keeps, and how many numbers each has for a token."""
    heads = config.num_key_value_heads or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def random_model(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that shape, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype).eval()
