"""How a model is to be served -> options checked once: where, how many at a time, within which limits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from cdsurgery.errors import InvalidInputError

Kind = Literal["cpu", "gpu"]
Step = Literal["onnxruntime", "tensorrt"]
Providers = Literal["tensorrt"]

# What each number may be at least.
_LEAST = {"version": 1, "instances": 1, "slots": 1, "chunk": 1, "queue": 0, "max_tokens": 1, "threads": 0}


@dataclass(frozen=True)
class ServingOptions:
    """What `to_triton` can be asked for.

    Attributes:
        version: the number of the version folder.
        kind: "cpu" or "gpu".
        instances: processes with a copy of the model each, per GPU if there are several.
        gpus: indices of the GPUs; empty leaves the choice to Triton, which takes all.
        slots: requests that decode at the same time in an instance.
        chunk: prompt tokens taken in between two steps of the running requests.
        queue: requests that may wait for a slot.
        queue_timeout_seconds: a request that has waited so long gets an error; None for never.
        request_timeout_seconds: so does one that has not ended after so long; None for never.
        max_tokens: of an answer whose request names none.
        context: tokens of prompt and answer together; None for what the model's config says.
        threads: of ONNX Runtime in an instance; 0 for one a core.
        providers: "tensorrt" for ONNX Runtime's TensorRT provider, with kind="gpu"; None for CUDA there, else the CPU.
        cache: an absolute path on the server's machine where TensorRT keeps engines and timings, so that the next start
            is quick; None keeps nothing.
        warm_up: whether Triton sends a first request before it says that the model is ready; not with `bls`, through
            which no model runs before the whole server is ready.
        rate_limit: resources that an instance holds while it runs, name -> count, for Triton's rate limiter.
        unary: also write NAME_unary, which answers KServe's unary requests: a decoupled model such as NAME takes none.
        step: also write NAME_step, the bare graph, for this backend of Triton, of which "tensorrt" runs with kind="gpu"
            alone; None for no such model.
        bls: run the graph through NAME_step and not in the process of NAME.
    """

    version: int = 1
    kind: Kind = "cpu"
    instances: int = 1
    gpus: tuple[int, ...] = ()
    slots: int = 32
    chunk: int = 128
    queue: int = 256
    queue_timeout_seconds: float | None = 60.0
    request_timeout_seconds: float | None = None
    max_tokens: int = 16
    context: int | None = None
    threads: int = 0
    providers: Providers | None = None
    cache: str | os.PathLike[str] | None = None
    warm_up: bool = True
    rate_limit: Mapping[str, int] = field(default_factory=dict)
    unary: bool = True
    step: Step | None = None
    bls: bool = False

    def __post_init__(self) -> None:
        kinds = (
            ("kind", get_args(Kind)),
            ("providers", (None, *get_args(Providers))),
            ("step", (None, *get_args(Step))),
        )
        for name, allowed in kinds:
            if getattr(self, name) not in allowed:
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, allowed))}."
                )
        for name, least in _LEAST.items():
            _check_count(name, getattr(self, name), least)
        for name in ("queue_timeout_seconds", "request_timeout_seconds"):
            seconds = getattr(self, name)
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if seconds is not None and not (number and 0 < seconds < math.inf):
                raise InvalidInputError(f"{name} is {seconds!r}; it must be a number of seconds above 0, or None.")
        if self.context is not None:
            _check_count("context", self.context, 2)
        if not isinstance(self.gpus, (tuple, list)):
            raise InvalidInputError(f"gpus is {self.gpus!r}; it must be a tuple of the GPUs' indices, such as (0,).")
        for index in self.gpus:
            _check_count("gpus", index, 0)
        for resource, count in self.rate_limit.items():
            _check_count(f"rate_limit[{resource!r}]", count, 1)
        if self.gpus and self.kind != "gpu":
            raise InvalidInputError(f"gpus is {list(self.gpus)} and kind is {self.kind!r}. Ask for kind='gpu'.")
        if self.step == "tensorrt" and self.kind != "gpu":
            raise InvalidInputError(f"step is 'tensorrt' and kind is {self.kind!r}. It runs on a GPU: kind='gpu'.")
        if self.bls and self.step is None:
            raise InvalidInputError("bls runs the graph through NAME_step: say for which backend with step.")
        if self.providers is not None and (self.kind != "gpu" or self.bls):
            raise InvalidInputError(
                f"providers is {self.providers!r}, kind is {self.kind!r} and bls is {self.bls}. TensorRT in the "
                "model's process needs kind='gpu' and no bls."
            )
        if self.cache is not None and (self.providers is None or not os.path.isabs(self.cache)):
            raise InvalidInputError(
                f"cache is {os.fspath(self.cache)!r}; it must be an absolute path on the server's machine, and it is "
                "for providers='tensorrt'."
            )

    @property
    def first_request(self) -> bool:
        """Whether Triton sends one."""
        return self.warm_up and not self.bls


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
