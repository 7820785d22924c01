"""A model's shape and a machine's limits -> the least seconds that a decode step can take, in each way to scan.

A step reads every weight that it needs once, and the cache, or computes, whichever takes longer (Williams, Waterman
and Patterson, Roofline, CACM 52(4), 2009). The unembedding is read once for each product with it, however many rows.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.machine import Limits
from cdsurgery.readings import reading_plan


class Roofline:
    """Seconds of the parts of a step.

    Args:
        model: of the shape; one on the meta device stands for one on an accelerator.
        limits: the machine's.
    """

    def __init__(self, model: Any, limits: Limits) -> None:
        self.config, self.device, self.limits = model.config, model.device, limits
        self.vocabulary, self.width = model.get_output_embeddings().weight.shape
        self.element = model.dtype.itemsize
        count = {name: weight.numel() for name, weight in model.named_parameters()}
        experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
        self.experts, self.number_of_experts = sum(map(torch.numel, experts)), experts[0].shape[0] if experts else 0
        embeddings = 1 if self.config.tie_word_embeddings else 2
        self.body = sum(count.values()) - self.experts - embeddings * self.vocabulary * self.width

    def steps(self, batch: int, cache: int, lookback: int, rate: float, tokens: int = 1) -> dict[str, float]:
        """Way -> seconds, on a cache of so many bytes, where `rate` of the rows move, by one layer.

        Of several `tokens` a row, as in a prefill, the last one's logits are wanted; what their attention to each other
        takes is not counted, so that the ratios are above those of the perfect machine.

        "lazy" projects every row twice and those that moved once more; "full" all candidates in two products, the
        model's own and ours, whose logits are written and read; "one pass" all of them in one product. "fused" reads as
        `reading_plan` has it: some layers of every row in one product, whose results are written, and where those are
        too few for a row that moves, more of the rows that did in another.
        """
        unwrapped = self.unwrapped(batch, cache, tokens)
        some, moving = 1 - (1 - rate) ** batch, max(1, rate * batch)  # how often a row moves, and how many do then
        logits = 2 * lookback * batch * self.vocabulary * 4 / self.limits.bandwidth
        body, row = unwrapped - self.product(batch), self.vocabulary * self.element / self.limits.bandwidth
        first, *later = reading_plan(self.device, batch, lookback)
        fused = self.product((first + 1) * batch) + first * batch * row
        if later and first == 1:
            fused += some * (self.product(later[0] * moving) + later[0] * moving * row)
        return {
            "unwrapped": unwrapped,
            "lazy": unwrapped + self.product(batch) + some * self.product(moving),
            "full": unwrapped + self.product(lookback * batch) + logits,
            "fused": body + fused,
            "one pass": body + self.product((lookback + 1) * batch) + logits,
        }

    def unwrapped(self, batch: int, cache: int, tokens: int = 1) -> float:
        """A step of the model alone."""
        touched, used = 1.0, 0.0
        if self.experts:  # the share of the experts that some token is sent to, and that each token is
            used = self.config.num_experts_per_tok / self.number_of_experts
            touched = 1 - (1 - used) ** (batch * tokens)
        read = (self.element * (self.body + touched * self.experts) + cache) / self.limits.bandwidth
        computed = 2 * batch * tokens * (self.body + used * self.experts) / self.limits.flops
        return max(read, computed) + self.product(batch)

    def product(self, rows: float) -> float:
        """Rows times the unembedding."""
        weights = self.vocabulary * self.width
        return max(2 * rows * weights / self.limits.flops, self.element * weights / self.limits.bandwidth)
