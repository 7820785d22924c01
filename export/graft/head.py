"""States of a foreign graph -> selected logits: the confident head, traced from cdsurgery's own code and joined to it.

There is one source of the entropy, the scan and the choice of rows: the functions that wrapped models use, exported by
`torch.onnx`. Only the tail is not PyTorch's. The trace leaves a node in its place, `cdsurgery.graft.Tail`, and the
graph's own tail is copied there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from cdsurgery.config import ConfidentConfig
from cdsurgery.draw import allowed_rows, text_positions
from cdsurgery.entropy import MEASURES
from cdsurgery.export.graft.flow import Flow
from cdsurgery.export.graft.tail import Tail
from cdsurgery.export.graph.decoder import kept_rows
from cdsurgery.export.graph.quiet import quiet
from cdsurgery.export.options import Positions
from cdsurgery.trough import select

OUTPUTS = ("logits", "final_logits", "selected_layer", "entropy")
PREFIX = "cdsurgery/"
_DOMAIN = "cdsurgery.graft"
# The oldest and the newest that torch.onnx writes by itself. In a newer graph, operators of the latter mean the same.
OLDEST_OPSET, _NEWEST_OPSET = 18, 23


class GraftedHead(nn.Module):
    """The confident head over the states of a graph.

    The final state goes through the tail by itself and the K earlier ones together: so the final logits come from the
    same operators on the same rows as before and are the same bit for bit, and the unembedding is read twice, whatever
    K is. One pass over all would read it once, but kernels round one row and several differently: ONNX Runtime's
    MatMulNBits does.

    Args:
        layers: L.
        vocabulary: V.
        logits_dtype: of the graph's logits.
        config: with `lookback` as an int.
        positions: "last" for each row's last real token, "all" for every new token.
    """

    def __init__(
        self,
        layers: int,
        vocabulary: int,
        logits_dtype: torch.dtype,
        config: ConfidentConfig,
        positions: Positions,
    ) -> None:
        super().__init__()
        self.layers, self.vocabulary, self.logits_dtype = layers, vocabulary, logits_dtype
        self.config, self.positions = config, positions

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        entries: Sequence[Tensor],
        states: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project, measure and select.

        Args:
            input_ids: `[B, S]` integers.
            attention_mask: `[B, P+S]` integers, 0 for padding on either side.
            position_ids: `[B, S]` integers, or None to count the mask.
            entries: what the tail reads of the final state, each `[B, S, D]`.
            states: x^(L-1), .. x^(L-K), each `[B, S, D]`.

        Returns:
            logits and final_logits `[B, T, V]`, selected_layer `[B, T]` int64, entropy `[B, T, M]` float32.
        """
        rows = kept_rows(attention_mask.long(), input_ids, self.positions)
        batch, kept = input_ids.shape[0], rows[1].shape[1]
        final = [entry[rows].flatten(0, 1) for entry in entries]
        earlier = torch.stack([state[rows] for state in states]).flatten(0, 2)
        # To a norm that adds first, a state is itself and 0: x - x is 0 for every finite x. So it is normed by the very
        # operator that norms the final state, and rounded alike.
        summands = [earlier, earlier - earlier][: len(final)]
        projected = torch.cat([self._tail(final), self._tail(summands)])
        candidates = projected.view(len(states) + 1, batch, kept, self.vocabulary)
        allowed = None
        if self.config.probability < 1:
            places = text_positions({"position_ids": position_ids, "attention_mask": attention_mask}, input_ids)
            assert self.config.seed is not None
            allowed = allowed_rows(self.config.probability, self.config.seed, input_ids[rows], places[rows])
        logits, depth, entropy = select(candidates, MEASURES[self.config.measure], allowed)
        return logits, candidates[0], self.layers - depth, entropy

    def _tail(self, rows: list[Tensor]) -> Tensor:
        shape = (rows[0].shape[0], self.vocabulary)
        return torch.onnx.ops.symbolic(f"{_DOMAIN}::Tail", rows, dtype=self.logits_dtype, shape=shape, version=1)


def trace_head(
    head: GraftedHead, inputs: Mapping[str, onnx_ir.Value | None], entries: int, width: int, opset: int
) -> onnx_ir.Model:
    """Export the head by itself.

    Args:
        head: what to trace.
        inputs: the graph's `input_ids`, `attention_mask` and `position_ids` (or None).
        entries: how many summands the tail reads.
        width: D.
        opset: of the graph it will be part of.
    """
    batch, length, past = 2, 3, 4
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    mask[0, :2] = 0
    ids = torch.arange(batch * length).view(batch, length)
    samples = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": ids if inputs["position_ids"] is not None else None,
    }
    dynamic = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes: dict[str, Any] = {}
    typed: dict[str, Any] = {}
    for name, tensor in samples.items():
        value = inputs[name]
        is_int32 = value is not None and value.dtype == onnx_ir.DataType.INT32
        typed[name] = tensor.to(torch.int32) if tensor is not None and is_int32 else tensor
        shapes[name] = None if value is None else dynamic
    many = {  # each a tensor of its own: the tracer takes equal objects for one input
        name: [torch.zeros(batch, length, width) for _ in range(count)]
        for name, count in (("entries", entries), ("states", int(head.config.lookback)))
    }
    with quiet():
        program = torch.onnx.export(
            head,
            kwargs=typed | many,
            dynamic_shapes=shapes | {name: [dynamic] * len(tensors) for name, tensors in many.items()},
            opset_version=min(opset, _NEWEST_OPSET),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model


def join_head(
    graph: onnx_ir.Graph, traced: onnx_ir.Graph, inputs: Mapping[str, onnx_ir.Value | None], tail: Tail, flow: Flow
) -> list[onnx_ir.Value]:
    """Move the traced head into the graph, with copies of the tail where it left room for them.

    Args:
        graph: to join it to; nothing of it is changed.
        traced: from `trace_head`; empty afterwards.
        inputs: the graph's values by the names of the traced head's inputs.
        tail: of the graph.
        flow: of the graph.

    Returns:
        The values of `OUTPUTS`.
    """
    outputs = list(traced.outputs)
    for placeholder in traced.inputs:
        value = inputs[str(placeholder.name)]
        assert value is not None
        placeholder.replace_all_uses_with(value)
    for name, value in list(traced.initializers.items()):
        del traced.initializers[name]
        value.name = f"{PREFIX}{name}"
        value.metadata_props.clear()
        graph.register_initializer(value)
    nodes = list(traced)
    traced.outputs.clear()
    traced.remove(nodes)
    graph.extend(nodes)
    for node in nodes:
        node.name = f"{PREFIX}{node.name}"
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.name, value.shape = f"{PREFIX}{value.name}", None
            value.metadata_props.clear()
    holes = [node for node in nodes if node.domain == _DOMAIN]
    for hole, name in zip(holes, ("final", "earlier"), strict=True):
        rows = [value for value in hole.inputs if value is not None]
        logits = tail.copy_before(hole, rows, flow, f"{PREFIX}{name}/", summed=hole is not holes[0])
        hole.outputs[0].replace_all_uses_with(logits)
        graph.remove(hole, safe=True)
    return outputs
