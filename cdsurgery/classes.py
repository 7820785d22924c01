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
        methods["generate"] = _signed(ConfidentHead._generated, plain.generate)
    return _subclass(confident_class, plain, methods)


@functools.cache
def adapter_class(plain: type[Any]) -> type[ConfidentHead]:
    """The class of an adapter (PEFT) around a wrapped model: its forward is its own, the model inside selects."""
    return _subclass(adapter_class, plain, {"forward": plain.forward, "_apply": plain._apply})


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


def _subclass(made_by: Callable[..., Any], plain: type[Any], methods: dict[str, Any]) -> type[ConfidentHead]:
    """`plain` with `ConfidentHead` before it, and these methods."""

    def new(cls: type[Any], *args: Any, **kwargs: Any) -> Any:  # only wrap makes wrapped ones: from_pretrained, plain
        return plain(*args, **kwargs) if args or kwargs else cast(Any, plain).__new__(cls)

    def reduced(self: ConfidentHead, protocol: int) -> tuple[Any, ...]:  # pickle would look for the class by its name
        parts = cast(Any, plain).__reduce_ex__(self, protocol)
        # FSDP derives a class of its own from ours.
        return (_unpickled, (made_by, plain), *parts[2:]) if type(self) is made_by(plain) else parts

    special = {"__new__": new, "__reduce_ex__": reduced, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return cast(type[ConfidentHead], type(plain.__name__, (ConfidentHead, plain), methods | special))


def _unpickled(made_by: Callable[..., type[ConfidentHead]], plain: type[Any]) -> ConfidentHead:
    """An object without a state, which pickle and copy give it then."""
    confident = made_by(plain)
    return confident.__new__(confident)
