"""Tokens and a cache -> logits and the longer cache: what the scheduler wants of a runtime, and ONNX Runtime as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .errors import FolderError
from .providers import providers_for
from .settings import GRAPH, Settings, Tensor

Array = NDArray[Any]


class Decoder(Protocol):
    """A runtime of the graph. Its states are its own: arrays, or what lies on a device."""

    def run(self, tokens: dict[str, Array], past: Sequence[Any], wanted: Sequence[str]) -> tuple[Any, list[Any]]:
        """Run new tokens.

        Args:
            tokens: input_ids `[B, S]`, attention_mask `[B, P+S]` and position_ids `[B, S]`, int64.
            past: a state for each input of the cache.
            wanted: outputs to return.

        Returns:
            The wanted outputs by name, as arrays, and the states of the longer cache.
        """

    def fetch(self, states: Sequence[Any]) -> list[Array]:
        """The states as arrays."""

    def place(self, arrays: Sequence[Array]) -> list[Any]:
        """Arrays as states."""


def empty_states(past: Sequence[Tensor]) -> list[Array]:
    """The cache of one row that has seen no tokens."""
    lengths = {"batch": 1, "past": 0}
    return [np.zeros([s if isinstance(s, int) else lengths[s] for s in spec.axes], spec.dtype) for spec in past]


class OrtDecoder:
    """The graph in ONNX Runtime; the cache stays on its device from step to step and is never copied between two."""

    def __init__(self, folder: Path, settings: Settings, device: tuple[str, int]) -> None:
        """Open the graph.

        Args:
            folder: the version folder.
            settings: its settings.
            device: "cpu" or "cuda", and its index.

        Raises:
            FolderError: ONNX Runtime cannot open the graph, or not on this device, or has no TensorRT as asked for.
        """
        self._settings, self._device = settings, device
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = settings.threads
        # Threads that spin between two steps take the cores from the server, which then cannot send what is ready: on
        # two cores, 16 streams at a time got 443 tokens/s with spinning and 869 without.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        chosen = providers_for(settings, device)
        try:
            self._session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=chosen)
        except Exception as error:  # ONNX Runtime raises its own kinds, none of them public
            raise FolderError(f"ONNX Runtime cannot open {folder / GRAPH}: {error}") from error
        started = self._session.get_providers()
        if lost := [name for name, _ in chosen if name not in started]:
            raise FolderError(
                f"ONNX Runtime could not start {', '.join(lost)} and would run on {', '.join(started)}. Install "
                "onnxruntime-gpu and the CUDA and TensorRT that it was built for, or make the repository for the CPU."
            )

    def run(self, tokens: dict[str, Array], past: Sequence[Any], wanted: Sequence[str]) -> tuple[Any, list[Any]]:
        """See `Decoder`."""
        binding = self._session.io_binding()
        for spec in self._settings.tokens:
            binding.bind_cpu_input(spec.name, np.ascontiguousarray(tokens[spec.name], spec.dtype))
        for spec, state in zip(self._settings.past, past, strict=True):
            binding.bind_ortvalue_input(spec.name, state)
        for name in wanted:
            binding.bind_output(name, "cpu")
        for spec in self._settings.present:
            binding.bind_output(spec.name, *self._device)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        results = {name: value.numpy() for name, value in zip(wanted, outputs, strict=False)}
        return results, list(outputs[len(wanted) :])

    def fetch(self, states: Sequence[Any]) -> list[Array]:
        """See `Decoder`."""
        return [state.numpy() for state in states]

    def place(self, arrays: Sequence[Array]) -> list[Any]:
        """See `Decoder`."""
        return [onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._device) for array in arrays]
