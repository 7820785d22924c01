"""A model -> its Anatomy, proven on a probe; or a refusal with the reason.

1. Record one forward of the model.
2. Layers: a module list whose members each run once and in order, each on what the one before it returned.
3. Tail: the modules that lead from the last layer's output, each fed by the one before it, to the unembedding.
4. Transforms: the rows of `LOGIT_TRANSFORMS` that turn the unembedding's output into the model's logits, bitwise.
5. Proof: tail(x^(L)) is the model's logits, and tail(x^(L-1)) is what the model itself returns when its last layer is
   made to return x^(L-1). Both with `torch.equal`; nothing is approximated. Both states at once give the same, because
   the head sends all candidates through the tail in one pass.
6. Causality: rows that share a beginning share its logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdsurgery.anatomy import LOGIT_TRANSFORMS, Anatomy, LogitTransform, tail_logits, transform_value
from cdsurgery.errors import UnsupportedModelError
from cdsurgery.probe import SHARED, Call, at_rest, probe_inputs, record, replaced_logits


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a causal LM and prove them.

    Raises:
        UnsupportedModelError: with what was found and why it does not fit.
    """
    unembedding = _require_causal_lm(model)
    with at_rest(model):
        inputs = probe_inputs(model)
        calls, logits = record(model, inputs)
        layers, tail_calls = _find_path(model, calls, unembedding)
        transforms = _find_transforms(model, tail_calls[-1], logits)
        anatomy = Anatomy(tuple(call.path for call in layers), tuple(call.path for call in tail_calls), transforms)
        _prove(model, anatomy, inputs, layers, logits)
        _prove_causal(model, logits)
    return anatomy


def _require_causal_lm(model: PreTrainedModel) -> str:
    """Return the path of the unembedding, or refuse what cannot have one."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings") or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(
            f"{name} is not a transformers causal LM (no config or no embeddings to ask for). Pass a model loaded with "
            "AutoModelForCausalLM, or a class derived from PreTrainedModel."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder (config.is_encoder_decoder is true). Confident decoding needs a "
            "decoder-only model: one residual stream that ends in the logits."
        )
    # accelerate keeps offloaded weights there too, and hooks that bring each one when its module runs.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not offloaded and any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(f"{name} has weights on the meta device. Load them before wrapping.")
    head = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is head]
    if head is None or not paths:
        raise UnsupportedModelError(
            f"{name} has no language head (get_output_embeddings() returned {head!r}). Load the model with its head, "
            "for example with AutoModelForCausalLM instead of AutoModel."
        )
    return paths[0]


def _find_path(model: PreTrainedModel, calls: list[Call], unembedding: str) -> tuple[list[Call], list[Call]]:
    """The layers' calls and the tail's calls: the outermost chain of layers whose end leads to the unembedding."""
    heads = [call for call in calls if call.path == unembedding]
    if len(heads) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the unembedding '{unembedding}' ran {len(heads)} times in one forward; it must "
            "run once, on the final state."
        )
    found: list[str] = []
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path in sorted(lists, key=lambda path: path.count(".")):
        layers = [call for call in calls if call.path.rpartition(".")[0] == path]
        flaw = _chain_flaw(layers)
        if flaw is None:
            tail, flaw = _find_tail(calls, layers[-1], heads[0])
            if flaw is None:
                return layers, tail
        found.append(f"'{path}' ({flaw})")
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of decoder layers whose last output leads to the unembedding "
        f"'{unembedding}'. Found: {'; '.join(found[:4]) or 'no module list'}. A model with one residual stream through "
        "layers that run once and in order can be wrapped."
    )


def _chain_flaw(layers: list[Call]) -> str | None:
    """Why these calls are not one residual stream, or None where they are."""
    if not layers:
        return "its members never ran"
    indices = [int(call.path.rpartition(".")[2]) for call in layers]
    if indices != list(range(len(layers))):
        return f"its members ran in the order {indices}, not each once and in order"
    for before, after in pairwise(layers):
        if not _same(before.returned, after.given):
            return f"'{after.path}' does not start from what '{before.path}' returned"
    return None


def _find_tail(calls: list[Call], last: Call, head: Call) -> tuple[list[Call], str | None]:
    """Follow the state from the last layer's output to the unembedding; also return why that fails, or None."""
    tail: list[Call] = []
    state, clock = last.returned, last.ended
    for call in calls:
        if clock < call.began and call.ended <= head.ended and _same(call.given, state):
            tail.append(call)
            state, clock = call.returned, call.ended
    if not tail or tail[-1] is not head:
        reached = tail[-1].path if tail else last.path
        return tail, f"after '{reached}' the state is changed by something that is not a module"
    return tail, None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and (a is b or (a.dtype == b.dtype and torch.equal(a, b)))


def _find_transforms(model: PreTrainedModel, head: Call, logits: Tensor) -> tuple[LogitTransform, ...]:
    """The transforms that reproduce the logits from the unembedding's output; the fullest set that does."""
    assert head.returned is not None
    declared = [row for row in LOGIT_TRANSFORMS if transform_value(model, row) is not None]
    for transforms in _subsets(declared):
        z = head.returned
        for row in transforms:
            value = transform_value(model, row)
            assert value is not None
            z = row.apply(z, value)
        if _same(z, logits):
            return transforms
    raise UnsupportedModelError(
        f"{type(model).__name__}: what '{head.path}' returns is not what the model returns, and no combination of the "
        f"declared transforms explains it (declared: {', '.join(row.option for row in declared) or 'none'}; known: "
        f"{', '.join(row.option for row in LOGIT_TRANSFORMS)})."
    )


def _subsets(rows: list[LogitTransform]) -> Iterator[tuple[LogitTransform, ...]]:
    for size in range(len(rows), -1, -1):
        yield from combinations(rows, size)


def _prove(
    model: PreTrainedModel, anatomy: Anatomy, inputs: dict[str, Tensor], layers: list[Call], logits: Tensor
) -> None:
    last = layers[-1]
    assert last.returned is not None and last.given is not None
    replaced = replaced_logits(model, inputs, last.path, last.given)
    for state, truth, name in ((last.returned, logits, "x^(L)"), (last.given, replaced, "x^(L-1)")):
        ours = _applied(model, anatomy, state)
        if not _same(ours, truth):
            apart = (ours.float() - truth.float()).abs().max().item() if ours.shape == truth.shape else float("nan")
            raise UnsupportedModelError(
                f"{type(model).__name__}: the tail {' -> '.join(anatomy.tail)} does not reproduce the model's logits "
                f"from {name} (largest difference {apart:.3g}). Something between the layers and the logits is not in "
                "it, so wrapping would change results."
            )
    together = _applied(model, anatomy, torch.stack([last.returned, last.given]))
    if not _near(together, torch.stack([logits, replaced])):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the tail {' -> '.join(anatomy.tail)} mixes the rows of a batch: it gives a state "
            "other logits in company than alone, so candidates cannot be compared."
        )


def _applied(model: PreTrainedModel, anatomy: Anatomy, state: Tensor) -> Tensor:
    try:
        return tail_logits(model, anatomy, state)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the tail {' -> '.join(anatomy.tail)} cannot be run by itself on a state of shape "
            f"{list(state.shape)} ({type(error).__name__}: {error}). Each of its modules must take one tensor of any "
            "leading dimensions."
        ) from error


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for the last digits of a matrix product, which rows move by standing elsewhere in a batch."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


def _prove_causal(model: PreTrainedModel, logits: Tensor) -> None:
    one, other = logits[0, :SHARED].float(), logits[1, :SHARED].float()
    # What a later token does to an earlier one is as large as the logits themselves.
    if not _near(one, other):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not causal: later tokens change the logits of earlier positions (largest "
            f"difference {(one - other).abs().max().item():.3g}). Confident decoding needs a model that reads left to "
            "right; some encoders do with config.is_decoder=True."
        )
