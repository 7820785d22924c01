"""The tail's entry -> the residual stream: x^(L), x^(L-1), .. x^(0), followed backwards through its sums.

Every update of the stream is a sum of the stream before it and of branches that read it. The summand that all others
follow from is the stream. An update whose branches read the cache is a layer's attention (or another mixer with a
state), and what it starts from is the output of the layer before: so layers are counted, whatever else updates the
stream within them, and whether attention and MLP come one after the other or side by side.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir

from cdsurgery.export.graft.flow import CASTS, Flow, describe, refuse
from cdsurgery.export.graft.tail import Tail, is_update, scaled_from


def find_states(tail: Tail, cache: Collection[onnx_ir.Value], flow: Flow) -> list[onnx_ir.Value]:
    """The outputs of the layers that lie before the last one.

    Args:
        tail: of the graph.
        cache: the graph's inputs that hold the cache.
        flow: of the graph.

    Returns:
        x^(L-1), x^(L-2), .. x^(0), each `[B, S, D]`: as many as there are layers.

    Raises:
        UnsupportedModelError: no layer was found.
    """
    states: list[onnx_ir.Value] = []
    terms = list(tail.entries) if len(tail.entries) == 2 else _terms(tail.entries[0], flow)
    while (stream := _stream(terms, flow)) is not None:
        before, branches = stream
        if any(value in cache for value in flow.ancestors(branches, stop=before)):
            states.append(before)
        terms = _terms(before, flow)
    if not states:
        ends = " and ".join(describe(value) for value in tail.entries)
        raise refuse(
            f"no layer was found: the final norm reads {ends}, which is not a residual stream that layers with a cache "
            "add to. An exported decoder with past key and value inputs is needed."
        )
    _check_scaling(tail, states[0], flow)
    return states


def _check_scaling(tail: Tail, before: onnx_ir.Value, flow: Flow) -> None:
    """A constant factor behind the last layer must stand behind the one before it too, else whose is it?"""
    if len(tail.entries) == 2 or not is_update(scaled_from(before, flow), flow):
        return
    ends = [_scalings(state, flow) for state in (tail.entries[0], before)]
    if ends[0] != ends[1]:
        raise refuse(
            f"the last layer's state {describe(tail.entries[0])} goes through {ends[0]} factors after its sum and the "
            f"state before it {describe(before)} through {ends[1]}, so it is not clear which of them belong to a layer."
        )


def _scalings(state: onnx_ir.Value, flow: Flow) -> int:
    total, count = scaled_from(state, flow), 0
    while state is not total:
        node = state.producer()
        assert node is not None
        count += node.op_type not in CASTS
        (state,) = flow.varying_inputs(node)
    return count


def _terms(state: onnx_ir.Value, flow: Flow) -> list[onnx_ir.Value]:
    """The summands of an update, or none where the state is not a sum."""
    total = scaled_from(state, flow)
    if not is_update(total, flow):
        return []
    node = total.producer()
    assert node is not None
    return flow.varying_inputs(node)


def _stream(terms: list[onnx_ir.Value], flow: Flow) -> tuple[onnx_ir.Value, list[onnx_ir.Value]] | None:
    """The summand that all others follow from, and the others; sums within the sum are opened where that helps."""
    while len(terms) > 1:
        for term in terms:
            before = flow.uncast(term)
            others = [other for other in terms if other is not term]
            if all(flow.is_ancestor(before, other) for other in others):
                return before, others
        opened = [inner for term in terms for inner in (_terms(term, flow) or [term])]
        if len(opened) == len(terms):
            break
        terms = opened
    return None
