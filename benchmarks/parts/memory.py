"""Steps and prefills -> the most bytes alive at once, beyond the weights and the cache that was there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from benchmarks.machine import Limits
from benchmarks.models import decode_step, filled_cache, step_ways
from benchmarks.report import Table
from benchmarks.schedule import scheduled
from benchmarks.setting import Setting
from benchmarks.shapes import random_model
from cdsurgery.export.graph.cache import cache_states


class Peak(TorchDispatchMode):
    """The most bytes alive at once in storages that were made under this mode.

    Args:
        held: what was there before; an operation that returns a view of it makes nothing.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # References and not addresses alone, which would go to what is made once one of these is gone.
        references = [StorageWeakRef(tensor.untyped_storage()) for tensor in held]
        self.held = {reference.cdata: reference for reference in references}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata not in self.held:
                    self.alive[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


@torch.no_grad()
def peaks(setting: Setting, _limits: Limits) -> Table:
    """Megabytes of a decode step on `context` tokens, and of a prefill of as many."""
    models = step_ways(random_model(setting.shape, setting.torch_dtype), setting.lookback)
    plain = models["unwrapped"]
    cache = filled_cache(plain, setting.batch, setting.context)
    ids = torch.zeros(setting.batch, setting.context, dtype=torch.int64, device=plain.device)
    weights = [*plain.parameters(), *plain.buffers()]
    rows = []
    with scheduled(setting.rate):
        for way, model in models.items():
            with Peak([*weights, *(state for _, _, state in cache_states(cache))]) as step:
                decode_step(model, cache, setting.batch)()
            with Peak(weights) as prefill:
                model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
            rows.append((way, step.bytes / 1e6, prefill.bytes / 1e6))
    logits = setting.batch * plain.get_output_embeddings().weight.shape[0] * 4 / 1e6
    return Table(("way", "step, MB", "prefill, MB"), rows, (f"The logits of one candidate are {logits:.1f} MB.",))
