"""Several rows times one unembedding: entropies by way of all logits, and in the one pass that `scan="fused"` makes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.machine import GPU, Limits, captured
from benchmarks.report import Table, compared
from benchmarks.setting import Setting
from benchmarks.shapes import config_of
from cdsurgery.entropy import entropy
from cdsurgery.kernels.unembed_sums import unembed_sums
from cdsurgery.timing import interleaved


@torch.no_grad()
def unembeddings(setting: Setting, _limits: Limits) -> Table:
    """K candidates of `batch` rows, on a GPU where there is one.

    Against one product of `batch` rows, as the unwrapped model makes: reading the weight once, the least that any of
    them can take; the logits of all candidates and their entropies; these entropies without the logits, and with them.
    """
    config, dtype, device = config_of(setting.shape), setting.torch_dtype, "cuda" if GPU else "cpu"
    # Logits as far apart as a trained model's.
    weight = torch.randn(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
    weight *= 4 / config.hidden_size**0.5
    state = torch.randn(setting.lookback * setting.batch, config.hidden_size, dtype=dtype, device=device)

    def fused(written: int) -> Tensor:
        return unembed_sums(state, weight, None, 1.0, None, False, len(weight), written)[0]

    ways = {
        "one row's logits": lambda: linear(state[: setting.batch], weight),
        "read W": weight.sum,
        "logits, then entropy": lambda: entropy(linear(state, weight)),
        "fused": lambda: fused(0),
        "fused, logits written": lambda: fused(len(state)),
    }
    return compared(interleaved({name: captured(way) for name, way in ways.items()}, setting.rounds))
