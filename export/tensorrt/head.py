"""A wrapped model -> an engine of its confident head alone: states in, four outputs out.

For who builds the body by other means, TensorRT-LLM for one: it only has to give x^(L) .. x^(L-K), the states after the
last layers and before the final norm, for the rows that it wants logits of.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from cdsurgery.anatomy import tail_logits
from cdsurgery.draw import allowed_rows
from cdsurgery.entropy import MEASURES
from cdsurgery.errors import InvalidInputError
from cdsurgery.export.artifact.clients import GRAPH_FILE
from cdsurgery.export.artifact.manifest import describe_files
from cdsurgery.export.artifact.staging import staged_folder
from cdsurgery.export.graph.quiet import quiet
from cdsurgery.export.options import OPSET
from cdsurgery.export.signature import BATCH, SEQUENCE, Signature, TensorSpec, torch_dtype
from cdsurgery.export.tensorrt.log import Progress
from cdsurgery.export.tensorrt.options import BuildOptions
from cdsurgery.export.tensorrt.package import import_tensorrt
from cdsurgery.export.tensorrt.profiles import Size, head_profile
from cdsurgery.export.tensorrt.writing import write_engine
from cdsurgery.head import ConfidentHead
from cdsurgery.probe import at_rest
from cdsurgery.trough import select


def head_to_tensorrt(
    model: ConfidentHead,
    folder: str | os.PathLike[str],
    *,
    package: str | None = None,
    batch: Size = 8,
    sequence: Size = 1,
    targets: Sequence[str] = (),
    hardware_compatible: bool = False,
    version_compatible: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Build an engine of a wrapped model's head.

    It takes `states` `[M, B, S, D]` in the model's dtype, index k being x^(L-k), and with 0 < probability < 1 also
    `input_ids` and `position_ids` `[B, S]` int64 for the draw. It returns `logits` and `final_logits` `[B, S, V]`,
    `selected_layer` `[B, S]` int64 and `entropy` `[B, S, M]` float32. `EngineSession(folder).run(feed)` runs it.

    Args:
        model: what `cdsurgery.wrap` returned.
        folder: the folder to make; it must not exist.
        batch, sequence: rows and positions of a run, each the largest, or (smallest, tuned, largest).
        package, targets, hardware_compatible, version_compatible, progress: as in `to_tensorrt`.

    Raises:
        InvalidInputError: the model is not wrapped, selects nothing, or an option is not one of those.
        SurgeryError: the package is not installed.
        ArtifactError: the folder exists, or TensorRT cannot build the graph.
    """
    if not isinstance(model, ConfidentHead) or model.confident.probability == 0:
        raise InvalidInputError(
            f"This {type(model).__name__} has no confident head: give what cdsurgery.wrap returned, with a probability "
            "above 0."
        )
    trt = import_tensorrt(package)
    profile = head_profile(batch, sequence)
    options = BuildOptions(targets, hardware_compatible, version_compatible)
    with staged_folder(folder) as aside, tempfile.TemporaryDirectory() as place:
        graph = Path(place) / GRAPH_FILE
        signature = write_head(model, graph)
        hashes = {name: of["sha256"] for name, of in describe_files(graph.parent).items()}
        write_engine(aside, trt, graph, signature, [profile], options, hashes, progress=progress)
    return Path(folder)


def write_head(model: Any, path: Path) -> Signature:
    """Write the head as an ONNX file, its weights beside it, and return what it takes and returns."""
    signature = head_signature(model)
    graph, sample = HeadGraph(model, signature), _sample(model, signature)
    dynamic = [
        {axis: Dim(str(size)) for axis, size in enumerate(spec.axes) if isinstance(size, str)}
        for spec in signature.inputs
    ]
    with at_rest(model), quiet():
        torch.onnx.export(
            graph,
            sample,
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            dynamic_shapes=(tuple(dynamic),),
            external_data=True,
            verbose=False,
        )
    return signature


def head_signature(model: Any) -> Signature:
    """The inputs and outputs of a wrapped model's head."""
    config = model.config.get_text_config()
    candidates, rows = model.confident.lookback + 1, (BATCH, SEQUENCE)
    dtype = str(model.dtype).removeprefix("torch.")
    inputs = [TensorSpec("states", dtype, (candidates, *rows, config.hidden_size))]
    if model.confident.probability < 1:
        inputs += [TensorSpec(name, "int64", rows) for name in ("input_ids", "position_ids")]
    logits = "float16" if dtype == "float16" else "float32"
    outputs = (
        *(TensorSpec(name, logits, (*rows, config.vocab_size)) for name in ("logits", "final_logits")),
        TensorSpec("selected_layer", "int64", rows),
        TensorSpec("entropy", "float32", (*rows, candidates)),
    )
    return Signature(tuple(inputs), outputs)


class HeadGraph(nn.Module):
    """The way from the states of the last layers to the logits of one of them, as a function of tensors."""

    def __init__(self, model: Any, signature: Signature) -> None:
        super().__init__()
        self.model, self.signature = model, signature

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Project, measure, scan and pick: states, and tokens and positions for the draw -> the signature's outputs."""
        model, (states, *drawn) = self.model, inputs
        confident = model.confident
        allowed = allowed_rows(confident.probability, confident.seed, *drawn) if drawn else None
        candidates = tail_logits(model, model.anatomy, states)
        logits, depth, entropy = select(candidates, MEASURES[confident.measure], allowed)
        values = (logits, candidates[0], len(model.anatomy.layers) - depth, entropy)
        return tuple(value.to(torch_dtype(spec)) for value, spec in zip(values, self.signature.outputs, strict=True))


def _sample(model: Any, signature: Signature) -> tuple[Tensor, ...]:
    """Inputs to trace with: two rows of three positions."""
    lengths = {BATCH: 2, SEQUENCE: 3}
    shapes = [[lengths[size] if isinstance(size, str) else size for size in spec.axes] for spec in signature.inputs]
    specs = zip(signature.inputs, shapes, strict=True)
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randint(9, shape, generator=generator).to(model.device, torch_dtype(spec)) for spec, shape in specs
    )
