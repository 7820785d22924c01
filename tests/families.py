"""The tiny models of `cdsurgery.zoo` -> what is true of their layers, from the plain model alone; and odd ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from cdsurgery.zoo import HIDDEN as HIDDEN
from cdsurgery.zoo import LAYERS, VOCABULARY
from cdsurgery.zoo import tiny_model as tiny_model

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A cross-section of them: what a test that is too slow for all of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES runs on.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gpt_oss",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "cohere",
    "granite",
    "phi",
    "gpt2",
    "opt",
)


def mostly(usual: Sequence[Any], every: Sequence[Any]) -> list[Any]:
    """Each of `every`, families most often, as a parameter of a test; with `pytest --thorough` only if not usual."""
    return [one if one in usual else pytest.param(one, marks=pytest.mark.thorough) for one in every]


def token_ids(rows: int, length: int, seed: int = 1) -> Tensor:
    """`[rows, length]` int64 of random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Truth:
    """What a wrapped model must give, from the plain model and from nothing of cdsurgery.

    Attributes:
        candidates: `[M, B, T, V]`; index k are the plain model's logits when its last layer returns x^(L-k).
        entropy: `[B, T, M]` float64 nats, of those candidates.
        layer: `[B, T]` int64, the layer that Algorithm 1 reaches.
        logits: `[B, T, V]`, the candidate of that layer.
    """

    candidates: Tensor
    entropy: Tensor
    layer: Tensor
    logits: Tensor


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The only module list of a tiny model that has LAYERS members."""
    (layers,) = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
    return layers


@torch.no_grad()
def truth(plain: nn.Module, lookback: int, **inputs: Any) -> Truth:
    """Run a plain model once, then again with its last layer made to return each earlier layer's state."""
    layers, inputs = decoder_layers(plain), {"use_cache": False} | inputs
    states: list[Tensor] = []
    notes = [layer.register_forward_hook(lambda _, __, out: states.append(_state(out))) for layer in layers]
    final = plain(**inputs).logits
    for note in notes:
        note.remove()
    # All K at once, as a batch of K x B rows: a matrix product sums in an order that depends on its shape, and this is
    # the number of rows that one pass over all candidates has, so that results can be compared bit for bit.
    batch_axis = 1 if states[0].ndim == 4 and states[0].shape[0] != len(final) else 0  # gemma3n has its streams first
    earlier = torch.cat([states[-1 - k] for k in range(1, lookback + 1)], dim=batch_axis)
    many = {
        name: torch.cat([value] * lookback) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    swap = layers[-1].register_forward_hook(
        lambda _, __, out: earlier if isinstance(out, Tensor) else type(out)([earlier, *out[1:]])
    )
    replaced = plain(**many).logits.unflatten(0, (lookback, -1))
    swap.remove()
    candidates = torch.cat([final[None], replaced])
    log_p = candidates.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).movedim(0, -1)
    depth = torch.tensor([[algorithm_1(row) for row in rows] for rows in entropy.tolist()])
    logits = torch.stack([torch.stack([candidates[k, b, t] for t, k in enumerate(ks)]) for b, ks in enumerate(depth)])
    return Truth(candidates, entropy, len(states) - depth, logits)


def algorithm_1(entropy: list[float]) -> int:
    """The first trough of H^(L), H^(L-1), ...: how many layers before the last it lies."""
    depth = 0
    while depth + 1 < len(entropy) and entropy[depth + 1] < entropy[depth]:
        depth += 1
    return depth


def _state(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


# Odd ones: each changes one thing on the way from the layers to the logits.


class Odd(LlamaForCausalLM):
    """A Llama whose way from the final norm to the logits a subclass changes."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.extra = Extra()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        state = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.ending(state, input_ids))

    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.lm_head(state)


class Extra(nn.Module):
    """A module between norm and unembedding that does what a test wants."""

    def forward(self, state: Tensor, *more: Tensor) -> Tensor:
        return self.do(state, *more)


class AddsToLogits(Odd):
    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.lm_head(state) + 1


class ScalesTheNormedState(Odd):
    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.lm_head(state * 2)


class NormsWithoutAModule(Odd):
    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.lm_head(nn.functional.layer_norm(state, state.shape[-1:]))


class AddsTheEmbedding(Odd):
    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.lm_head(state + self.model.embed_tokens(ids))


class ProjectsTwice(Odd):
    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.lm_head(state) + self.lm_head(-state / 2)


class ConditionsItsTail(Odd):
    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        self.extra.do = lambda state, condition: state + condition
        return self.lm_head(self.extra(state, self.model.embed_tokens(ids)))


class MixesTheBatch(Odd):
    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        self.extra.do = lambda state: state / state.flatten(0, -2).std(dim=0)
        return self.lm_head(self.extra(state))


class LooksAhead(Odd):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        rows, length = input_ids.shape
        return super().forward(input_ids, torch.zeros(rows, 1, length, length))


class RunsItsLayersTwice(Odd):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        once = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        twice = self.model(inputs_embeds=once, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(twice))


class HalvesBetweenItsLayers(Odd):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        state = self.model.embed_tokens(input_ids)
        rotary = self.model.rotary_emb(state, torch.arange(input_ids.shape[1])[None])
        for layer in self.model.layers:
            state = layer(state / 2, position_embeddings=rotary)
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(state)))


class SharesOneLayer(Odd):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList([self.model.layers[0]] * LAYERS)


class NormsTwice(Odd):
    def ending(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(state))
