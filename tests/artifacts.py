"""Artifacts, made once a test run for all its workers, and a plain ONNX Runtime client that knows nothing of cdsurgery.

What takes longest in the tests is tracing graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from families import tiny_model
from filelock import FileLock
from torch import Tensor

import cdsurgery
from cdsurgery import ConfidentHead, export

LOOKBACK = 2  # at most; less than the depth of EXPORTED allows, so that a candidate too deep shows
EXPORTED = ("llama", "qwen3")
_TIED = {"num_hidden_layers": 4, "tie_word_embeddings": True}  # tied, so that a weight saved twice would show
_SHORT = {"num_hidden_layers": 2}  # one of each kind, and one candidate: the scan is the same in all of them
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": _TIED,
    "qwen3": _TIED,
    # The default of 1, where others divide by the root of the head size, makes attention amplify every rounding.
    "granite": _SHORT | {"attention_multiplier": 0.25},
    **{family: _SHORT for family in ("mistral", "qwen2", "qwen3_moe", "phi3", "olmo2", "deepseek_v3", "gpt2", "opt")},
    **{family: _SHORT for family in ("gpt_oss", "gemma2", "cohere2", "smollm3")},
    "gemma3_text": _SHORT | {"layer_types": ["sliding_attention", "full_attention"]},
    **{
        family: _SHORT | {"layer_types": ["linear_attention", "full_attention"]}
        for family in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
    },
}
PLACE: list[Path] = []  # conftest.py puts the folder of the run there


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of that name for all workers of the run, which the first one that asks for it makes."""
    (place,) = PLACE
    with FileLock(place / f"{name}.lock"):
        if not (place / name).exists():
            make(place / name)
    return place / name


@functools.cache
def wrapped(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> ConfidentHead:
    """A wrapped tiny model, sure of some tokens."""
    model = tiny_model(family, dtype, **_OPTIONS.get(family, {}))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)  # entropies from 1e-5 nats to 4
    lookback = min(LOOKBACK, model.config.num_hidden_layers - 1)
    return cdsurgery.wrap(model, **({"lookback": lookback} | options))


@functools.cache
def artifact(family: str, positions: Any = "last", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """The folder of its artifact; `options` are those of `to_onnx` or, if it has none of that name, of `wrap`."""
    name = "-".join([family, positions, str(dtype), *(f"{k}-{v}" for k, v in options.items())])
    exporting = {key: options.pop(key) for key in ("target", "upcast") if key in options}
    model = wrapped(family, dtype, **options)
    return shared(name, lambda folder: export.to_onnx(model, folder, positions=positions, **exporting))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Client:
    """Feeds a decoder by the names that every ONNX client expects."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "model.onnx")
        self.session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.cache_inputs = [value for value in self.session.get_inputs() if value.name.startswith("past")]

    def __call__(self, ids: Tensor, mask: Tensor, past: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Run new tokens `[B, S]` under a mask `[B, P+S]`; `past` is what an earlier call returned."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        for value in self.cache_inputs:
            present = value.name.replace("past_key_values", "past").replace("past", "present")
            feed[value.name] = _zeros(value, len(ids)) if past is None else past[present]
        return dict(zip(self.outputs, self.session.run(None, feed), strict=True))


def _zeros(value: Any, batch: int) -> np.ndarray:
    lengths = {"batch": batch, "past": 0}
    kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
    return np.zeros([lengths.get(axis, axis) for axis in value.shape], kind)


def padded(batch: int, length: int, side: str) -> Tensor:
    """A mask `[batch, length]` whose row r has r tokens of padding, at most all but one."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        width = min(row, length - 1)
        if side == "left":
            mask[row, :width] = 0
        elif side == "right" and width:
            mask[row, -width:] = 0
    return mask
