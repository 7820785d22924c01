"""A graph -> what depends on what in it: constants, data that varies with the inputs, ancestors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir

from cdsurgery.errors import UnsupportedModelError

# What they return depends on the shape of their input only, not on the data in it.
_SHAPE_OPERATORS = ("Shape", "Size")
# A value passes these unchanged but for its dtype.
CASTS = ("Cast", "Identity")


class Flow:
    """Where the data of a graph comes from.

    Attributes:
        static: values that follow from initializers and constants alone.
        varying: values that follow from the data (not just the shape) of a graph input.
    """

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.static: set[onnx_ir.Value] = set(graph.initializers.values())
        self.varying: set[onnx_ir.Value] = set(graph.inputs) - self.static
        self._order: dict[onnx_ir.Node, int] = {}
        for index, node in enumerate(graph):
            self._order[node] = index
            if any(value in self.varying for value in _read(node)) and node.op_type not in _SHAPE_OPERATORS:
                self.varying.update(node.outputs)
            elif all(value in self.static for value in _read(node)):
                self.static.update(node.outputs)

    def order(self, value: onnx_ir.Value) -> int:
        """When the value is computed; -1 for a graph input or an initializer."""
        node = value.producer()
        return -1 if node is None else self._order[node]

    def varying_inputs(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """The node's own inputs that vary, in order."""
        return [value for value in node.inputs if value is not None and value in self.varying]

    def ancestors(
        self, values: Iterable[onnx_ir.Value], stop: onnx_ir.Value, since: int = -1
    ) -> Iterator[onnx_ir.Value]:
        """All varying values that these follow from, themselves included.

        The search does not go past the node that makes `stop`, whichever of its outputs it meets: a norm that adds
        first gives the sum and, beside it, what follows from the sum. Nor does it go past values older than `since`.
        """
        open_, seen = [value for value in values if value in self.varying], set()
        while open_:
            value = open_.pop()
            if value in seen:
                continue
            seen.add(value)
            yield value
            node = value.producer()
            if node is not None and node is not stop.producer() and self.order(value) > since:
                open_.extend(read for read in _read(node) if read in self.varying)

    def is_ancestor(self, value: onnx_ir.Value, of: onnx_ir.Value) -> bool:
        """Whether `of` follows from `value`, or from the node that makes it."""
        node = value.producer()
        found = self.ancestors([of], stop=value, since=self.order(value))
        return any(v is value or (node is not None and v.producer() is node) for v in found)

    def uncast(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """The value before any casts."""
        node = value.producer()
        while node is not None and node.op_type in CASTS:
            (value,) = self.varying_inputs(node)
            node = value.producer()
        return value


def _read(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """What a node reads, what the graphs inside it read from outside included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)


def describe(value: onnx_ir.Value) -> str:
    """A value as an error names it: with what makes it."""
    node = value.producer()
    return f"'{value.name}' ({'a graph input' if node is None else operator(node)})"


def operator(node: onnx_ir.Node) -> str:
    """A node's operator as an error names it."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def refuse(why: str) -> UnsupportedModelError:
    """The error of a graph that cannot be followed."""
    return UnsupportedModelError(f"This graph cannot be grafted: {why}")
