"""A causal LM -> the same object, wrapped; and back."""

from __future__ import annotations

import inspect
import os
from typing import Any, TypeVar

from torch import nn

from cdsurgery.anatomy import Anatomy
from cdsurgery.classes import adapter_class, confident_class, plain_class
from cdsurgery.config import DEFAULT_LOOKBACK, ConfidentConfig
from cdsurgery.errors import InvalidInputError, SurgeryError, UnsupportedModelError
from cdsurgery.head import ConfidentHead
from cdsurgery.joint_norm import JointNorm
from cdsurgery.loading import load_causal_lm
from cdsurgery.one_pass import close_, open_
from cdsurgery.probe import taken
from cdsurgery.proof import proven_anatomy
from cdsurgery.taps import Taps

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: nn.Module | str | os.PathLike[str],
    *,
    lookback: int | float = DEFAULT_LOOKBACK,
    probability: float = 1.0,
    seed: int | None = None,
    measure: str = "entropy",
    scan: str = "auto",
    anatomy: Anatomy | None = None,
) -> ConfidentHead:
    """Make a causal LM decode from its most confident near-final layer.

    The model is changed in place and returned: it stays an instance of its own class with its own parameters, and is a
    `ConfidentHead` too. Before that it is proven, on a probe, that its logits can be reproduced bit for bit from the
    states of its layers.

    Args:
        model: a loaded causal LM, or a local folder or Hub id to load it from.
        lookback: K, the most layers to look back; or a float in (0, 1], a share of the depth.
        probability: in [0, 1], the share of rows that may leave the final layer.
        seed: for 0 < probability < 1; None draws one from torch's global generator.
        measure: "entropy", or "log_p_squared" as in the authors' published overlay.
        scan: "full" for the entropies of all candidates, "lazy" for those alone that decide; "auto" is "full", but
            inside of `generate` the cheaper of the two. "fused" is quicker, as the final layer and the first
            candidates share a reading of the unembedding: on a GPU by a kernel in Triton's language, on a CPU in
            float32 by oneDNN. Its final logits are sums in another order than the model's own, equal but for rounding.
        anatomy: where the layers and the tail are, for a model in which they are not found; proven all the same.

    Returns:
        The same object.

    Raises:
        InvalidInputError: an option is out of range, or the anatomy names parts that the model does not have.
        UnsupportedModelError: the model cannot be proven to fit, or is what `torch.compile` returned; or scan is
            "fused" and its head is not a plain one.
        SurgeryError: the model is wrapped already.
    """
    config = ConfidentConfig(lookback, probability, seed, measure, scan)
    if not (anatomy is None or isinstance(anatomy, Anatomy)):
        raise InvalidInputError(f"anatomy is a {type(anatomy).__name__}; it must be a cdsurgery.Anatomy, or None.")
    if not isinstance(model, nn.Module):
        if not isinstance(model, (str, os.PathLike)):
            raise InvalidInputError(
                f"model is a {type(model).__name__}; it must be a causal LM, or the folder or Hub id of one."
            )
        model = load_causal_lm(model)
    if hasattr(model, "_orig_mod"):  # what torch.compile puts around a model, whose forward takes anything
        raise UnsupportedModelError(
            f"This {type(model).__name__} is a compiled model. Wrap first and compile then: "
            "torch.compile(cdsurgery.wrap(model)), or model.compile() on the wrapped one."
        )
    host = adapted_model(model)
    if isinstance(host, ConfidentHead):
        raise SurgeryError(
            f"This {type(model).__name__} is wrapped already, with {host.confident}. To change the options, unwrap it "
            "with cdsurgery.unwrap(model) and wrap it again."
        )
    anatomy = proven_anatomy(host, anatomy)
    depth = len(anatomy.layers)
    config = config.resolve(depth)
    norm = open_(host, anatomy) if config.scan == "fused" else None
    candidates = [host.get_submodule(path) for path in anatomy.layers[depth - 2 :: -1][: int(config.lookback)]]
    operate_(host, config, anatomy, Taps(candidates, anatomy.batch_axis), norm)
    if host is not model:
        model.__class__ = adapter_class(type(model))  # type: ignore[arg-type]  # a class is hashable
    return model  # type: ignore[return-value]  # its class has just become one


def unwrap(model: Model) -> Model:
    """Give back the model as it was before `wrap`: the same object, with the same parameters.

    Raises:
        SurgeryError: the model is not wrapped, or something has been put over the wrapped forward since.
    """
    host = adapted_model(model)
    if not isinstance(host, ConfidentHead):
        raise SurgeryError(f"This {type(model).__name__} is not wrapped; only what cdsurgery.wrap returned can be.")
    norm = host._norm
    restore_(host)
    close_(host, norm)
    if isinstance(model, ConfidentHead):  # an adapter that was wrapped, and not put around a wrapped model
        model.__class__ = plain_class(type(model))
    return model


def adapted_model(model: Any) -> Any:
    """The causal LM that decodes: what a PEFT model adapts, since its `generate` calls that one; else the model."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def layers_of(model: Any) -> int:
    """L of a wrapped model, of an adapter around one, or of what `cdsurgery.export.load` returned.

    Raises:
        InvalidInputError: it is none of these.
    """
    host = adapted_model(model)
    if isinstance(host, ConfidentHead):
        return len(host.anatomy.layers)
    manifest = getattr(host, "manifest", None)
    if manifest is None:
        raise InvalidInputError(
            f"This {type(model).__name__} selects no layers. Give what cdsurgery.wrap or cdsurgery.export.load has "
            "returned."
        )
    return int(manifest.layers)


def operate_(model: Any, config: ConfidentConfig, anatomy: Anatomy, taps: Taps, norm: JointNorm | None) -> None:
    """Turn `model` into a `ConfidentHead`, in place."""
    plain = type(model)
    parameters = inspect.signature(plain.forward).parameters.values()
    # accelerate puts a `forward` on the instance, which would hide the one of our class: it is run inside ours.
    placed_forward = model.__dict__.pop("forward", None)
    model.__class__ = confident_class(plain)  # type: ignore[arg-type]  # a class is hashable
    model.confident, model.anatomy = config, anatomy
    model._taps, model._norm, model._placed_forward = taps, norm, placed_forward
    model._argument_names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]
    model._as_dict = taken(plain.forward, {"return_dict": True})


def restore_(model: Any) -> None:
    """Undo `operate_`, in place.

    Raises:
        SurgeryError: another forward has been placed on the instance since, around ours: it would call what is gone.
    """
    forward = model.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(model).forward:
        raise SurgeryError(
            f"A forward was put on this {type(model).__name__} after it was wrapped. Remove it first: del "
            "model.forward, or, where accelerate put it there, accelerate.hooks.remove_hook_from_module(model, "
            "recurse=True)."
        )
    model.__dict__.pop("forward", None)  # ours, which accelerate leaves on the instance when it takes its own off
    model._taps.remove()
    placed_forward = model._placed_forward
    for name in ("confident", "anatomy", "_taps", "_norm", "_placed_forward", "_argument_names", "_as_dict"):
        delattr(model, name)
    model.__class__ = plain_class(type(model))
    if placed_forward is not None:
        model.forward = placed_forward
