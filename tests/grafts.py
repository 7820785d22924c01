"""Files of other exporters, their artifacts, made once a test run, and a plain ONNX Runtime client for both."""

from __future__ import annotations

import atexit
import functools
import io
import logging
import shutil
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from foreign_files import FOLDER, GENAI, OPTIMUM, VOCABULARY, tiny_model
from torch import Tensor
from transformers import DynamicCache
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

import cdsurgery
from cdsurgery import ConfidentHead, export
from cdsurgery.export.graft import decoder

LOOKBACK = 2  # less than the depth allows, so that a candidate too deep shows
# name -> which row of foreign_files.CONFIGS it is
MODELS = (
    {f"optimum-{name}": name for name in OPTIMUM}
    | {f"genai-{name}": model for name, (model, _, _) in GENAI.items()}
    | {"transformers-llama": "llama"}
)
# Files that have no twin in PyTorch: weights are quantised; the builder rounds Gemma's factor of sqrt(D) to two digits.
OWN = [name for name in MODELS if "int4" in name or name == "genai-gemma2"]
TWINS = [name for name in MODELS if name not in OWN]
_MADE = tempfile.TemporaryDirectory(prefix="grafts-")
atexit.register(_MADE.cleanup)


# Tracing the head takes seconds and depends on these arguments alone: each kind is traced once a test run.
trace_head = decoder.trace_head


def _trace_once(head: Any, inputs: Any, *sizes: int) -> onnx_ir.Model:
    key = tuple((name, value) for name, value in vars(head).items() if name[0] != "_" and name != "training")
    types = tuple((name, None if value is None else value.dtype) for name, value in inputs.items())
    if (key, types, sizes) not in _TRACED:
        _TRACED[key, types, sizes] = onnx_ir.to_proto(trace_head(head, inputs, *sizes)).SerializeToString()
    return onnx_ir.from_proto(onnx.load_from_string(_TRACED[key, types, sizes]))


_TRACED: dict[Any, bytes] = {}
decoder.trace_head = _trace_once  # type: ignore[assignment]


@functools.cache
def foreign(name: str) -> Path:
    """The ONNX file of another exporter, with its configuration beside it."""
    return FOLDER / name / "model.onnx" if not name.startswith("transformers") else _by_transformers(MODELS[name])


def copied(name: str, place: Path) -> Path:
    """The same file with what lies beside it, in a folder that a test may change."""
    return Path(shutil.copytree(foreign(name).parent, place / name)) / "model.onnx"


def refused(path: Path, error: type[Exception], message: str, **options: Any) -> None:
    """Grafting it raises, and the folder that was to be made is not there, nor anything beside it that was not."""
    before = sorted(path.parent.parent.rglob("*"))
    with pytest.raises(error, match=message):
        export.graft(path, path.parent.parent / "artifact", **options)
    assert sorted(path.parent.parent.rglob("*")) == before


@functools.cache
def grafted(name: str, positions: Any = "all", **options: Any) -> Path:
    """The folder of its artifact."""
    place = Path(_MADE.name) / "-".join([name, positions, *(f"{k}-{v}" for k, v in options.items())])
    return export.graft(foreign(name), place, positions=positions, **({"lookback": LOOKBACK} | options))


@functools.cache
def wrapped(name: str, **options: Any) -> ConfidentHead:
    """The same weights in PyTorch, wrapped."""
    return cdsurgery.wrap(tiny_model(MODELS[name]), **({"lookback": LOOKBACK} | options))


class Client:
    """Runs a decoder, grafted or not, by the names of its inputs and outputs.

    A graph with GroupQueryAttention gets a cache with room for 64 tokens, as onnxruntime-genai gives it.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.capacity = 64 if "genai" in str(path) else 0

    def __call__(self, ids: Tensor, mask: Tensor, past: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Run new tokens `[B, S]` under a mask `[B, P+S]`; `past` is what an earlier call returned."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        for value in self.session.get_inputs():
            if value.name not in feed:
                heads = next(size for size in (value.shape[1], 1) if isinstance(size, int))
                empty = np.zeros((len(ids), heads, self.capacity, 16), np.float32)
                feed[value.name] = empty if past is None else past[present(value.name)]
        own = {name: array for name, array in feed.items() if name in self.inputs}
        found = dict(zip(self.outputs, self.session.run(None, own), strict=True))
        return {
            n: a[:, :, : mask.shape[1]] if self.capacity and n.startswith("present") else a for n, a in found.items()
        }


def present(past: str) -> str:
    """The output that continues a cache input, in the names of all three exporters."""
    return past.replace("past_key_values", "present") if past[0] == "p" else past.replace("input.", "output.", 1)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids `[batch, length]`."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def ones(batch: int, length: int) -> Tensor:
    """A mask `[batch, length]` of tokens alone."""
    return torch.ones(batch, length, dtype=torch.int64)


def _by_transformers(model_name: str) -> Path:
    """transformers' own exporter, on the spot; heads of keys and values are two, as one would become a fixed axis."""
    model: Any = tiny_model(model_name)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(8).view(2, 4), past_key_values=cache)
    inputs = {
        "input_ids": torch.arange(6).view(2, 3),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -3:],
        "past_key_values": cache,
        "use_cache": True,
    }
    folder = Path(_MADE.name) / f"by-transformers-{model_name}"
    folder.mkdir()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        program: Any = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True)).program
        logging.disable(logging.NOTSET)
    onnx_ir.save(program if isinstance(program, onnx_ir.Model) else program.model, folder / "model.onnx")
    model.config.save_pretrained(folder)
    return folder / "model.onnx"
