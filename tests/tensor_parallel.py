"""One of the ranks that hold a model together (`tp_plan="auto"`): its wrapped model against the whole one.

`torchrun --nproc-per-node 2 tests/tensor_parallel.py FOLDER` fails where a rank differs.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from families import token_ids, truth
from transformers import AutoModelForCausalLM

import cdsurgery
from cdsurgery.shard import vocabulary_shard

LOOKBACK = 4


@torch.no_grad()
def main(folder: str) -> None:
    ids = token_ids(2, 9)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    true = truth(whole, LOOKBACK, input_ids=ids)
    written = cdsurgery.wrap(whole, lookback=LOOKBACK).generate(ids, max_new_tokens=8, do_sample=False)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto")
    plain = model(input_ids=ids).logits
    model = cdsurgery.wrap(model, lookback=LOOKBACK)
    shard = vocabulary_shard(model, model.anatomy, cdsurgery.entropy.entropy)
    assert shard is not None, "the head is not sharded, so nothing is shown"
    assert shard.weight.to_local().shape[0] < shard.weight.shape[0]

    head, gathered = model.get_output_embeddings(), []
    forward = head.forward
    head.forward = lambda *args: gathered.append(1) or forward(*args)
    out = model(input_ids=ids)
    head.forward = forward
    assert gathered == [1], "logits of candidates were gathered"

    # Each rank adds up half of every product: a few roundings of float32 apart, at logits of size 20.
    torch.testing.assert_close(out.logits, true.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.entropy.double(), true.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.final_logits, plain)
    assert torch.equal(out.selected_layer, true.layer)
    assert (true.layer < len(model.anatomy.layers)).any()
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), written)

    others = [torch.empty_like(out.entropy) for _ in range(dist.get_world_size())]
    dist.all_gather(others, out.entropy)
    assert all(torch.equal(other, out.entropy) for other in others), "ranks would choose different layers"
    assert torch.equal(cdsurgery.unwrap(model)(input_ids=ids).logits, plain)


if __name__ == "__main__":
    main(sys.argv[1])
    dist.destroy_process_group()
