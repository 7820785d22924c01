"""Decode steps at addresses that do not move -> CUDA graphs, replayed.

A captured graph reads and writes fixed addresses, and its shapes are fixed too. So the cache alternates between two
memories of the largest size: a step with P tokens in the cache reads side P mod 2 and writes the other, and the graph
of a batch and a P serves every text that comes to that length. Nothing of the cache is copied from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.runtime.lengths import shape_of
from cdsurgery.export.signature import BATCH, PAST, Signature, TensorSpec, torch_dtype
from cdsurgery.export.tensorrt.profiles import Profile

Ready = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Callable[[], None]]

GRAPHS = 4096  # captured graphs at most; a new one takes the place of the oldest


class PingPong:
    """Two memories for a cache, one to read and one to write.

    Args:
        signature: of the graph, whose past and present tensors it holds.
        lengths: the largest size of every axis.
        device: where.
    """

    def __init__(self, signature: Signature, lengths: Mapping[str, int], device: torch.device) -> None:
        self._signature = signature
        self._sides = [Arena(signature.present, lengths, device) for _ in range(2)]
        self._latest: dict[str, Tensor] = {}  # what was written last, by the name of the input that reads it

    def check(self, feed: Mapping[str, Tensor]) -> None:
        """Refuse a cache that lies in these memories and is not what was written last.

        Another text of the same batch and length has the same addresses, so the tensors themselves are compared.

        Raises:
            InvalidInputError: they are of an earlier step, whose memory has been overwritten.
        """
        for spec in self._signature.past:
            given = feed[spec.name]
            ours = given.numel() and any(side.holds(given) for side in self._sides)
            if ours and given is not self._latest.get(spec.name):
                raise InvalidInputError(
                    "past_key_values are of an earlier step, and with cuda_graphs=True a later run has overwritten "
                    "them. Continue from the last one, or load the engine without cuda_graphs."
                )

    def read(self, feed: Mapping[str, Tensor], lengths: Mapping[str, int]) -> dict[str, Tensor]:
        """The past tensors of a step, checked, at their fixed addresses: copied there unless they are there already."""
        side = self._sides[lengths[PAST] % 2]
        views = {}
        for spec, wanted in zip(self._signature.past, self._signature.present, strict=True):
            views[spec.name] = view = side.view(wanted.name, shape_of(spec.axes, lengths))
            if feed[spec.name] is not self._latest.get(spec.name):
                view.copy_(feed[spec.name])
        return views

    def write(self, lengths: Mapping[str, int]) -> dict[str, Tensor]:
        """The present tensors of the same step, on the other side."""
        side = self._sides[1 - lengths[PAST] % 2]
        pairs = list(zip(self._signature.past, self._signature.present, strict=True))
        self._latest = {past.name: side.view(spec.name, shape_of(spec.axes, lengths)) for past, spec in pairs}
        return {spec.name: self._latest[past.name] for past, spec in pairs}


class Arena:
    """Memory for some tensors, each at an address that stays whatever its shape.

    Args:
        specs: the tensors.
        lengths: the largest size of every axis.
        device: where.
    """

    def __init__(self, specs: Sequence[TensorSpec], lengths: Mapping[str, int], device: torch.device) -> None:
        self._memory = {
            spec.name: torch.zeros(math.prod(shape_of(spec.axes, lengths)), dtype=torch_dtype(spec), device=device)
            for spec in specs
        }
        self._addresses = {memory.untyped_storage().data_ptr() for memory in self._memory.values()}

    def view(self, name: str, shape: Sequence[int]) -> Tensor:
        """The first elements of a tensor's memory, as a tensor of this shape."""
        return self._memory[name][: math.prod(shape)].view(*shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        return tensor.untyped_storage().data_ptr() in self._addresses


class DecodeSteps:
    """Runs decode steps at fixed addresses.

    Args:
        signature: of the engine.
        profile: its decode profile, whose largest sizes the memory has.
        device: where.
    """

    def __init__(self, signature: Signature, profile: Profile, device: torch.device) -> None:
        largest = profile.largest()
        self._signature, self._device = signature, device
        self._cache = PingPong(signature, largest, device)
        self._tokens = Arena(signature.tokens, largest, device)
        self._results = Arena(signature.results, largest, device)
        self._graphs: dict[tuple[int, int], tuple[Any, Callable[[], None]]] = {}

    def check(self, feed: Mapping[str, Tensor]) -> None:
        """Refuse a cache that later steps have overwritten; for runs of other profiles, which read it too."""
        self._cache.check(feed)

    def run(
        self, feed: Mapping[str, Tensor], lengths: Mapping[str, int], stream: torch.cuda.Stream, ready: Ready
    ) -> dict[str, Tensor]:
        """Run one step on the stream; `ready` takes inputs and outputs and returns what hands them to the GPU.

        Returns:
            Results of their own, and the cache in memory that the step after the next overwrites.

        Raises:
            InvalidInputError: the cache has been overwritten.
            ArtifactError: TensorRT refuses to run, or to be captured.
        """
        inputs, outputs = self.bound(feed, lengths)
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        key = (lengths[BATCH], lengths[PAST])
        with torch.cuda.stream(stream):
            if key in self._graphs:
                self._graphs[key][0].replay()
            else:
                execute = ready(inputs, outputs)
                execute()  # which settles what TensorRT does once for a shape
                self._graphs[key] = captured(execute), execute  # which holds what the graph works with
                while len(self._graphs) > GRAPHS:
                    self._graphs.pop(next(iter(self._graphs)))
        current.wait_stream(stream)
        own = {spec.name: outputs[spec.name].clone() for spec in self._signature.results}
        return {name: own.get(name, tensor) for name, tensor in outputs.items()}

    def bound(
        self, feed: Mapping[str, Tensor], lengths: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and outputs of a step at their fixed addresses, the inputs filled."""
        self.check(feed)
        inputs = self._cache.read(feed, lengths)
        for spec in self._signature.tokens:
            inputs[spec.name] = self._tokens.view(spec.name, shape_of(spec.axes, lengths))
            inputs[spec.name].copy_(feed[spec.name])
        results = {
            spec.name: self._results.view(spec.name, shape_of(spec.axes, lengths)) for spec in self._signature.results
        }
        return inputs, results | self._cache.write(lengths)


def captured(execute: Callable[[], None]) -> Any:
    """What `execute` puts on the current stream, as a CUDA graph.

    Raises:
        ArtifactError: it does what a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        execute()
        graph.capture_end()
    except (ArtifactError, RuntimeError) as error:
        with suppress(RuntimeError):  # the stream must not stay in a capture that failed
            graph.capture_end()
        raise ArtifactError(
            "A decode step of this engine cannot be captured as a CUDA graph; loops, as of linear attention, cannot. "
            f"Load it without cuda_graphs. {error}"
        ) from error
    return graph
