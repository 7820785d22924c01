"""A model -> what ran, in which order, on what: one small forward with every module watched."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdsurgery.errors import UnsupportedModelError
from cdsurgery.states import state_given, state_of, with_state

# Two rows with a common beginning: a causal model cannot tell them apart before they part.
ROWS, LENGTH, SHARED = 2, 6, 3


@dataclass
class Call:
    """One call of one module.

    Attributes:
        began, ended: on one clock.
        given: the state among its arguments.
        beside: the other tensors among them.
        output: what it returned.
    """

    path: str
    began: int
    given: Tensor | None
    beside: tuple[Tensor, ...]
    ended: int = -1
    output: Any = None

    @property
    def returned(self) -> Tensor | None:
        """The state in its output."""
        return state_of(self.output)


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
    size, device = vocabulary(model)
    options = vars(model.config) | vars(model.config.get_text_config())
    special = {value for name, value in options.items() if "token_i" in name and isinstance(value, int)}
    wanted = 2 * LENGTH - SHARED
    spread = torch.linspace(0, size - 1, wanted + len(special)).long().tolist()
    ordinary = [token for token in spread if token not in special] or [0]
    tokens = [ordinary[i % len(ordinary)] for i in range(wanted)]
    rows = [tokens[:LENGTH], tokens[:SHARED] + tokens[LENGTH:]]
    ids = torch.tensor(rows, device=device)
    return taken(model.forward, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def vocabulary(model: PreTrainedModel) -> tuple[int, torch.device]:
    """How many tokens the model can be given, and where it takes them."""
    try:
        embedding = next(model.get_input_embeddings().parameters())
        size = embedding.shape[0]
    except (NotImplementedError, AttributeError):  # a class of one's own need not say where its embedding is
        embedding, size = next(model.parameters()), model.config.get_text_config().vocab_size
    # Offloaded weights are on the meta device between calls; accelerate then brings the ids to where they run.
    return size, torch.device("cpu") if embedding.is_meta else embedding.device


def taken(forward: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of the inputs that a forward has a parameter for."""
    parameters = inspect.signature(forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def record(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[list[Call], Tensor]:
    """Run the model once on `inputs`; return every module call in order of beginning, and the logits `[B, T, V]`.

    Raises:
        UnsupportedModelError: as `plain_logits` does.
    """
    calls: list[Call] = []
    running: list[Call] = []
    ticks = iter(range(1 << 62))

    def enter(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = state_given(args, kwargs)
            tensors = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            running.append(Call(path, next(ticks), given, tuple(value for value in tensors if value is not given)))
            calls.append(running[-1])

        return hook

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        call = running.pop()
        call.ended, call.output = next(ticks), output

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path:
                stack.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        logits = plain_logits(model, inputs)
    return calls, logits


def replaced_logits(
    model: PreTrainedModel, inputs: dict[str, Tensor], calls: list[Call], path: str, state: Tensor
) -> Tensor:
    """The unmodified model's logits when the module at `path` is made to return `state`: the truth for a tail.

    What ended before it would end as it did, so its recorded output is taken: on a CPU the layers of a large model are
    nearly all of the time.

    Args:
        state: `[.., B, T, ..]`, as that module returned one.

    Returns:
        `[B, T, V]`.
    """
    target = next(call for call in calls if call.path == path)
    with ExitStack() as stack:
        for call in _done_until(calls, target):
            output = with_state(call.output, state) if call is target else call.output
            stack.enter_context(_standing_in(model.get_submodule(call.path), output))
        return plain_logits(model, inputs)


def _done_until(calls: list[Call], target: Call) -> Iterator[Call]:
    """The outermost calls that had ended when that one did, of modules that were called but once."""
    times, until = Counter(call.path for call in calls), -1
    for call in calls:
        if until < call.began and call.ended <= target.ended and times[call.path] == 1:
            until = call.ended
            yield call


@contextmanager
def _standing_in(module: nn.Module, output: Any) -> Iterator[None]:
    """Have a module return `output` without running. accelerate too places a forward on instances, so it is kept."""
    own = vars(module)
    placed = own.get("forward")
    own["forward"] = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del own["forward"]
        if placed is not None:
            own["forward"] = placed


def plain_logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The logits `[B, T, V]` of one forward without a cache.

    Raises:
        UnsupportedModelError: it fails on token ids, or returns nothing of that shape.
    """
    name = type(model).__name__
    try:
        output = model(**inputs, **taken(model.forward, {"use_cache": False, "return_dict": True}))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{name} does not run on token ids alone ({type(error).__name__}: {error}). Confident decoding needs a "
            "model that reads text by itself; a drafter, or a part of a larger model, decodes together with that one."
        ) from error
    logits = getattr(output, "logits", None)
    rows = tuple(inputs["input_ids"].shape)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != rows:
        found = "no logits" if logits is None else f"logits of shape {list(getattr(logits, 'shape', []))}"
        raise UnsupportedModelError(
            f"{name} has no language head: for ids of shape {list(rows)} it returned a {type(output).__name__} with "
            f"{found}; needed are logits [batch, length, vocabulary]. Load the model with its head, for example with "
            "AutoModelForCausalLM instead of AutoModel."
        )
    return logits
