"""A wrapped model -> the module that is traced: flat tensors in, flat tensors out, selection inside.

All M states of a row go through the tail in one pass, so that the graph reads the unembedding once. A graph that scores
has many rows, where the unembedding is no longer what costs: it takes one candidate after another instead, and keeps
what it says of the targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cdsurgery.anatomy import tail_logits
from cdsurgery.draw import allowed_rows
from cdsurgery.entropy import MEASURES
from cdsurgery.export.graph.cache import build_cache, cache_states
from cdsurgery.export.options import GraphOptions, Positions
from cdsurgery.export.signature import Signature, empty_past, torch_dtype
from cdsurgery.taps import Taps
from cdsurgery.trough import allowed_depth, pick, select, trough_depth


class DecoderGraph(nn.Module):
    """One step of decoding, prefill or continuation, as a function of tensors.

    Use as a context manager: leaving it takes the taps off the model.

    Args:
        model: a `ConfidentHead`, in evaluation mode.
        signature: what it takes and returns.
        options: of the graph.
    """

    def __init__(self, model: Any, signature: Signature, options: GraphOptions) -> None:
        super().__init__()
        self.model, self.config, self.signature, self.options = model, model.config, signature, options
        layers = model.anatomy.layers[::-1][: model.confident.lookback + 1]
        self.taps = Taps([model.get_submodule(path) for path in layers])

    def __enter__(self) -> DecoderGraph:
        return self

    def __exit__(self, *_: object) -> None:
        self.taps.remove()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """None: transformers' exporter would cast all inputs to their dtype, and recurrent states stay float32."""
        return iter(())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor],
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the decoder on new tokens.

        Args:
            input_ids, position_ids: `[B, S]` int64.
            attention_mask: `[B, P+S]` int64, 0 for padding on either side.
            past: the cache's tensors in the order of the signature, each `[B, ...]`.
            targets: `[B, S]` int64, in a graph that scores: the token wanted after each; negative for none.

        Returns:
            Tensors by the names of the signature's outputs.
        """
        model = self.model
        # Linear attention updates its states in place, and an input of a graph must stay what it was.
        cache = build_cache([spec.name for spec in self.signature.past], [tensor.clone() for tensor in past])
        with self.taps.reading() as states:
            # The model's own logits are not used: their rows are cut too late here, and tracing drops them.
            model._plain_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            rows = kept_rows(attention_mask, input_ids, self.options.positions)
            kept = [state[rows] for state in states]
        allowed = None
        if model.confident.probability < 1:
            tokens, positions = input_ids[rows], position_ids[rows]
            allowed = allowed_rows(model.confident.probability, model.confident.seed, tokens, positions)
        results = self._selection(kept, allowed) if targets is None else self._scores(kept, targets, allowed)
        values = [*results, *(state for _, _, state in cache_states(cache))]
        specs = self.signature.outputs
        return {spec.name: value.to(torch_dtype(spec)) for spec, value in zip(specs, values, strict=True)}

    def _selection(self, states: list[Tensor], allowed: Tensor | None) -> tuple[Tensor, ...]:
        """Selected and final logits `[B, T, V]`, layer `[B, T]`, entropies `[B, T, M]`."""
        model = self.model
        if self.options.scan == "lazy" and len(states) > 2:
            return self._lazy_selection(states, allowed)
        candidates = tail_logits(model, model.anatomy, torch.stack(states))
        logits, depth, entropy = select(candidates, MEASURES[model.confident.measure], allowed)
        return logits, candidates[0], len(model.anatomy.layers) - depth, entropy

    def _lazy_selection(self, states: list[Tensor], allowed: Tensor | None) -> tuple[Tensor, ...]:
        """The same, from two layers, and of the rows that go on from the others; NaN for what was not measured."""
        model, measure = self.model, MEASURES[self.model.confident.measure]
        nearest = tail_logits(model, model.anatomy, torch.stack(states[:2]))
        logits, depth, entropy = select(nearest, measure, allowed)
        going = batch, position = (depth > 0).nonzero().unbind(-1)  # of R rows, often of none
        further = tail_logits(model, model.anatomy, torch.stack(states[2:])[:, batch, position])
        measured = measure(further).movedim(0, -1)
        back = trough_depth(torch.cat([entropy[going], measured], dim=-1))
        candidates = torch.cat([nearest[1][going][None], further])
        chosen = candidates[back - 1, torch.arange(back.shape[0])]
        unmeasured = torch.full((*depth.shape, len(states) - 2), torch.nan)
        entropy = torch.cat([entropy, unmeasured.index_put(going, measured)], dim=-1)
        logits, depth = logits.index_put(going, chosen), depth.index_put(going, back)
        return logits, nearest[0], len(model.anatomy.layers) - depth, entropy

    def _scores(self, states: list[Tensor], targets: Tensor, allowed: Tensor | None) -> tuple[Tensor, ...]:
        """Log-probabilities of the targets `[B, S]`, selected and final, layer `[B, S]`, entropies `[B, S, M]`."""
        model, wanted = self.model, targets.clamp(min=0)[..., None]
        measured: list[Tensor] = []
        scores: list[Tensor] = []
        for state in states:
            if scores:
                # Never true, but known only when the candidate before is done with: a runtime is free to compute the
                # logits of all candidates first, and would.
                never = (scores[-1] > torch.inf) | (measured[-1][..., None] > torch.inf)
                state = state.masked_fill(never, 0.0)
            logits = tail_logits(model, model.anatomy, state)
            measured.append(MEASURES[model.confident.measure](logits))
            scores.append(logits.gather(-1, wanted).float() - logits.float().logsumexp(dim=-1, keepdim=True))
        entropy = torch.stack(measured, dim=-1)
        depth = allowed_depth(entropy, allowed)
        chosen = pick(torch.stack(scores), depth)
        none = targets < 0
        logprobs = [score.squeeze(-1).masked_fill(none, 0.0) for score in (chosen, scores[0])]
        return *logprobs, len(model.anatomy.layers) - depth, entropy


def kept_rows(attention_mask: Tensor, input_ids: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Indices `[B, 1]` and `[B, T]` of the rows to project: the last one under the mask, or all.

    Args:
        attention_mask: `[B, P+S]` integers, 0 for padding on either side.
        input_ids: `[B, S]`, for its shape.
        positions: "last" (T is 1), "all" or "score" (T is S).
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
    ids = torch.arange(6, device=device).view(2, 3) % embedding.shape[0]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -3:],
        "targets": ids.flip(-1),  # another tensor than the ids, or the exporter makes one input of both
        "past": [tensor.to(device) for tensor in empty_past(signature, batch=2, past=4)],
    }
    wanted = {spec.name for spec in signature.inputs} | {"past"}
    return {name: value for name, value in inputs.items() if name in wanted}
