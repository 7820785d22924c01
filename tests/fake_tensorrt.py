"""A TensorRT that runs engines without a GPU: the rules of its runtime, and ONNX Runtime behind them.

Rules are those of NvInferRuntime.h and of TensorRT's documentation on CUDA graphs: every tensor has an aligned address,
shapes lie in the profile, contexts have memory and a stream, whose device is the current one when they run, and a graph
holds as long as its context is not changed. Memory is that of tensors on the CPU, found by its address, as a GPU would.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from cdsurgery.export.tensorrt import session
from cdsurgery.export.tensorrt.manifest import EngineManifest, read_engine_manifest
from cdsurgery.export.tensorrt.package import import_tensorrt

ALIGNMENT = 64  # of PyTorch's memory on the CPU; on a GPU it is 512
STREAM = 7


class Context:
    """An `IExecutionContext`: `state` is what a captured graph depends on."""

    def __init__(self, fake: FakeTensorRT, config: Any) -> None:
        self.fake, self.config, self.profile, self.memory = fake, config, 0, fake.compiles
        self.state: dict[str, Any] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return stream == STREAM

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % ALIGNMENT == 0
        assert size >= self.fake.engine.device_memory_size_v2
        self.memory = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.fake.capturing, "shapes are set before a capture"
        spec = next(spec for spec in self.fake.manifest.signature.inputs if spec.name == name)
        low, _, high = self.fake.manifest.profiles[self.profile].shapes(spec)
        self.state[f"shape of {name}"] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        fits = address > 0 and address % ALIGNMENT == 0
        if fits:
            self.state[name] = address
        return fits

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert self.fake.device_is_current
        assert self.memory
        if self.fake.capturing:
            self.fake.capturing[-1].append((self, dict(self.state)))
            return self.fake.capturable
        self.run()
        return True

    def run(self) -> None:
        signature = self.fake.manifest.signature
        shapes = {spec.name: self.state[f"shape of {spec.name}"] for spec in signature.inputs}
        feed = {spec.name: self._at(spec, shapes[spec.name]).copy() for spec in signature.inputs}
        outputs = self.fake.graph.run([spec.name for spec in signature.outputs], feed)
        for spec, value in zip(signature.outputs, outputs, strict=True):
            self._at(spec, value.shape)[...] = value

    def _at(self, spec: Any, shape: Any) -> Any:
        dtype = np.dtype(spec.dtype)
        count = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_byte * count).from_address(self.state[spec.name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Graph:
    """A `torch.cuda.CUDAGraph`."""

    replays = 0

    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake, self.calls, self.whole = fake, [], False

    def capture_begin(self, **_: Any) -> None:
        assert not self.fake.capturing
        self.fake.capturing.append(self.calls)

    def capture_end(self) -> None:
        if not self.fake.capturing:
            raise RuntimeError("no capture")
        self.fake.capturing.pop()
        if not self.fake.capturable:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.whole = True

    def replay(self) -> None:
        assert self.whole, "replayed without a successful capture"
        for context, state in self.calls:
            assert context.state == state, "the context was changed after its capture"
            context.run()
        Graph.replays += 1


class Engine:
    """An `ICudaEngine` with `WEIGHTS` bytes to stream; a budget that it refuses changes nothing, silently."""

    WEIGHTS = 5000

    def __init__(self, fake: FakeTensorRT) -> None:
        self.create_execution_context, self.create_runtime_config = fake.create_context, fake.create_config
        self.accepts, self.budget = True, self.WEIGHTS
        self.streamable_weights_size = self.WEIGHTS

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self.accepts and budget >= 0:
            self.budget = min(budget, self.WEIGHTS)

    @property
    def device_memory_size_v2(self) -> int:
        """With room for a weight that streams."""
        return 1000 + 500 * (self.budget < self.WEIGHTS)

    def get_tensor_location(self, name: str) -> int:
        return 0


class Held(SimpleNamespace):
    """Something that a session holds, whose end is noted."""

    def __init__(self, fake: FakeTensorRT, kind: str, **attributes: Any) -> None:
        super().__init__(**attributes)
        weakref.finalize(self, fake.gone.append, kind)


class Handle(Held):
    """An engine as a session holds it: the fake's own, which outlives it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["of"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.of, name, value)


class Config(Held):
    """An `IRuntimeConfig`."""

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


class FakeTensorRT:
    """A module, with what `EngineSession` uses of it; TensorRT-RTX if it `compiles`."""

    TensorLocation = SimpleNamespace(HOST=1)
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)

    def __init__(self, manifest: EngineManifest, graph: Path, compiles: bool) -> None:
        self.manifest, self.compiles, self.capturable = manifest, compiles, True
        self.device_is_current = False
        self.graph = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.__version__, self.ILogger = manifest.version, import_tensorrt("tensorrt_rtx").ILogger
        self.capturing: list[Any] = []
        self.contexts: list[Any] = []  # all that there have been
        self.alive: weakref.WeakSet[Context] = weakref.WeakSet()
        self.kernels = SimpleNamespace(found=[], serialize=self.compiled)
        self.kernels.deserialize = self.kernels.found.append
        if compiles:
            self.ComputeCapability = object
        self.engine = Engine(self)
        self.lean_runtimes: list[str] = []
        self.gone: list[str] = []  # what sessions held, in the order in which it went

    @contextmanager
    def current_device(self) -> Iterator[None]:
        self.device_is_current = True
        yield
        self.device_is_current = False

    def Runtime(self, log: Any) -> Any:
        def opens(plan: bytes) -> Any:
            return Handle(self, "engine", of=self.engine)

        def load(path: str) -> Any:
            self.lean_runtimes.append(path)
            return Held(self, "lean runtime", deserialize_cuda_engine=opens)

        weakref.finalize(log, self.gone.append, "log")
        return Held(self, "runtime", deserialize_cuda_engine=opens, load_runtime=load)

    def create_config(self) -> Any:
        assert self.compiles
        return Config(self, "config", create_runtime_cache=lambda: self.kernels)

    def create_context(self, config: Any) -> Context:
        assert (config == 2) != self.compiles
        context = Context(self, config)
        self.contexts.append(weakref.proxy(context))
        self.alive.add(context)
        weakref.finalize(context, self.gone.append, "context")
        return context

    def compiled(self) -> bytes:
        """What is in the runtime cache when all contexts are gone; those that are there are compiling still."""
        return b"" if self.alive else b"kernels"


def install(monkeypatch: pytest.MonkeyPatch, engine: Path, artifact: Path, compiles: bool = False) -> FakeTensorRT:
    """Let engines run in the fake, and torch's CUDA streams and graphs be its own."""
    fake = FakeTensorRT(read_engine_manifest(engine), artifact / "model.onnx", compiles)
    stream = SimpleNamespace(cuda_stream=STREAM, wait_stream=lambda other: None)
    monkeypatch.setattr(session, "import_tensorrt", lambda name: fake)
    monkeypatch.setattr(session, "checked_gpu", lambda manifest: torch.device("cpu"))
    monkeypatch.setattr(session, "ALIGNMENT", ALIGNMENT)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: fake.current_device())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(fake))
    monkeypatch.setattr(Graph, "replays", 0)
    return fake
