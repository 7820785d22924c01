"""A run of a mixture of experts -> how close its routers came to other experts, for every token.

A router takes the k best of its experts, so where the k-th and the next one lie within rounding of each other, two
runtimes may rightly take different experts, and all that follows differs by far more than rounding. `verify` has to
tell that from a wrong graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RoutingMargins(TorchFunctionMode):
    """Watches every `topk` over the tokens of one forward.

    Args:
        batch, length: B and S of the forward.

    Attributes:
        margins: `[B, S]` float32 in [0, 1]; the smallest gap between what a router took last and left first, in parts
            of its largest score. 1 where nothing was routed.
    """

    def __init__(self, batch: int, length: int) -> None:
        super().__init__()
        self.margins = torch.ones(batch, length)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "topk":
            self._note(args[0], kwargs["k"] if "k" in kwargs else args[1])
        return func(*args, **kwargs)

    def _note(self, scores: Tensor, k: int) -> None:
        batch, length = self.margins.shape
        tokens = batch * length
        if (scores.shape[0] != tokens and scores.shape[:2] != self.margins.shape) or k >= scores.shape[-1]:
            return
        best = scores.detach().cpu().float().topk(k + 1, dim=-1).values
        gap = (best[..., -2] - best[..., -1]).nan_to_num(nan=float("inf"))
        relative = gap / scores.detach().cpu().float().abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        self.margins = torch.minimum(self.margins, relative.reshape(batch, length, -1).amin(dim=-1))
