"""What several test files need: a graph of a function, proven static."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# What a value-dependent step runs or leaves in a graph: a number read back to the host, a shape that depends on values,
# a branch or a loop.
BY_MASK = " by a mask"
DATA_DEPENDENT = ("local_scalar", "item", "nonzero", "masked_select", "unique", "cond", "while_loop", "scan", BY_MASK)


class Operations(TorchDispatchMode):
    """The names of the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if str(func).startswith("aten.index") and isinstance(args[1], list) else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.names.add(str(func) + BY_MASK * by_mask)
        return func(*args, **(kwargs or {}))


def data_dependent(names: set[str]) -> set[str]:
    """Of names of operations, those that depend on values."""
    return {name for name in names if any(part in name for part in DATA_DEPENDENT)}


def static_graph(function: Callable[..., Any], samples: Sequence[Tensor], *dynamic: dict[int, Any]) -> nn.Module:
    """Export `function` as `torch.export` sees it and return the graph; no operation in it may depend on values.

    The function is run as it is too, for what tracing folds away: a number read on the host that changes nothing.

    Args:
        samples: example arguments.
        dynamic: for each argument, {dimension: torch.export.Dim}; a graph that freezes one of them is an error there.
    """

    class Graph(nn.Module):
        def forward(self, *arguments: Tensor) -> Any:
            return function(*arguments)

    with Operations() as run:
        function(*samples)
    program = torch.export.export(Graph(), tuple(samples), dynamic_shapes=(dynamic,))
    traced = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert run.names, "nothing ran"
    assert traced, "the graph is empty"
    found = data_dependent(run.names | traced)
    assert not found, f"these operations depend on values: {found}"
    return program.module()
