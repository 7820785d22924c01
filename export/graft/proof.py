"""A foreign decoder and its grafted graph -> proof that nothing but the head changed, by running both.

For each shape a prompt and two continuations of its cache go through ONNX Runtime:
1. Final logits: bit for bit the logits of the foreign file wherever the head projects the same rows (every shape with
   `positions="all"`; steps of one token with "last"). Where "last" spares the head the other rows of a prompt, kernels
   may round by another grouping of rows, and they must agree within the tolerance of two runtimes.
2. Cache: bit for bit.
3. Candidates: the foreign graph with its last k layers taken out (what its final norm reads is replaced by x^(L-k), all
   else stays) must have the entropies that the artifact gives layer L-k.
4. Selection: the selected layer is the trough of the entropies returned, and where it is the last, the logits are the
   final ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch

from cdsurgery.entropy import MEASURES
from cdsurgery.errors import ArtifactError, UnsupportedModelError
from cdsurgery.export.artifact.manifest import Manifest
from cdsurgery.export.parity.report import TOLERANCES, logit_scale, measure_scale
from cdsurgery.export.signature import BATCH, PAST, TensorSpec
from cdsurgery.trough import trough_depth

Arrays = dict[str, np.ndarray[Any, Any]]

# (batch, prompt, first continuation, second continuation); ONNX Runtime's GroupQueryAttention continues several rows by
# one token at a time only.
SHAPES = ((1, 1, 1, 1), (2, 5, 1, 1), (1, 9, 4, 1), (3, 1, 1, 1))


def open_session(model: Path | onnx_ir.Model, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """Open a file, or a graph in memory whose weights lie in `folder`, on the CPU.

    Raises:
        ArtifactError: ONNX Runtime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    source: str | bytes = str(model) if isinstance(model, Path) else onnx_ir.to_proto(model).SerializeToString()
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own kinds, none of them public
        raise ArtifactError(
            f"ONNX Runtime cannot open {model if isinstance(model, Path) else folder}: {error}"
        ) from error


class Runs:
    """The same tokens through any graph of this signature: a prompt and two continuations for every shape.

    Args:
        manifest: of the artifact.
        vocabulary: V.
        capacity: the length of the cache. 0 lets it grow from nothing, as most graphs do; a graph with
            GroupQueryAttention is given room that it fills, as onnxruntime-genai does.
    """

    def __init__(self, manifest: Manifest, vocabulary: int, capacity: int) -> None:
        self.capacity = capacity
        self.specs = {spec.name: spec for spec in manifest.signature.inputs}
        self.past = [spec.name for spec in manifest.signature.past]
        self.present = [spec.name for spec in manifest.signature.outputs[4:]]
        generator = np.random.default_rng(0)
        self.tokens = [generator.integers(vocabulary, size=(shape[0], sum(shape[1:]))) for shape in SHAPES]

    def __call__(self, session: onnxruntime.InferenceSession) -> list[Arrays]:
        """All outputs by name, step by step; each graph continues its own cache.

        Raises:
            UnsupportedModelError: ONNX Runtime cannot run the graph on them.
        """
        names = [output.name for output in session.get_outputs()]
        results: list[Arrays] = []
        for (batch, *chunks), tokens in zip(SHAPES, self.tokens, strict=True):
            past = {name: _empty(self.specs[name], batch, self.capacity) for name in self.past}
            start = 0
            for chunk in chunks:
                end = start + chunk
                feed = {
                    "input_ids": tokens[:, start:end],
                    "attention_mask": np.ones((batch, end), np.int64),
                    "position_ids": np.arange(start, end)[None].repeat(batch, 0),
                }
                own = {name: a.astype(self.specs[name].dtype) for name, a in feed.items() if name in self.specs}
                outputs = dict(zip(names, _run(session, own | past), strict=True))
                # What lies beyond the tokens so far is room, and GroupQueryAttention may leave anything in it.
                results.append(outputs | {name: outputs[name][:, :, :end] for name in self.present})
                past = {name: outputs[present] for name, present in zip(self.past, self.present, strict=True)}
                start = end
        return results


def _run(session: onnxruntime.InferenceSession, feed: Arrays) -> list[np.ndarray[Any, Any]]:
    try:
        results: list[np.ndarray[Any, Any]] = session.run(None, feed)
    except Exception as error:  # ONNX Runtime raises its own kinds, none of them public
        batch, length = feed["input_ids"].shape
        raise UnsupportedModelError(
            f"ONNX Runtime could not run a graph of the proof, on {batch} rows of {length} new tokens: {error}. Either "
            "the file does not take them, or the parts found in it are not what they seem."
        ) from error
    return results


def prove(
    manifest: Manifest, old: list[Arrays], new: list[Arrays], shortened: dict[int, list[Arrays]]
) -> dict[str, Any]:
    """Compare what the graphs returned.

    Args:
        manifest: of the artifact.
        old: of the foreign graph.
        new: of the artifact.
        shortened: of the foreign graph without its last k layers, by k.

    Returns:
        What was compared, as JSON types.

    Raises:
        UnsupportedModelError: something differs.
    """
    tolerance = TOLERANCES[manifest.dtype]
    bitwise, apart, nats = 0, 0.0, 0.0
    for step, (before, after) in enumerate(zip(old, new, strict=True)):
        logits, final = before["logits"], after["final_logits"]
        same_rows = logits.shape == final.shape
        logits = logits[:, -final.shape[1] :]
        if np.array_equal(final[:, -logits.shape[1] :], logits):
            bitwise += 1
        elif same_rows:
            raise _differs("final_logits", step, "are not the file's own logits, bit for bit")
        apart = max(apart, _relative(final[:, -logits.shape[1] :], logits))
        for spec in manifest.signature.outputs[4:]:
            if not np.array_equal(before[spec.name], after[spec.name]):
                raise _differs(spec.name, step, "is not the file's own, bit for bit")
        _check_selection(manifest, after, step)
        for k, runs in shortened.items():
            nats = max(nats, _entropy_gap(manifest, runs[step]["logits"], after["entropy"][..., k]))
    if apart > tolerance.logits or nats > tolerance.entropy:
        raise UnsupportedModelError(
            f"The grafted graph does not do what the file does with layers left out: final logits are {apart:.1e} "
            f"apart (allowed {tolerance.logits:.0e}) and entropies {nats:.1e} (allowed {tolerance.entropy:.0e}), in "
            "parts of the row's largest logit. The parts found in the graph are not what they seem; please report it."
        )
    return {
        "passed": True,
        "steps": len(old),
        "steps_bitwise": bitwise,
        "final_logits": apart,
        "candidates": sorted(shortened),
        "entropy": nats,
    }


def _check_selection(manifest: Manifest, outputs: Arrays, step: int) -> None:
    entropy, layer = torch.from_numpy(outputs["entropy"]), torch.from_numpy(outputs["selected_layer"])
    depth = manifest.layers - layer
    trough = trough_depth(entropy)
    if not bool(((depth == trough) | ((depth == 0) & (manifest.confident.probability < 1))).all()):
        raise _differs("selected_layer", step, "is not the trough of the entropies")
    unmoved = (depth == 0).numpy()
    if not np.array_equal(outputs["logits"][unmoved], outputs["final_logits"][unmoved]):
        raise _differs("logits", step, "of rows that stay at the final layer are not the final ones")


def _entropy_gap(manifest: Manifest, logits: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """The largest difference of measures, in parts of the row's largest logit."""
    rows = min(logits.shape[1], found.shape[1])
    tensor = torch.from_numpy(logits[:, -rows:])
    truth = MEASURES[manifest.confident.measure](tensor)
    scale = measure_scale(manifest.confident.measure, truth[..., None], logit_scale(tensor), tensor.shape[-1])
    return _finite((torch.from_numpy(found[:, -rows:]) - truth) / scale.squeeze(-1))


def _relative(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    scale = torch.from_numpy(truth).float().abs().amax(dim=-1, keepdim=True)
    return _finite((torch.from_numpy(found).float() - torch.from_numpy(truth).float()) / scale)


def _finite(difference: torch.Tensor) -> float:
    return float(difference.abs().nan_to_num(nan=float("inf")).max())


def _differs(name: str, step: int, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"'{name}' of the grafted graph {how} (step {step} of the shapes {SHAPES}), so it was not kept."
    )


def _empty(spec: TensorSpec, batch: int, length: int) -> np.ndarray[Any, Any]:
    lengths: dict[str | int, int] = {BATCH: batch, PAST: length}
    return np.zeros([lengths[axis] if isinstance(axis, str) else axis for axis in spec.axes], spec.dtype)
