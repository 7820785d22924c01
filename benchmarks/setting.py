"""What is measured: a model's shape, a batch on a context, how far to look back and how often that moves a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


@dataclass(frozen=True)
class Setting:
    """What the parts are asked for.

    Attributes:
        shape: a name of `benchmarks.shapes.SHAPES`.
        dtype: a name of `DTYPES`.
        lookback: K.
        batch: rows of a step.
        context: tokens in the cache of each, or of the prompt.
        rate: the share of rows that move by a layer; the paper's is 0.115 (arXiv 2606.21906, table 5).
        new: tokens that are generated end to end.
        rounds: how often each way is timed.
    """

    shape: str = "qwen3-0.6b"
    dtype: str = "float32"
    lookback: int = 10
    batch: int = 1
    context: int = 512
    rate: float = 0.115
    new: int = 32
    rounds: int = 12

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = DTYPES[self.dtype]
        return dtype
