"""A model -> what ran, in which order, on what: one small forward with every module watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Two rows with a common beginning: a causal model cannot tell them apart before they part.
ROWS, LENGTH, SHARED = 2, 6, 3


@dataclass
class Call:
    """One call of one module: when it began and ended, the state it was given and the state it returned."""

    path: str
    began: int
    ended: int = -1
    given: Tensor | None = None
    returned: Tensor | None = None


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients, with every module's own mode put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """`[2, 6]` token ids spread over the vocabulary, special ones left out, and a mask of ones."""
    embedding: Any = model.get_input_embeddings().weight
    options = vars(model.config) | vars(model.config.get_text_config())
    special = {value for name, value in options.items() if name.endswith("token_id") and isinstance(value, int)}
    wanted = 2 * LENGTH - SHARED
    spread = torch.linspace(0, embedding.shape[0] - 1, wanted + len(special)).long().tolist()
    ordinary = [token for token in spread if token not in special] or [0]
    tokens = [ordinary[i % len(ordinary)] for i in range(wanted)]
    rows = [tokens[:LENGTH], tokens[:SHARED] + tokens[LENGTH:]]
    # Offloaded weights are on the meta device between calls; accelerate then brings the ids to where they run.
    ids = torch.tensor(rows, device="cpu" if embedding.is_meta else embedding.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def record(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[list[Call], Tensor]:
    """Run the model once on `inputs`; return every module call in order of beginning, and the logits `[B, T, V]`."""
    calls: list[Call] = []
    running: list[Call] = []
    ticks = iter(range(1 << 62))

    def enter(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = first_tensor(args) if args else kwargs.get("hidden_states")
            running.append(Call(path, next(ticks), given=given))
            calls.append(running[-1])

        return hook

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        call = running.pop()
        call.ended, call.returned = next(ticks), first_tensor(output)

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path:
                stack.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        logits = plain_logits(model, inputs)
    return calls, logits


def replaced_logits(model: PreTrainedModel, inputs: dict[str, Tensor], path: str, state: Tensor) -> Tensor:
    """The unmodified model's logits when the module at `path` is made to return `state`: the truth for a tail."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        return plain_logits(model, inputs)
    finally:
        handle.remove()


def plain_logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The logits `[B, T, V]` of one forward without a cache."""
    return model(**inputs, use_cache=False, return_dict=True).logits


def first_tensor(value: Any) -> Tensor | None:
    """The state in a layer's arguments or output, which some families hand around in a tuple."""
    if isinstance(value, tuple) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None
