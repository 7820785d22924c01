"""A model -> its Anatomy, proven on a probe; or a refusal with the reason.

1. What cannot be one at all is refused: no transformers model, an encoder-decoder, weights that are not there.
2. One forward is recorded. Causality: rows that share a beginning share its logits there.
3. `search` follows the state from the layers to the logits, unless the anatomy was given.
4. Proof: tail(x^(L)) is the model's logits, and tail(x^(L-1)) is what the model itself returns when its last layer is
   made to return x^(L-1). Both with `torch.equal`; nothing is approximated. Both states at once give the same, because
   the head sends all candidates through the tail in one pass.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdsurgery.anatomy import Anatomy, candidate_logits, tail_logits
from cdsurgery.errors import InvalidInputError, UnsupportedModelError
from cdsurgery.probe import SHARED, Call, at_rest, probe_inputs, record, replaced_logits, vocabulary
from cdsurgery.search import chain_flaw, find_anatomy
from cdsurgery.states import same
from cdsurgery.transforms import declared_transforms


def proven_anatomy(model: PreTrainedModel, given: Anatomy | None = None) -> Anatomy:
    """Find the parts of a causal LM, or take the ones given, and prove them.

    Raises:
        InvalidInputError: the given anatomy names parts that the model does not have.
        UnsupportedModelError: with what was found and why it does not fit.
    """
    _require_decoder(model)
    if given is not None:
        _require_parts(model, given)
    # Uncompiled: the hooks of a probe would be compiled into a model that is, which may take for ever.
    with at_rest(model), torch.compiler.set_stance("force_eager"):
        inputs = probe_inputs(model)
        calls, logits = record(model, inputs)
        _require_numbers(model, logits)
        _require_whole(model, calls)
        _require_causal(model, logits)
        replaced = functools.partial(replaced_logits, model, inputs, calls)
        _require_vocabulary(model, logits)
        anatomy = given or find_anatomy(model, calls, logits, replaced)
        _require_depth(model, anatomy)
        layers = [call for call in calls if call.path in anatomy.layers]
        if given is not None:
            _require_chain(model, given, layers)
        before, last = layers[-2:]
        assert before.returned is not None and last.returned is not None
        _prove(model, anatomy, last.returned, before.returned, logits, replaced(last.path, before.returned))
    return anatomy


def _require_decoder(model: PreTrainedModel) -> None:
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
    reason = NOT_DECODERS.get(config.model_type)
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}")
    heads = model.get_output_embeddings()
    if isinstance(heads, nn.ModuleList):
        raise UnsupportedModelError(
            f"{name} has {len(heads)} language heads, one for each of its streams of tokens. Confident decoding needs "
            "a model with one, and one row of logits for each token."
        )
    # accelerate keeps offloaded weights there too, and hooks that bring each one when its module runs.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not offloaded and any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(f"{name} has weights on the meta device. Load them before wrapping.")


# What no probe on text shows: model type -> why it does not fit, with the line.
NOT_DECODERS = {
    "git": "puts the patches of an image before the text, in rows that input_ids do not have "
    "(https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/git/modeling_git.py#L831-L832): "
    "its logits have more positions than the ids, labels and draws of what it is given. Confident decoding needs a "
    "model with one row of logits for each token.",
}


def _require_parts(model: PreTrainedModel, anatomy: Anatomy) -> None:
    paths = {path for path, _ in model.named_modules()}
    missing = [path for path in (*anatomy.layers, *anatomy.modules) if path not in paths]
    if missing or not anatomy.layers or not anatomy.modules:
        raise InvalidInputError(
            f"The anatomy given for {type(model).__name__} names {missing or 'no layers or no modules of a tail'}. "
            "Layers and tail need the paths of modules, as model.named_modules() lists them; the last of the tail's is "
            "the unembedding."
        )


def _require_numbers(model: PreTrainedModel, logits: Tensor) -> None:
    if logits.isnan().any():
        raise UnsupportedModelError(
            f"{type(model).__name__}: its logits on a few tokens are NaN in {model.dtype}, so nothing can be proven. "
            "Its weights are broken, or its numbers are too large for this dtype: try bfloat16 or float32."
        )


def _require_causal(model: PreTrainedModel, logits: Tensor) -> None:
    one, other = logits[0, :SHARED].float(), logits[1, :SHARED].float()
    # What a later token does to an earlier one is as large as the logits themselves.
    if not _near(one, other):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not causal: later tokens change the logits of earlier positions (largest "
            f"difference {(one - other).abs().max().item():.3g}). Confident decoding needs a model that reads left to "
            "right; some encoders do with config.is_decoder=True."
        )


def _require_whole(model: PreTrainedModel, calls: list[Call]) -> None:
    ran = {call.path for call in calls}
    for path, _ in model.named_modules():
        waits = path.rpartition(".")[2] in CROSS_ATTENTIONS and path not in ran
        if waits and any(name.startswith("encoder_") for name in inspect.signature(model.forward).parameters):
            raise UnsupportedModelError(
                f"{type(model).__name__} is the decoder of an encoder-decoder: '{path}' ran on no text, it attends to "
                "the states of an encoder that is not there. Confident decoding needs a model with one residual "
                "stream, made from the text alone."
            )


# What families call the part of a decoder layer that attends to an encoder.
CROSS_ATTENTIONS = {"encoder_attn", "cross_attn", "crossattention"}


def _require_depth(model: PreTrainedModel, anatomy: Anatomy) -> None:
    if len(anatomy.layers) < 2:
        raise UnsupportedModelError(f"{type(model).__name__} has one decoder layer: there is none to look back to.")


def _require_chain(model: PreTrainedModel, given: Anatomy, layers: list[Call]) -> None:
    flaw = chain_flaw(model, layers, given.layers, declared_transforms(model) + list(given.transforms))
    if flaw is None and len(layers) < len(given.layers):
        flaw = f"of {len(given.layers)} {len(layers)} ran"
    if flaw is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the layers of the anatomy given are not one residual stream: {flaw}. Layers run "
            "once, in order, each on what the one before it returned."
        )


def _require_vocabulary(model: PreTrainedModel, logits: Tensor) -> None:
    """Where the model does not say which module its head is, logits have to be as many as tokens."""
    if model.get_output_embeddings() is None and logits.shape[-1] != vocabulary(model)[0]:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language head: get_output_embeddings() is None, and it returns "
            f"{logits.shape[-1]} numbers a position for a vocabulary of {vocabulary(model)[0]}. Load the model with "
            "its head, for example with AutoModelForCausalLM."
        )


def _prove(
    model: PreTrainedModel, anatomy: Anatomy, last: Tensor, before: Tensor, logits: Tensor, replaced: Tensor
) -> None:
    name = type(model).__name__
    for state, truth, symbol in ((last, logits, "x^(L)"), (before, replaced, "x^(L-1)")):
        try:
            ours = tail_logits(model, anatomy, state)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise UnsupportedModelError(
                f"{name}: the tail {anatomy} cannot be run by itself on a state of shape {list(state.shape)} "
                f"({type(error).__name__}: {error}). Each of its modules must take the state and nothing else."
            ) from error
        if not same(ours, truth):
            apart = (ours.float() - truth.float()).abs().max().item() if ours.shape == truth.shape else float("nan")
            raise UnsupportedModelError(
                f"{name}: the tail {anatomy} does not reproduce the model's logits from {symbol} (largest difference "
                f"{apart:.3g}). Something between the layers and the logits is not in it, so wrapping would change "
                "results."
            )
    try:
        together = candidate_logits(model, anatomy, [last, before])
    except (RuntimeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{name}: its states of shape {list(last.shape)} do not go through its tail side by side as a batch on "
            f"axis {anatomy.batch_axis} ({type(error).__name__}: {error}). That axis is Anatomy.batch_axis."
        ) from error
    if not _near(together, torch.stack([logits, replaced])):
        raise UnsupportedModelError(
            f"{name}: the tail {anatomy} mixes the rows of a batch: it gives a state other logits in company than "
            "alone, so candidates cannot be compared."
        )


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for the last digits of a matrix product, which rows move by standing elsewhere in a batch."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))
