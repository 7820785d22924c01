"""A causal LM's forward -> the same forward with the logits of its most confident near-final layer.

The whole way from a tensor to its logits is `ConfidentHead.forward`: run the model as it is and note the states of the
K layers before the last, send them through the model's own tail, measure, scan back to the trough, and return both
the final and the selected logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep

from cdsurgery.anatomy import Anatomy, candidate_logits, tail_logits
from cdsurgery.config import ConfidentConfig
from cdsurgery.draw import allowed_rows, text_positions
from cdsurgery.entropy import MEASURES
from cdsurgery.errors import SurgeryError, UnsupportedModelError
from cdsurgery.joint_norm import JointNorm
from cdsurgery.lazy import can_look, fewer_rows_pay, select_lazily
from cdsurgery.one_pass import one_pass
from cdsurgery.output import ConfidentOutput, confident_output
from cdsurgery.proof import proven_anatomy
from cdsurgery.shard import vocabulary_shard
from cdsurgery.states import kept_rows
from cdsurgery.taps import Taps
from cdsurgery.trough import select_beside
from cdsurgery.unembedding import few_rows_unembedding


class ConfidentHead(nn.Module):
    """What a wrapped model is, beside being an instance of its own class.

    `wrap` puts this class before the model's own one; parameters, `state_dict`, `generate` and all else stay.

    Attributes:
        confident: the options in force; `confident.lookback` is K for this model's depth.
        anatomy: the parts found and proven.
    """

    confident: ConfidentConfig
    anatomy: Anatomy
    _taps: Taps
    _norm: JointNorm | None
    _placed_forward: Callable[..., Any] | None
    _argument_names: tuple[str, ...]
    _as_dict: dict[str, Any]
    _generating = False

    def forward(self, *args: Any, **kwargs: Any) -> ConfidentOutput | tuple[Any, ...]:
        """The model's own forward, with the same arguments.

        `logits_to_keep` cuts rows before anything is normed or projected. `labels` give the model's own loss with its
        cross-entropy taken on the selected logits.

        Returns:
            A `ConfidentOutput`, or its tuple with `return_dict=False`.
        """
        inputs = self._named(args, kwargs)
        as_dict = inputs.pop("return_dict", None)
        if as_dict is None:
            as_dict = getattr(self.config, "return_dict", True)
        output = self._plain_output(inputs) if self.confident.probability == 0 else self._confident_output(inputs)
        return output if as_dict else output.to_tuple()

    def _generated(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`. Nobody sees the entropies of its steps, so they need not all be measured."""
        if self._generating:  # generate may call itself
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        self._generating = True
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__.pop("_generating", None)  # another thread may have ended before

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Where `to`, `half`, `float` and their like come through. A cast has the tail proven anew.

        Raises:
            SurgeryError: it cannot be, in this dtype. The model has been cast.
        """
        model: Any = self
        before = model.dtype
        super()._apply(*args, **kwargs)
        if model.dtype != before:
            self.anatomy = self._proven_again()
        return self

    def _proven_again(self) -> Anatomy:
        """The anatomy as it is, or with other casts in its tail: in float32 nothing shows which a model makes."""
        model, confident = cast(PreTrainedModel, self), self.confident
        self.confident = replace(confident, probability=0.0)  # so that the forward is the model's own
        try:
            try:
                return proven_anatomy(model, self.anatomy)
            except UnsupportedModelError:
                return proven_anatomy(model)
        except UnsupportedModelError as error:
            raise SurgeryError(
                f"This {type(self).__name__} was cast to {model.dtype}, and cannot be proven in it: {error} Unwrap it "
                "with cdsurgery.unwrap(model), or cast it back."
            ) from error
        finally:
            self.confident = confident

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, with the errors that Python gives a function of these names."""
        if len(args) > len(self._argument_names):
            raise TypeError(f"forward() takes {len(self._argument_names)} positional arguments; {len(args)} were given")
        named = dict(zip(self._argument_names, args, strict=False))
        if twice := [name for name in named if name in kwargs]:
            raise TypeError(f"forward() got multiple values for {', '.join(twice)}")
        return named | kwargs

    def _prepared_inputs(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the model's own `prepare_inputs_for_generation` returns, and where these tokens stand in their text.

        A step of `generate` may not show it: a recurrent state has no length, and Mamba drops the mask.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if self._draws and inputs.get("position_ids") is None:
            tokens, embeddings = inputs.get("input_ids"), kwargs.get("inputs_embeds")
            tokens = inputs["inputs_embeds"][..., 0] if tokens is None else tokens
            whole = input_ids.shape[1] + (0 if embeddings is None else embeddings.shape[1])  # a prompt of embeddings
            inputs["text_positions"] = text_positions(kwargs, tokens, whole - tokens.shape[1])
        return inputs

    @property
    def _draws(self) -> bool:
        return 0 < self.confident.probability < 1

    def _confident_output(self, inputs: dict[str, Any]) -> ConfidentOutput:
        # A model whose forward does not name it ignores it and returns all rows, as transformers' generate knows.
        keep = inputs.get("logits_to_keep", 0) if "logits_to_keep" in self._argument_names else 0
        positions = inputs.pop("text_positions", None)
        allowed = self._allowed_rows(inputs, keep, positions) if self._draws else None
        model = cast(PreTrainedModel, self)
        with self._taps.reading(keep) as states:
            fused = self.confident.scan == "fused"
            sparing = self._only_generates(inputs)
            passing = one_pass(model, self.anatomy, self._norm, states, sparing) if fused else nullcontext()
            with passing as passed:
                plain = self._plain_forward(**inputs)
            if any(state is None for state in states):
                return self._of_fewer_layers(plain, states)
            # With a boolean `[B, T]` to keep, the model's logits are `[rows that are true, V]`: the rows of one batch.
            flat = plain.logits.ndim == 2
            final = plain.logits[None] if flat else plain.logits
            if flat and allowed is not None:
                allowed = allowed[None]
            if passed is None:
                logits, depth, entropy = self._select(final, states, allowed, sparing)
            else:
                logits, depth, entropy = passed.select(final, allowed)
        if flat:
            logits, depth, entropy = logits.squeeze(0), depth.squeeze(0), entropy.squeeze(0)
        return confident_output(
            plain,
            logits=logits,
            final_logits=plain.logits,
            selected_layer=len(self.anatomy.layers) - depth,
            entropy=entropy,
            **self._moved_loss(plain, logits, inputs),
        )

    def _only_generates(self, inputs: dict[str, Any]) -> bool:
        """Whether nobody sees the entropies: in a step of `generate`, and in one of transformers' `generate_batch`."""
        return self._generating or "logits_indices" in inputs  # which continuous batching alone passes

    def _select(
        self, final: Tensor, states: list[Tensor], allowed: Tensor | None, sparing: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The logits, depth and entropies that `select` returns, from the final logits and the states before."""
        model, anatomy, measure = cast(PreTrainedModel, self), self.anatomy, MEASURES[self.confident.measure]
        shard = vocabulary_shard(model, anatomy, measure)
        if shard is not None:
            final, measure = shard.part(final), shard.entropy
        if self._is_lazy(final, sparing):
            unembed = shard or few_rows_unembedding(model, anatomy)

            def project(k: int, rows: Tensor) -> Tensor:
                state = states[k - 1]
                state = kept_rows(state, rows.to(state.device), anatomy.batch_axis)
                return tail_logits(model, anatomy, state, unembed).squeeze(0).to(final.device)

            logits, depth, entropy = select_lazily(final, project, len(states), measure, allowed)
        else:
            earlier = candidate_logits(model, anatomy, states, shard).to(final.device)
            logits, depth, entropy = select_beside(final, earlier, measure, allowed)
        return logits if shard is None else shard.whole(logits), depth, entropy

    def _is_lazy(self, final: Tensor, sparing: bool) -> bool:
        if self.confident.scan == "full" or not can_look(final.device):
            return False
        if self.confident.scan == "lazy":
            return True
        return sparing and fewer_rows_pay(final.device, (len(self._taps.states) + 1) * final.shape[:-1].numel())

    def _plain_forward(self, **inputs: Any) -> Any:
        return (self._placed_forward or super().forward)(**inputs, **self._as_dict)

    def _of_fewer_layers(self, plain: Any, states: list[Tensor]) -> ConfidentOutput:
        """The output of a forward in which layers did not run: a draft's, of assisted generation by early exit."""
        model, layers = cast(Any, self), len(self.anatomy.layers)
        # For a draft, transformers tells the decoder that it has fewer layers.
        if self._generating and getattr(model.base_model.config, "num_hidden_layers", layers) < layers:
            return self._final_output(plain)
        left = ", ".join(str(layers - 1 - back) for back, state in enumerate(states) if state is None)
        raise SurgeryError(
            f"Layers {left} of this {type(self).__name__} did not run, so there is nothing to select from. Have they "
            "been replaced since the model was wrapped, wrap it again: cdsurgery.wrap(cdsurgery.unwrap(model)). "
            "Layerdrop leaves some out in training: set it to 0, call model.eval(), or unwrap the model to train it."
        )

    def _plain_output(self, inputs: dict[str, Any]) -> ConfidentOutput:
        return self._final_output(self._plain_forward(**inputs))

    def _final_output(self, plain: Any) -> ConfidentOutput:
        layers = len(self.anatomy.layers)
        final = torch.full(plain.logits.shape[:-1], layers, dtype=torch.int64, device=plain.logits.device)
        return confident_output(plain, final_logits=plain.logits, selected_layer=final)

    def _allowed_rows(self, inputs: dict[str, Any], keep: int | Tensor, positions: Tensor | None) -> Tensor:
        """Which kept rows `[B, T]` may leave the final layer; asked before the model runs and its cache grows.

        Args:
            positions: `[B, S]`, where each token stands in its text; None where the inputs show it.
        """
        tokens = inputs.get("input_ids")
        if tokens is None:  # called with embeddings: the position alone is the counter
            embeddings = inputs["inputs_embeds"]
            tokens = torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
        positions = text_positions(inputs, tokens) if positions is None else positions
        rows = torch.stack([tokens, positions.to(tokens.device)], dim=-1)
        tokens, positions = slice_logits_to_keep(rows, keep).unbind(-1)
        assert self.confident.seed is not None
        return allowed_rows(self.confident.probability, self.confident.seed, tokens, positions)

    def _moved_loss(self, plain: Any, logits: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The model's own loss, its cross-entropy moved from the final to the selected logits.

        Whatever else the model adds to its loss (the routers of a mixture of experts) stays in it.
        """
        if getattr(plain, "loss", None) is None or inputs.get("labels") is None:
            return {}
        model: Any = self
        extra = {name: value for name, value in inputs.items() if name not in self._argument_names}
        # Of the logits: a model may cut those of padded entries, and then the config names more.
        loss = functools.partial(model.loss_function, labels=inputs["labels"], vocab_size=logits.shape[-1], **extra)
        return {"loss": plain.loss + (loss(logits=logits) - loss(logits=plain.logits))}
