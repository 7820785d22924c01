"""A wrapped model -> the module that is traced: flat tensors in, flat tensors out, selection inside.

All M states of a row go through the tail in one pass, so that the graph reads the unembedding once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cdsurgery.anatomy import tail_logits
from cdsurgery.draw import allowed_rows
from cdsurgery.entropy import MEASURES
from cdsurgery.export.signature import Positions, Signature, cache_tensors, empty_past
from cdsurgery.taps import Taps
from cdsurgery.trough import select


class DecoderGraph(nn.Module):
    """One step of decoding, prefill or continuation, as a function of tensors.

    Use as a context manager: leaving it takes the taps off the model.

    Args:
        model: a `ConfidentHead`, in evaluation mode.
        signature: what it takes and returns.
        positions: "last" for each row's last real token, "all" for every new token.
    """

    def __init__(self, model: Any, signature: Signature, positions: Positions) -> None:
        super().__init__()
        self.model, self.config, self.signature, self.positions = model, model.config, signature, positions
        layers = model.anatomy.layers[::-1][: model.confident.lookback + 1]
        self.taps = Taps([model.get_submodule(path) for path in layers])

    def __enter__(self) -> DecoderGraph:
        return self

    def __exit__(self, *_: object) -> None:
        self.taps.remove()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Run the decoder on new tokens.

        Args:
            input_ids, position_ids: `[B, S]` int64.
            attention_mask: `[B, P+S]` int64, 0 for padding on either side.
            past_key_values: keys and values of the cache layers in turn, each `[B, heads, P, size]`.

        Returns:
            Tensors by the names of the signature's outputs.
        """
        model = self.model
        cache = DynamicCache(zip(past_key_values[::2], past_key_values[1::2], strict=True))
        with self.taps.reading() as states:
            # The model's own logits are not used: their rows are cut too late here, and tracing drops them.
            model._plain_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            rows = kept_rows(attention_mask, input_ids, self.positions)
            candidates = tail_logits(model, model.anatomy, torch.stack([state[rows] for state in states]))
        config = model.confident
        allowed = None
        if config.probability < 1:
            allowed = allowed_rows(config.probability, config.seed, input_ids[rows], position_ids[rows])
        logits, depth, entropy = select(candidates, MEASURES[config.measure], allowed)
        values = [logits, candidates[0], len(model.anatomy.layers) - depth, entropy, *cache_tensors(cache)]
        return {spec.name: value for spec, value in zip(self.signature.outputs, values, strict=True)}


def kept_rows(attention_mask: Tensor, input_ids: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Indices `[B, 1]` and `[B, T]` of the rows to project: the last one under the mask, or all.

    Args:
        attention_mask: `[B, P+S]` integers, 0 for padding on either side.
        input_ids: `[B, S]`, for its shape.
        positions: "last" (T is 1) or "all" (T is S).
    """
    batch, length = input_ids.shape
    every = torch.arange(length, device=input_ids.device)
    real = attention_mask[:, -length:] * (every + 1)
    last = (real.amax(dim=-1, keepdim=True) - 1).clamp(min=0)
    columns = last if positions == "last" else every[None].expand(batch, length)
    return torch.arange(batch, device=input_ids.device)[:, None], columns


def sample_inputs(model: Any, signature: Signature) -> dict[str, Any]:
    """Inputs to trace with: two rows, three new tokens on four cached ones, and real padding.

    A mask of ones would let the exporter drop `attention_mask` from the graph, and padded batches would then be wrong
    without an error.
    """
    embedding = model.get_input_embeddings().weight
    device = embedding.device
    mask = torch.ones(2, 7, dtype=torch.int64, device=device)
    mask[0, :2] = 0
    return {
        "input_ids": torch.arange(6, device=device).view(2, 3) % embedding.shape[0],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -3:],
        "past_key_values": [tensor.to(device) for tensor in empty_past(signature, model.dtype, batch=2, past=4)],
    }
