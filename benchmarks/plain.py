"""A wrapped model -> an artifact of it without the confident head: what graphs that select are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from cdsurgery import export
from cdsurgery.anatomy import tail_logits
from cdsurgery.export.artifact.clients import GRAPH_FILE
from cdsurgery.export.artifact.manifest import NAME, describe_files
from cdsurgery.export.graph.decoder import DecoderGraph
from cdsurgery.export.options import Target


def _final_alone(self: DecoderGraph, states: list[Tensor], _allowed: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs of a graph that selects, of the final layer alone; all but the second are dropped."""
    logits = tail_logits(self.model, self.model.anatomy, states[0])
    layer = torch.full(logits.shape[:2], len(self.model.anatomy.layers))
    return logits + 0, logits, layer, layer[..., None].float().expand(-1, -1, len(states))


def plain_artifact(model: Any, folder: Path, target: Target = "portable") -> Path:
    """An artifact of the same model without the head: one candidate, and none of what is measured of it."""
    with patch.object(DecoderGraph, "_selection", _final_alone):
        export.to_onnx(model, folder, target=target, parity=False)
    said = json.loads((folder / NAME).read_text(encoding="utf-8"))
    dropped = ("logits", "selected_layer", "entropy")
    said["signature"]["outputs"] = [spec for spec in said["signature"]["outputs"] if spec["name"] not in dropped]
    graph = onnx_ir.load(folder / GRAPH_FILE)
    graph.graph.outputs[:] = [value for value in graph.graph.outputs if value.name not in dropped]
    RemoveUnusedNodesPass()(graph)
    onnx_ir.save(graph, folder / GRAPH_FILE)  # its weights stay in the file beside it, those not needed too
    (folder / NAME).write_text(json.dumps(said | {"files": describe_files(folder)}), encoding="utf-8")
    return folder
