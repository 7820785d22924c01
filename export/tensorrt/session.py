"""An engine's folder -> an open engine on the GPU: named torch tensors in, named torch tensors out.

TensorRT reads and writes the memory of the tensors themselves, on a stream of its own that torch's current stream waits
for; nothing waits on the host, and the cache that one run returns is what the next one reads. Before a byte is
deserialised its hash is held against the manifest, and code for the host that an engine may bring stays forbidden.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.runtime.lengths import axis_lengths, shape_of
from cdsurgery.export.signature import torch_dtype
from cdsurgery.export.tensorrt.admission import check_gpu, check_version, read_plan
from cdsurgery.export.tensorrt.log import make_log
from cdsurgery.export.tensorrt.manifest import ENGINE_FILE, read_engine_manifest
from cdsurgery.export.tensorrt.package import builds_ahead_of_time, import_tensorrt
from cdsurgery.export.tensorrt.profiles import fitting_profile
from cdsurgery.export.tensorrt.steps import DecodeSteps


class EngineSession:
    """An engine that is open for running.

    Attributes:
        manifest: what the engine says of itself.
        signature: its inputs and outputs.
        device: the CUDA device on which it runs and its tensors live.
    """

    def __init__(self, folder: Path, *, cache: Path | None = None, cuda_graphs: bool = False) -> None:
        """Open the engine on torch's current CUDA device.

        Args:
            folder: of the engine.
            cache: a folder for the kernels that TensorRT-RTX compiles here, made if it is not there.
            cuda_graphs: replay decode steps as CUDA graphs.

        Raises:
            ArtifactError: the engine was changed, or is of another TensorRT or for another GPU.
            InvalidInputError: there is no GPU, or nothing that the options could be for.
            SurgeryError: the TensorRT package that built it is not installed.
        """
        self.manifest = read_engine_manifest(folder)
        self.signature = self.manifest.signature
        plan = read_plan(folder, self.manifest)
        self._trt = import_tensorrt(self.manifest.package)
        check_version(self.manifest, self._trt.__version__)
        check_gpu(self.manifest)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._log = make_log(self._trt)
        self._runtime = self._trt.Runtime(self._log)  # engine_host_code_allowed is False and stays so
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ArtifactError(f"{self.manifest.package} cannot open {folder / ENGINE_FILE}. {self._said()}")
        self._stream = torch.cuda.Stream(self.device)
        self._stand_in = torch.empty(64, dtype=torch.int64, device=self.device)
        self._compiled = self._configured(folder, cache, cuda_graphs)
        self._contexts = [self._context(index) for index in range(len(self.manifest.profiles))]
        decode = next((one for one in self.manifest.profiles if one.name == "decode"), None)
        if cuda_graphs and decode is None:
            raise InvalidInputError(f"{folder} has no decode profile, so there is nothing to replay as CUDA graphs.")
        captures = not builds_ahead_of_time(self._trt)  # TensorRT-RTX captures by itself
        steps = DecodeSteps(self.signature, decode, self.device, captures) if cuda_graphs and decode else None
        self._steps = steps

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the engine once.

        Args:
            feed: a tensor for every input of the signature. What lies on another device is copied to the session's.

        Returns:
            A tensor on the session's device for every output of the signature. With `cuda_graphs` the cache of a decode
            step lies in memory that the run after the next one overwrites.

        Raises:
            InvalidInputError: an input does not fit the signature, or no profile of the engine takes its shape.
            ArtifactError: TensorRT refuses to run.
        """
        lengths = axis_lengths(self.signature, feed)
        index = fitting_profile(self.manifest.profiles, lengths)
        if self._steps is not None and self.manifest.profiles[index].name == "decode":
            return self._steps.run(feed, lengths, self._stream, lambda *sides: self._enqueue(index, *sides))
        inputs = {name: tensor.to(self._place(name)).contiguous() for name, tensor in feed.items()}
        outputs = {
            spec.name: torch.empty(shape_of(spec.axes, lengths), dtype=torch_dtype(spec), device=self._place(spec.name))
            for spec in self.signature.outputs
        }
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        self._enqueue(index, inputs, outputs)
        current.wait_stream(self._stream)
        return outputs

    def _enqueue(self, index: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Hand a run to the GPU, on the session's stream."""
        context = self._contexts[index]
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ArtifactError(f"The engine refuses {name} of shape {list(tensor.shape)}. {self._said()}")
        for name, tensor in {**inputs, **outputs}.items():
            # An empty tensor has no address, and TensorRT takes none for missing.
            memory = tensor if tensor.numel() else self._stand_in
            context.set_tensor_address(name, memory.data_ptr())
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise ArtifactError(f"The engine did not run. {self._said()}")

    def _place(self, name: str) -> torch.device:
        """What TensorRT computes shapes from it reads on the host."""
        host = self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST
        return torch.device("cpu") if host else self.device

    def _configured(self, folder: Path, cache: Path | None, cuda_graphs: bool) -> Any:
        """How TensorRT-RTX is to run the engine: kernels compiled before, and CUDA graphs; None for TensorRT."""
        if not builds_ahead_of_time(self._trt):
            if cache is not None:
                raise InvalidInputError(f"{folder} is an engine of TensorRT, which compiles nothing here: no cache.")
            return None
        config = self._engine.create_runtime_config()
        if cuda_graphs:
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache_file = None
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            self._cache_file = cache / f"{self.manifest.engine['sha256'][:16]}.runtime"
            self._runtime_cache = config.create_runtime_cache()
            if self._cache_file.is_file():
                self._runtime_cache.deserialize(self._cache_file.read_bytes())
            config.set_runtime_cache(self._runtime_cache)
        return config

    def keep_compiled(self) -> None:
        """Write the kernels that TensorRT-RTX has compiled so far into the cache folder, if there is one."""
        if self._compiled is not None and self._cache_file is not None:
            self._cache_file.write_bytes(self._runtime_cache.serialize())

    def _context(self, index: int) -> Any:
        arguments = [] if self._compiled is None else [self._compiled]
        context = self._engine.create_execution_context(*arguments)
        if context is None or not context.set_optimization_profile_async(index, self._stream.cuda_stream):
            raise ArtifactError(f"The engine cannot be made ready to run. {self._said()}")
        return context

    def _said(self) -> str:
        said = "\n".join(f"  {message.strip()}" for message in self._log.errors) or "  nothing"
        return f"TensorRT said:\n{said}"
