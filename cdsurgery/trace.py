"""A prompt -> generated tokens, each with the layer that chose it, its entropies, and what the final layer would say.

`generate` returns tokens only. This looks over its shoulder, in PyTorch and in a runtime of `cdsurgery.export` alike:

    trace = trace_generation(model, inputs, max_new_tokens=64, do_sample=False)
    [(token.token, token.selected_layer) for token in trace.tokens if token.changed]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cdsurgery.errors import InvalidInputError
from cdsurgery.output import ConfidentOutput
from cdsurgery.wrap import layers_of


@dataclass(frozen=True)
class TracedToken:
    """One generated token.

    Attributes:
        token: the id that was generated.
        final_token: the id to which the final layer gave the largest logit.
        selected_layer: the layer whose logits were used, in [L-K, L]; layers are counted 1..L.
        depth: L - selected_layer, in [0, K].
        entropy: `[M]` nats; index k is layer L-k, NaN where the scan did not look. Empty where `probability=0`, which
            computes none.
    """

    token: int
    final_token: int
    selected_layer: int
    depth: int
    entropy: tuple[float, ...]

    @property
    def changed(self) -> bool:
        """Whether, after the same text, greedy decoding from the final layer would have said something else."""
        return self.token != self.final_token


@dataclass(frozen=True)
class Trace:
    """All tokens generated after one prompt, in order."""

    tokens: tuple[TracedToken, ...]

    @property
    def ids(self) -> list[int]:
        """The generated token ids."""
        return [token.token for token in self.tokens]

    @property
    def moved(self) -> int:
        """How many tokens were chosen by a layer before the final one."""
        return sum(token.depth > 0 for token in self.tokens)

    @property
    def changed(self) -> int:
        """How many tokens the final layer would have said differently."""
        return sum(token.changed for token in self.tokens)

    @property
    def mean_depth(self) -> float:
        """The mean of L - selected_layer, in [0, K]; 0 for no tokens."""
        return sum(token.depth for token in self.tokens) / max(len(self.tokens), 1)


def trace_generation(model: Any, inputs: dict[str, Tensor], **options: Any) -> Trace:
    """Run `model.generate` on one prompt and note what every step selected.

    Args:
        model: a wrapped model, or what `cdsurgery.export.load` returned.
        inputs: `input_ids` and `attention_mask`, `[1, S]` each.
        options: passed on to `generate`. Greedy decoding and sampling are followed; beams are not, because a beam that
            wins in the end is not the one that was first at every step.

    Returns:
        The new tokens; the prompt is not among them.

    Raises:
        InvalidInputError: the model selects no layers; there are several prompts, beams or answers, or a step is of
            several tokens.
    """
    layers = layers_of(model)
    several = {"prompts": inputs["input_ids"].shape[0]}
    told = options.get("generation_config") or model.generation_config
    for name in ("num_beams", "num_return_sequences"):
        several[name] = options.get(name) or getattr(told, name, None) or 1
    if found := [f"{name}={count}" for name, count in several.items() if count != 1]:
        raise InvalidInputError(f"A trace follows one text, and there are {', '.join(found)}. Trace one at a time.")
    drafting = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
    if found := [name for name in drafting if options.get(name, getattr(told, name, None))]:
        raise InvalidInputError(
            f"A trace follows steps of one token, and with {', '.join(found)} a step has several. Leave it out."
        )
    prompt_length = inputs["input_ids"].shape[1]
    with _observed(model) as steps:
        sequence = model.generate(**inputs, **(options | {"return_dict_in_generate": False}))[0]
    # On a GPU, generate may run a step or two more than the tokens it returns: it checks for the end with a delay.
    new_tokens = sequence[prompt_length:].tolist()
    assert len(steps) >= len(new_tokens)
    return Trace(
        tuple(
            TracedToken(token, final_token, selected, layers - selected, entropy)
            for token, (final_token, selected, entropy) in zip(new_tokens, steps, strict=False)
        )
    )


Step = tuple[int, int, tuple[float, ...]]


@contextmanager
def _observed(model: Any) -> Iterator[list[Step]]:
    """Collect (final token, selected layer, entropies) of the newest position after each forward of `generate`.

    `_update_model_kwargs_for_generation` is the method to which `generate` hands every output; it is there for models
    to override, and the only one that a torch module and another runtime share.
    """
    steps: list[Step] = []
    plain = model._update_model_kwargs_for_generation

    def update(outputs: ConfidentOutput, *args: Any, **kwargs: Any) -> dict[str, Any]:
        steps.append(_newest_step(outputs))
        return plain(outputs, *args, **kwargs)

    model._update_model_kwargs_for_generation = update
    try:
        yield steps
    finally:
        del model._update_model_kwargs_for_generation


def _newest_step(output: ConfidentOutput) -> Step:
    assert output.final_logits is not None and output.selected_layer is not None
    entropy = () if output.entropy is None else tuple(output.entropy[0, -1].tolist())
    # generate takes its argmax in float32: the same ties, the same winner.
    final_token = int(output.final_logits[0, -1].float().argmax())
    return final_token, int(output.selected_layer[0, -1]), entropy
