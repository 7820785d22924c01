"""The graph as another model of the same server, called through it (BLS) -> a decoder.

https://github.com/triton-inference-server/python_backend#business-logic-scripting
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from .settings import Settings

Array = NDArray[Any]


class StepDecoder:
    """A decoder whose runs are requests to a step model. Its states are arrays."""

    def __init__(self, utils: Any, settings: Settings) -> None:
        """Name the model.

        Args:
            utils: `triton_python_backend_utils`.
            settings: with `step_model`.
        """
        self._utils, self._settings = utils, settings

    def run(self, tokens: dict[str, Array], past: Sequence[Any], wanted: Sequence[str]) -> tuple[Any, list[Any]]:
        """See `decoder.Decoder`.

        Raises:
            RuntimeError: the step model answered with an error.
        """
        utils, settings = self._utils, self._settings
        inputs = [utils.Tensor(spec.name, tokens[spec.name].astype(spec.dtype)) for spec in settings.tokens]
        inputs += [utils.Tensor(spec.name, state) for spec, state in zip(settings.past, past, strict=True)]
        names = [*wanted, *(spec.name for spec in settings.present)]
        call = utils.InferenceRequest(
            model_name=settings.step_model, requested_output_names=names, inputs=inputs,
            preferred_memory=utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0),
        )  # fmt: skip
        response = call.exec()
        if response.has_error():
            raise RuntimeError(f"{settings.step_model}: {response.error().message()}")
        arrays = [utils.get_output_tensor_by_name(response, name).as_numpy() for name in names]
        return dict(zip(wanted, arrays, strict=False)), arrays[len(wanted) :]

    def fetch(self, states: Sequence[Any]) -> list[Array]:
        """See `decoder.Decoder`."""
        return list(states)

    def place(self, arrays: Sequence[Array]) -> list[Any]:
        """See `decoder.Decoder`."""
        return list(arrays)
