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
    The forward keeps its signature because `generate` and `torch.export` read it.
    """

    @functools.wraps(plain.forward)
    def forward(self: ConfidentHead, *args: Any, **kwargs: Any) -> Any:
        return ConfidentHead.forward(self, *args, **kwargs)

    # Tools that undo decorators by following `__wrapped__` (accelerate's unwrap_model) would end at the plain forward.
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]
    return _subclass(plain, forward)


@functools.cache
def adapter_class(plain: type[Any]) -> type[ConfidentHead]:
    """The class of an adapter (PEFT) around a wrapped model: its forward is its own, the model inside selects."""
    return _subclass(plain, plain.forward)


def plain_class(confident: type[ConfidentHead]) -> type[Any]:
    """The class a wrapped model had before."""
    return confident.__bases__[1]


def _subclass(plain: type[Any], forward: Callable[..., Any]) -> type[ConfidentHead]:
    body = {"forward": forward, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return cast(type[ConfidentHead], type(plain.__name__, (ConfidentHead, plain), body))
