"""An engine's folder -> an open engine on the GPU: named torch tensors in, named torch tensors out.

TensorRT reads and writes the memory of the tensors themselves, on a stream of its own that torch's current stream waits
for; nothing waits on the host, and the cache that one run returns is what the next one reads. Before a byte is
deserialised its hash is held against the manifest, and code for the host that an engine may bring stays forbidden.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.runtime.lengths import axis_lengths, shape_of
from cdsurgery.export.signature import BATCH, TOTAL, torch_dtype
from cdsurgery.export.tensorrt.admission import check_version, checked_gpu, read_plan
from cdsurgery.export.tensorrt.log import make_log
from cdsurgery.export.tensorrt.manifest import ENGINE_FILE, read_engine_manifest
from cdsurgery.export.tensorrt.package import builds_ahead_of_time, import_tensorrt
from cdsurgery.export.tensorrt.profiles import cache_bytes, fitting_profile
from cdsurgery.export.tensorrt.steps import DecodeSteps

# Of the memory that a tensor on the GPU lies in; another address is an error. NvInferRuntime.h, setTensorAddress.
ALIGNMENT = 256  # bytes
SPARE = 512 << 20  # bytes of a GPU that streamed weights leave alone, for tokens, logits and what else torch holds


class EngineSession:
    """An engine that is open for running.

    Attributes:
        manifest: what the engine says of itself.
        signature: its inputs and outputs.
        device: the CUDA device on which it runs and its tensors live.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        cache: Path | None = None,
        cuda_graphs: bool = False,
        lean_runtime: Path | None = None,
    ) -> None:
        """Open the engine on torch's current CUDA device.

        Args:
            folder: of the engine.
            cache: a folder for the kernels that TensorRT-RTX compiles here, made if it is not there.
            cuda_graphs: replay decode steps of TensorRT as CUDA graphs.
            lean_runtime: the library of the TensorRT that built a version-compatible engine, where another one runs it.

        Raises:
            ArtifactError: the engine was changed, or is of another TensorRT or for another GPU.
            InvalidInputError: there is no GPU, or nothing that the options could be for.
            SurgeryError: the TensorRT package that built it is not installed.
        """
        # Attributes are freed in the order in which they are first set. So what TensorRT made stands before what made
        # it, which its Python keeps alive for some of them only, and before the memory that it works in.
        self._steps: DecodeSteps | None = None
        self._contexts: list[Any] = []
        self._kernels: Any = None
        self._configs: list[Any] = []  # of TensorRT-RTX
        self._engine: Any = None
        self._runtime: Any = None
        self._parent: Any = None  # of a lean runtime
        self._log: Any = None
        folder = Path(folder)
        self.manifest = read_engine_manifest(folder)
        self.signature = self.manifest.signature
        plan = read_plan(folder, self.manifest)
        self._trt = import_tensorrt(self.manifest.package)
        check_version(self.manifest, self._trt.__version__, lean_runtime)
        self.device = checked_gpu(self.manifest)
        decode = next((one for one in self.manifest.profiles if one.name == "decode"), None)
        if cuda_graphs and decode is None:
            raise InvalidInputError(f"{folder} has no decode profile, so there is nothing to replay as CUDA graphs.")
        self._compiles = builds_ahead_of_time(self._trt)
        if cache is not None and not self._compiles:
            raise InvalidInputError(f"{folder} is an engine of TensorRT, which compiles nothing here: no cache.")
        if cuda_graphs and self._compiles:
            raise InvalidInputError(
                f"{folder} is an engine of TensorRT-RTX, which captures by itself and anew for every length and "
                "address, so that steps on a growing cache would never be replayed. Load it without cuda_graphs."
            )
        self._log = make_log(self._trt)
        try:
            self._parent = self._trt.Runtime(self._log)  # engine_host_code_allowed is False and stays so
        except TypeError as error:  # what its binding makes of a null pointer, an old driver for one
            raise ArtifactError(f"{self.manifest.package} cannot start its runtime. {_said(self._log)}") from error
        self._runtime = self._parent
        if lean_runtime is not None:
            self._runtime = self._parent.load_runtime(str(lean_runtime))
            if self._runtime is None:
                raise ArtifactError(f"{self.manifest.package} cannot load {lean_runtime}. {_said(self._log)}")
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ArtifactError(f"{self.manifest.package} cannot open {folder / ENGINE_FILE}. {_said(self._log)}")
        if "WEIGHT_STREAMING" in self.manifest.flags:  # before any context; by itself TensorRT keeps all on the GPU
            # Steps in CUDA graphs hold two caches for good, beside those that a prompt reads and writes.
            self._stream_weights(caches=4 if cuda_graphs else 2)
        self._stream = torch.cuda.Stream(self.device)
        self._stand_in = torch.empty(64, dtype=torch.int64, device=self.device)
        if self._compiles:
            self._open_kernels(cache)
        else:  # runs follow each other on one stream, so that all contexts compute in the same memory
            size = self._engine.device_memory_size_v2
            self._memory = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        self._contexts += [self._context(index) for index in range(len(self.manifest.profiles))]
        self._replays = decode if cuda_graphs else None
        if self._replays is not None:
            self._steps = DecodeSteps(self.signature, self._replays, self.device)

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the engine once.

        Args:
            feed: a tensor for every input of the signature. What lies on another device is copied to the session's.

        Returns:
            A tensor on the session's device for every output of the signature. With `cuda_graphs` the cache of a decode
            step lies in memory that the run after the next one overwrites.

        Raises:
            InvalidInputError: an input does not fit the signature, no profile of the engine takes its shape, or the
                cache has been overwritten.
            ArtifactError: TensorRT refuses to run.
        """
        lengths = axis_lengths(self.signature, feed)
        index = fitting_profile(self.manifest.profiles, lengths)
        if self._steps is not None:
            if self.manifest.profiles[index] is self._replays:
                # A captured step has its context to itself: changing a context's shapes breaks its graphs.
                # https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/optimization.html
                return self._steps.run(
                    feed, lengths, self._stream, lambda *sides: self._ready(self._context(index), *sides)
                )
            self._steps.check(feed)
        inputs = {name: _bindable(tensor.to(self._place(name))) for name, tensor in feed.items()}
        outputs = {
            spec.name: torch.empty(shape_of(spec.axes, lengths), dtype=torch_dtype(spec), device=self._place(spec.name))
            for spec in self.signature.outputs
        }
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # which makes its device the current one
            self._ready(self._contexts[index], inputs, outputs)()
        current.wait_stream(self._stream)
        return outputs

    def _ready(self, context: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Give a context its shapes and addresses; what is returned hands the run to the session's stream."""
        log, stream = self._log, self._stream.cuda_stream
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ArtifactError(f"The engine refuses {name} of shape {list(tensor.shape)}. {_said(log)}")
        for name, tensor in {**inputs, **outputs}.items():
            # An empty tensor has no address, and TensorRT takes none for missing.
            memory = tensor if tensor.numel() else self._stand_in
            if not context.set_tensor_address(name, memory.data_ptr()):
                raise ArtifactError(f"The engine refuses the memory of {name}. {_said(log)}")

        def execute() -> None:  # kept beside a graph, and without the session, which then need not wait to be collected
            if not context.execute_async_v3(stream):
                raise ArtifactError(f"The engine did not run. {_said(log)}")

        return execute

    def _place(self, name: str) -> torch.device:
        """What TensorRT computes shapes from it reads on the host."""
        host = self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST
        return torch.device("cpu") if host else self.device

    def _open_kernels(self, cache: Path | None) -> None:
        """Kernels that TensorRT-RTX compiled before, and the file where those of this session will be kept."""
        if cache is None:
            return
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / f"{self.manifest.engine['sha256'][:16]}.runtime"
        self._configs.append(self._engine.create_runtime_config())
        self._kernels = self._configs[0].create_runtime_cache()
        if file.is_file():  # what another GPU or TensorRT made is not taken, and replaced
            self._kernels.deserialize(file.read_bytes())
        # When the session is no longer used, or the process ends.
        weakref.finalize(self, _keep, self._contexts, self._kernels, file)

    def _stream_weights(self, caches: int) -> None:
        """Keep as many weights on the GPU as leave room for a run: what it computes with, and its caches.

        Not as many as TensorRT would, whose automatic budget its Python cuts to 32 bits and takes from all free memory.
        """
        engine = self._engine
        engine.weight_streaming_budget_v2 = 0  # nothing is there yet, and a run needs its most
        token, fixed = cache_bytes(self.signature)
        sizes = [profile.largest() for profile in self.manifest.profiles]
        cache = max(size[BATCH] * (fixed + token * size.get(TOTAL, 0)) for size in sizes)
        # Contexts of TensorRT compute in one memory, of TensorRT-RTX each in its own.
        work = engine.device_memory_size_v2 * (len(sizes) if self._compiles else 1)
        left = torch.cuda.mem_get_info(self.device)[0] - work - caches * cache - SPARE
        budget = max(0, min(left, engine.streamable_weights_size))
        engine.weight_streaming_budget_v2 = budget
        if engine.weight_streaming_budget_v2 > budget:  # its Python says nothing where it refuses
            raise ArtifactError(f"The engine refuses to keep {budget} bytes of its weights here. {_said(self._log)}")

    def _context(self, index: int) -> Any:
        """A context for a profile."""
        if self._compiles:
            config = self._engine.create_runtime_config()
            self._configs.append(config)
            if self._kernels is not None:
                config.set_runtime_cache(self._kernels)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        try:
            ready = context is not None and context.set_optimization_profile_async(index, self._stream.cuda_stream)
        except RuntimeError:  # which its Python makes of a False
            ready = False
        if not ready:
            raise ArtifactError(f"The engine cannot be made ready to run. {_said(self._log)}")
        if not self._compiles:
            context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        return context


def _said(log: Any) -> str:
    said = "\n".join(f"  {message.strip()}" for message in log.errors) or "  nothing"
    return f"TensorRT said:\n{said}"


def _bindable(tensor: Tensor) -> Tensor:
    """The tensor in memory as TensorRT takes it: a part of a larger one may begin anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _keep(contexts: list[Any], kernels: Any, file: Path) -> None:
    """Write what TensorRT-RTX has compiled, whole or not at all."""
    contexts.clear()  # which waits for what they are compiling
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_bytes(kernels.serialize())
    aside.replace(file)
