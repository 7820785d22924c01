"""A causal LM that nobody has seen: its code stands beside its weights, and no name in it is one that others use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size: int = 256, width: int = 64, rungs: int = 6, gain: float = 0.5, **rest: Any) -> None:
        self.vocab_size, self.width, self.rungs, self.gain = vocab_size, width, rungs, gain
        super().__init__(**rest)


class Rung(nn.Module):
    """Mixes each position with the mean of those before it, and says so in a dict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.turn, self.scale = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        change = torch.tanh(self.turn(self.scale(x.cumsum(dim=1) / count)))
        return {"stream": x + change, "change": change}


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    """`[B, T]` ids -> `[B, T, V]` logits; without a cache."""

    config_class = OwnConfig
    _supports_cache_class = False

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.letters = nn.Embedding(config.vocab_size, config.width)
        self.ladder = nn.ModuleList(Rung(config.width) for _ in range(config.rungs))
        self.plumb, self.speech = nn.LayerNorm(config.width), nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:  # generate says so
        x = self.letters(input_ids)
        for rung in self.ladder:
            x = rung(x)["stream"]
        return CausalLMOutputWithPast(logits=self.speech(self.between(self.plumb(x))))

    def between(self, x: Tensor) -> Tensor:
        """Nothing; a subclass may do something to the normed state."""
        return x
