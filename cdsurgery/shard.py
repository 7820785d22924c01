"""An unembedding whose rows lie on several ranks -> the same selection, for three numbers a row instead of its logits.

With `tp_plan="auto"` transformers gives every rank a part of the vocabulary and gathers the logits of each call. K
candidates of which one is wanted need not be gathered: every rank measures its part, the parts' sums are exchanged, all
ranks find the same trough, and only the selected rows travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from cdsurgery import entropy as measures
from cdsurgery.anatomy import Anatomy
from cdsurgery.entropy import Measure


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of an unembedding.

    Attributes:
        weight: `[V, D]`, sharded by rows over a mesh of one axis.
        bias: `[V]`, sharded likewise, or None.
    """

    weight: DTensor
    bias: DTensor | None

    def __call__(self, state: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V/R]`, the logits of this rank's rows."""
        bias = None if self.bias is None else self.bias.to_local()
        return nn.functional.linear(state, self.weight.to_local(), bias)

    def part(self, logits: Tensor) -> Tensor:
        """Of the logits `[..., V]` that every rank has, those of its own rows `[..., V/R]`; nothing is sent."""
        mesh = self.weight.device_mesh
        return distribute_tensor(logits, mesh, [Shard(logits.ndim - 1)], src_data_rank=None).to_local()

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy of whole rows, the same bits on every rank.

        Args:
            logits: `[..., V/R]`, this rank's part.

        Returns:
            `[...]` float32 nats.
        """
        group = self.weight.device_mesh.get_group()
        mine = torch.stack(measures.partial_sums(logits))
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        return measures.entropy_of_sums(*measures.merged_sums(*torch.stack(parts, dim=1)))

    def whole(self, logits: Tensor) -> Tensor:
        """`[..., V/R]` of every rank -> `[..., V]` on all of them."""
        mesh, shape = self.weight.device_mesh, (*logits.shape[:-1], self.weight.shape[0])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            logits, mesh, [Shard(len(shape) - 1)], run_check=False, shape=torch.Size(shape), stride=stride
        ).full_tensor()


def vocabulary_shard(model: PreTrainedModel, anatomy: Anatomy, measure: Measure) -> VocabularyShard | None:
    """This rank's part of the model's unembedding; None where it is whole, or where the logits must be gathered.

    They are while gradients are wanted, which travel through the model's own collectives, for a measure whose parts
    cannot be merged, and under a tail that does more to the vocabulary than change each logit by itself.
    """
    head = model.get_submodule(anatomy.unembedding)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, DTensor) or torch.is_grad_enabled() or measure is not measures.entropy:
        return None
    by_rows = type(head) is nn.Linear and weight.placements == (Shard(0),)
    if not by_rows or any(row.name == "unpadded" for row in anatomy.transforms):
        return None
    return VocabularyShard(weight, cast(DTensor | None, head.bias))
