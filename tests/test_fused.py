"""Which unembeddings a fused scan takes, which it refuses, and what of a pass it writes."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from families import tiny_model, token_ids
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import cdsurgery
from cdsurgery import Anatomy, ConfidentConfig, InvalidInputError, Transform, UnsupportedModelError
from cdsurgery.fused import fused_unembedding
from cdsurgery.zoo import HIDDEN, LAYERS

LOOKBACK = 4
IDS = token_ids(3, 9)


def test_what_is_written_never_takes_more_than_the_unembedding() -> None:
    head = fused_unembedding(model := tiny_model("llama"), cdsurgery.wrap(model, lookback=1).anatomy)
    half = fused_unembedding(model := tiny_model("mamba", torch.bfloat16), cdsurgery.wrap(model, lookback=1).anatomy)
    assert [head.writes(rows) for rows in (1, HIDDEN - 1, HIDDEN)] == [True, True, False]
    assert [half.writes(rows) for rows in (1, HIDDEN - 1, HIDDEN)] == [True, True, False]


class Watched(nn.Linear):
    pass


def subclassed(model: Any) -> None:
    model.lm_head.__class__ = Watched


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    model.lm_head.forward = model.lm_head.forward


def in_columns(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.T.contiguous().T)


UNFIT = {
    subclassed: r"it is a test_fused\.Watched",
    hooked: "its forward is hooked or replaced",
    replaced: "its forward is hooked or replaced",
    in_columns: "with strides",
}


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_head_that_no_kernel_knows_is_refused_when_wrapped_and_when_called(change: Any) -> None:
    message = rf"LlamaForCausalLM: scan='fused' cannot .* 'lm_head': .*{UNFIT[change]}.* Use scan='full' or 'lazy'"
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="fused")
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        model(input_ids=IDS)
    model = tiny_model("llama")
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        cdsurgery.wrap(model, lookback=LOOKBACK, scan="fused")
    assert not isinstance(model, cdsurgery.ConfidentHead)
    assert isinstance(cdsurgery.wrap(model, lookback=LOOKBACK, scan="full"), cdsurgery.ConfidentHead)


# PEFT 0.21 asks for a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapted_or_double_precision_head_is_refused() -> None:
    adapter = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match=r"scan='fused' cannot .* it is a peft\.tuners\.lora.*Linear"):
        cdsurgery.wrap(peft.get_peft_model(tiny_model("llama"), adapter), lookback=1, scan="fused")
    with pytest.raises(UnsupportedModelError, match=r"its weight is torch.float64 on cpu"):
        cdsurgery.wrap(tiny_model("llama", torch.float64), lookback=1, scan="fused")


# PEFT 0.21 asks for a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_around_a_fused_head_is_left_with_a_plain_one() -> None:
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=1, scan="fused")
    head = model.lm_head
    model(IDS)
    before = vars(tiny_model("llama").lm_head).keys()
    adapter = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, adapter)
    with pytest.raises(UnsupportedModelError, match=r"scan='fused' cannot .* it is a peft\.tuners\.lora.*Linear"):
        adapted(input_ids=IDS)
    cdsurgery.unwrap(adapted)
    assert model.lm_head.base_layer is head and type(head) is nn.Linear
    assert vars(head).keys() == before


@torch.no_grad()
def test_the_default_dtype_does_not_matter() -> None:
    models = [cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan) for scan in ("full", "lazy", "fused")]
    for model in models:
        true, text = model(IDS), model.generate(IDS, max_new_tokens=4)
        torch.set_default_dtype(torch.float64)
        try:
            found, written = model(IDS), model.generate(IDS, max_new_tokens=4)
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.entropy.dtype == torch.float32
        torch.testing.assert_close(found.entropy, true.entropy, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(written, text)


def test_a_head_that_lies_on_several_ranks_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model: Any = tiny_model("llama")
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
        with pytest.raises(UnsupportedModelError, match=r"whose weight is a torch\.distributed.*DTensor"):
            fused_unembedding(model, tail_of())
    finally:
        dist.destroy_process_group()


def tail_of(*rows: Transform) -> Anatomy:
    layers = tuple(f"model.layers.{index}" for index in range(LAYERS))
    return Anatomy(layers, ("model.norm", "lm_head", *rows))


def test_what_else_is_done_to_logits_is_refused() -> None:
    softcap, scale = (
        next(row for row in cdsurgery.transforms.TRANSFORMS if row.name == name) for name in ("softcap", "scale")
    )
    model: Any = tiny_model("llama")
    model.config.final_logit_softcapping, model.config.logit_scale, model.config.odd = 8.0, 0.5, 1.0
    odd = Transform("scale", "odd", lambda z, value: z + value, "here")  # called like one that is known
    for rows, found in (
        ((odd,), r"its logits go through \(scale\)"),
        ((softcap, scale), r"\(scale\) comes after another"),
        ((scale, scale), r"\(scale\) comes after another"),
    ):
        with pytest.raises(UnsupportedModelError, match=found):
            fused_unembedding(model, tail_of(*rows))
    head = fused_unembedding(model, tail_of(scale, softcap))
    assert (head.scale, head.softcap) == (0.5, 8.0)
    model.config.final_logit_softcapping = None  # switched off, as a model then does without it
    head = fused_unembedding(model, tail_of(scale, softcap))
    assert (head.scale, head.softcap) == (0.5, None)
    model.config.logit_scale = torch.tensor(0.5)
    with pytest.raises(UnsupportedModelError, match=r"its logits go through \(scale\), whose value is tensor"):
        fused_unembedding(model, tail_of(scale))


def test_no_measure_but_entropy_is_fused() -> None:
    with pytest.raises(InvalidInputError, match="scan is 'fused' and measure 'log_p_squared'"):
        ConfidentConfig(measure="log_p_squared", scan="fused")
