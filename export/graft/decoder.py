"""An ONNX file -> a decoder whose parts are known, and the operation on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from cdsurgery.config import ConfidentConfig
from cdsurgery.export.artifact.clients import RUNNER
from cdsurgery.export.artifact.manifest import SCHEMA_VERSION, Manifest, maker_versions
from cdsurgery.export.graft.companions import Facts, read_config, read_facts
from cdsurgery.export.graft.contract import Contract, read_contract
from cdsurgery.export.graft.flow import Flow, refuse
from cdsurgery.export.graft.head import OLDEST_OPSET, PREFIX, GraftedHead, join_head, trace_head
from cdsurgery.export.graft.residual import find_states
from cdsurgery.export.graft.source import open_model
from cdsurgery.export.graft.tail import Tail, find_tail
from cdsurgery.export.options import GraphOptions, Positions
from cdsurgery.export.signature import BATCH, SEQUENCE


class ForeignDecoder:
    """A foreign decoder, read and understood.

    Args:
        path: of its ONNX file.

    Attributes:
        model, contract, config, facts: the graph, its inputs and outputs, and the configuration beside it.
        flow, tail: what follows from what, and how states become logits.
        states: x^(L-1), .. x^(0).
    """

    def __init__(self, path: Path) -> None:
        self.model = open_model(path)
        if self.model.opset_imports.get("", 0) < OLDEST_OPSET:
            raise refuse(
                f"it is of opset {self.model.opset_imports.get('', 0)}; the head needs opset {OLDEST_OPSET} or newer. "
                f"Export it again with that, or convert it with onnx.version_converter.convert_version(model, "
                f"{OLDEST_OPSET})."
            )
        self.contract: Contract = read_contract(self.model.graph)
        self.config = read_config(path)
        self.facts: Facts = read_facts(self.config)
        self.flow = Flow(self.model.graph)
        self.tail: Tail = find_tail(self.contract.logits, self.flow)
        self.states = find_states(self.tail, self.contract.past, self.flow)
        if len(self.states) != self.facts.layers:
            raise refuse(
                f"{len(self.states)} layers that read the cache add to its residual stream, and its configuration says "
                f"num_hidden_layers={self.facts.layers}. Layers that cannot be told apart cannot be looked back to."
            )
        if self.contract.vocabulary != self.facts.vocabulary:
            raise refuse(
                f"it returns logits of {self.contract.vocabulary} tokens, and its configuration says vocab_size="
                f"{self.facts.vocabulary}. Put the configuration of the model there that was exported."
            )

    @property
    def group_query_attention(self) -> bool:
        """Whether attention is ONNX Runtime's GroupQueryAttention."""
        return any(node.op_type == "GroupQueryAttention" for node in self.model.graph)

    @property
    def _keeps_windows_in_place(self) -> bool:
        return any("sliding_window_cache" in node.attributes for node in self.model.graph)

    @property
    def cache_capacity(self) -> int:
        """How long a cache to begin with: the context where GroupQueryAttention fills it, 0 where it grows."""
        return min(self.facts.context, _SHORT_CONTEXT) if self.group_query_attention else 0

    def manifest(self, config: ConfidentConfig, positions: Positions) -> Manifest:
        """The manifest of the artifact, without the hashes of its files and its proof."""
        lookback = int(config.lookback)
        signature = self.contract.signature(self.facts, lookback, positions)
        return Manifest(
            schema_version=SCHEMA_VERSION,
            versions=maker_versions(),
            model_type=self.facts.model_type,
            layers=self.facts.layers,
            confident=config,
            dtype=signature.outputs[0].dtype,
            options=GraphOptions(positions),
            opset=self.model.opset_imports[""],
            signature=signature,
            files={},
            not_for={RUNNER: _WINDOWS} if self._keeps_windows_in_place else {},
            parity=None,
            quantization=None,
            group_query_attention=self.group_query_attention,
        )

    def leave_out_last_(self, k: int) -> None:
        """Let the tail read x^(L-k) in place of the final state, in place; all else stays as it is."""
        self.tail.replace_entries_(self.states[k - 1], f"{PREFIX}proof/")

    def operate_(self, config: ConfidentConfig, manifest: Manifest) -> None:
        """Join the confident head to the graph, in place.

        Args:
            config: resolved for this depth.
            manifest: of the artifact; inputs and outputs get the order of its signature.
        """
        graph, tokens, tail = self.model.graph, self.contract.tokens, self.tail
        dtype = getattr(torch, manifest.dtype)
        head = GraftedHead(manifest.layers, self.contract.vocabulary, dtype, config, manifest.options.positions)
        traced = trace_head(head, tokens, len(tail.entries), self.facts.hidden_size, manifest.opset)
        parts = {f"entries_{i}": value for i, value in enumerate(tail.entries)}
        parts |= {f"states_{i}": value for i, value in enumerate(self.states[: int(manifest.confident.lookback)])}
        found = join_head(graph, traced.graph, {**tokens, **parts}, tail, self.flow)
        self.contract.logits.name = f"{PREFIX}replaced"
        graph.outputs.clear()
        graph.outputs.extend([*found, *self.contract.present])
        graph.inputs.clear()
        graph.inputs.extend([*(value for value in tokens.values() if value is not None), *self.contract.past])
        RemoveUnusedNodesPass()(self.model)
        ClearMetadataAndDocStringPass()(self.model)
        assert tokens["input_ids"] is not None and tokens["input_ids"].shape is not None
        own_axes: dict[str | int, Any] = dict(zip((BATCH, SEQUENCE), tokens["input_ids"].shape, strict=True))
        for value, spec in zip(found, manifest.signature.outputs, strict=False):
            value.name, value.dtype = spec.name, onnx_ir.DataType[_ONNX[spec.dtype]]
            value.shape = onnx_ir.Shape([own_axes.get(axis, axis) for axis in spec.axes])


# Enough for every shape of the proof, and for sliding windows of what is in use (gpt-oss 128, Gemma 4096).
_SHORT_CONTEXT = 4096
_WINDOWS = (
    "its layers with a sliding window write round in a cache of fixed length (sliding_window_cache), which "
    "onnxruntime-genai makes for them. Run it there, or export the model with to_onnx."
)
_ONNX = {"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64"}
