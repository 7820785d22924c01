"""A graph file -> an ONNX Runtime session on the providers asked for: named torch tensors in, named torch tensors out.

ONNX Runtime reads and writes the memory of the tensors themselves (IO binding,
https://onnxruntime.ai/docs/performance/device-tensor.html). So the cache that one run returns and the next one takes
stays where the session computes, and no run copies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.artifact.external_data import check_external_data
from cdsurgery.export.runtime.lengths import axis_lengths, shape_of
from cdsurgery.export.signature import Signature

# As ONNX Runtime takes them: a name, or a name with options, for example {"device_id": 1}.
Provider = str | tuple[str, Mapping[str, Any]]

# As ONNX Runtime calls them.
TYPES = {"float32": "tensor(float)"} | {name: f"tensor({name})" for name in ("float16", "bfloat16", "int64", "int32")}

# These compute in the memory of a CUDA device; every other provider takes its inputs from the host.
CUDA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


class Session:
    """A decoder graph that is open for running.

    Attributes:
        signature: the inputs and outputs of the graph.
        device: where its floating-point tensors live: the CUDA device of the providers, or the CPU.
    """

    def __init__(
        self,
        path: Path,
        signature: Signature,
        providers: Sequence[Provider] | None = None,
        *,
        weights_in_place: bool = False,
    ) -> None:
        """Open the graph.

        Args:
            path: the graph file; its weights lie beside it.
            signature: what it takes and returns.
            providers: execution providers in order of preference; None means CPU.
            weights_in_place: read weights where they are, in the mapped file. Otherwise every matrix is copied into the
                order that its kernel likes: faster, for as much memory again as the weights.

        Raises:
            InvalidInputError: a provider is not available, or cannot be started on this machine.
            ArtifactError: the weights are not where they should be, or ONNX Runtime cannot open the graph.
        """
        chosen = _checked(["CPUExecutionProvider"] if providers is None else providers)
        self.signature, self.device = signature, _device(chosen)
        check_external_data(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        if weights_in_place:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
        except Exception as error:  # ONNX Runtime raises its own kinds, none of them public
            raise ArtifactError(
                f"ONNX Runtime cannot open {path} with {', '.join(name for name, _ in chosen)}: {error} A graph that "
                "was written without a comparison (parity=False) may be for other providers: name them in providers=."
            ) from error
        self._session.disable_fallback()
        started = self._session.get_providers()
        if lost := [name for name, _ in chosen if name not in started]:
            raise InvalidInputError(
                f"ONNX Runtime could not start {', '.join(lost)} and would run on {', '.join(started)} instead. Its "
                "log says why: often a driver, CUDA or cuDNN of another version than it was built for."
            )
        _check_signature(path, self._session, signature)

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph once.

        Args:
            feed: a tensor for every input of the signature. What lies on another device is copied to the session's.

        Returns:
            A new tensor for every output of the signature: floating-point ones on the session's device, integers on the
            host.

        Raises:
            InvalidInputError: an input is missing or unknown, or its dtype, rank or size does not fit.
        """
        lengths = axis_lengths(self.signature, feed)
        inputs = {name: tensor.to(self._place(tensor.dtype)).contiguous() for name, tensor in feed.items()}
        outputs = {}
        for spec in self.signature.outputs:
            dtype = getattr(torch, spec.dtype)
            outputs[spec.name] = torch.empty(shape_of(spec.axes, lengths), dtype=dtype, device=self._place(dtype))
        if self.device.type == "cuda":  # ONNX Runtime computes on a stream of its own, and waits for it at the end
            torch.cuda.current_stream(self.device).synchronize()
        binding, stand_ins = self._session.io_binding(), []
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                # An empty tensor has no address, and not every provider takes a null pointer for it.
                memory = tensor if tensor.numel() else tensor.new_empty(1)
                stand_ins.append(memory)
                place = (tensor.device.type, tensor.device.index or 0)
                bind(name, *place, int(from_torch_dtype(tensor.dtype)), list(tensor.shape), memory.data_ptr())
        self._session.run_with_iobinding(binding)
        return outputs

    def _place(self, dtype: torch.dtype) -> torch.device:
        """Integers stay on the host: ONNX Runtime computes shapes and indices there, whatever the provider."""
        return self.device if dtype.is_floating_point else torch.device("cpu")


def _check_signature(path: Path, session: onnxruntime.InferenceSession, signature: Signature) -> None:
    """Refuse a signature that is not the graph's."""
    for does, values, specs in (
        ("takes", session.get_inputs(), signature.inputs),
        ("returns", session.get_outputs(), signature.outputs),
    ):
        said = {spec.name: spec for spec in specs}
        if {value.name for value in values} != said.keys():
            found = ", ".join(value.name for value in values)
            raise ArtifactError(
                f"{path} {does} {found}, and its manifest says {', '.join(said)}. Make the artifact again."
            )
        for value in values:
            spec = said[value.name]
            if value.type != TYPES.get(spec.dtype) or not _may_be(value.shape, spec.axes):
                raise ArtifactError(
                    f"{path} {does} {value.name} as {value.type} of shape {value.shape}, and its manifest says "
                    f"{spec.dtype}, {list(spec.axes)}. Make the artifact again."
                )


def _may_be(shape: Sequence[Any], axes: Sequence[str | int]) -> bool:
    """Whether a graph's shape, whose open axes are names or None, can be that of a signature."""
    if len(shape) != len(axes):
        return False
    return all(size == axis for size, axis in zip(shape, axes, strict=True) if isinstance(size, int))


def _checked(providers: Sequence[Provider]) -> list[tuple[str, dict[str, Any]]]:
    """The providers as pairs of a name and options, all of them available."""
    available = onnxruntime.get_available_providers()
    try:
        pairs = [(entry, {}) if isinstance(entry, str) else (entry[0], dict(entry[1])) for entry in providers]
    except (TypeError, ValueError, IndexError):
        pairs = []
    if isinstance(providers, str) or not pairs:
        raise InvalidInputError(
            f"providers is {providers!r}; it must be a list of names or of (name, options) pairs, for example "
            f"{available[-1:]}. ONNX Runtime has {', '.join(available)} here."
        )
    if missing := [name for name, _ in pairs if name not in available]:
        raise InvalidInputError(
            f"ONNX Runtime has no {', '.join(map(str, missing))} here; it has {', '.join(available)}. Choose from "
            "these, or install the package that brings it; for CUDA: pip uninstall onnxruntime, which stands where the "
            "other one goes, then pip install 'cdsurgery[gpu]'."
        )
    return pairs


def _device(providers: Sequence[tuple[str, Mapping[str, Any]]]) -> torch.device:
    """Where the first provider that computes on a CUDA device keeps its tensors; the CPU if none does."""
    for name, options in providers:
        if name in CUDA_PROVIDERS:
            if not torch.cuda.is_available():
                raise InvalidInputError(
                    f"{name} keeps the cache in tensors on the GPU, and this PyTorch ({torch.__version__}) sees none. "
                    "Install a PyTorch with CUDA, or choose CPUExecutionProvider."
                )
            return torch.device("cuda", int(options.get("device_id", 0)))
    return torch.device("cpu")
