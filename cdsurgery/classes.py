"""A plain class -> the class of its wrapped models, and back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from cdsurgery.head import ConfidentHead


@functools.cache
def confident_class(plain: type[Any]) -> type[ConfidentHead]:
    """The class of a wrapped `plain`: both a `ConfidentHead` and a `plain`, under the plain class's name.

    The name stays because transformers goes by it: `save_pretrained` writes it into the config, pipelines look it up.
    Methods keep their signatures because `generate` and `torch.export` read them.
    """
    methods = {"forward": _signed(ConfidentHead.forward, plain.forward)}
    if hasattr(plain, "prepare_inputs_for_generation"):  # it can generate
        prepare = plain.prepare_inputs_for_generation
        methods["prepare_inputs_for_generation"] = _signed(ConfidentHead._prepared_inputs, prepare)
    return _subclass(plain, methods)


@functools.cache
def adapter_class(plain: type[Any]) -> type[ConfidentHead]:
    """The class of an adapter (PEFT) around a wrapped model: its forward is its own, the model inside selects."""
    return _subclass(plain, {"forward": plain.forward, "_apply": plain._apply})


def plain_class(confident: type[ConfidentHead]) -> type[Any]:
    """The class a wrapped model had before."""
    return confident.__bases__[1]


def _signed(ours: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """The method `ours` under the name and the signature of the plain class's `own`."""

    @functools.wraps(own)
    def method(self: ConfidentHead, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    # Tools that undo decorators by following `__wrapped__` (accelerate's unwrap_model) would end at the plain forward.
    del method.__wrapped__
    method.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return method


def _subclass(plain: type[Any], methods: dict[str, Callable[..., Any]]) -> type[ConfidentHead]:
    body = methods | {"__module__": plain.__module__, "__doc__": plain.__doc__}
    return cast(type[ConfidentHead], type(plain.__name__, (ConfidentHead, plain), body))
