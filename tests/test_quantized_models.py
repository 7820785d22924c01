"""Models that transformers loads in 8 and 4 bits: one head, whatever its bits, unembeds candidates and final states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import decoder_layers, token_ids, truth
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import cdsurgery

try:
    import torchao.quantization as torchao
except ImportError:  # not among what tests need: it prints of its missing GPU kernels whenever transformers imports it
    torchao = None

LOOKBACK = 4
IDS = token_ids(2, 9)


def ao(name: str, *, head_too: bool, **options: object) -> TorchAoConfig:
    if torchao is None:
        pytest.skip("torchao is not installed: pip install torchao==0.18.0 and run this file again")
    left_out: dict[str, list[str]] = {"modules_to_not_convert": []} if head_too else {}
    return TorchAoConfig(getattr(torchao, name)(**options), **left_out)


def int4(*, head_too: bool) -> TorchAoConfig:
    if torchao is None:
        return ao("", head_too=head_too)
    groups = torchao.granularity.PerGroup(32)
    return ao("IntxWeightOnlyConfig", head_too=head_too, weight_dtype=torch.int4, granularity=groups)


# As users write them; bitsandbytes quantises the head too where the list of modules to leave out matches none.
SCHEMES: dict[str, tuple[bool, Callable[[], object]]] = {
    "torchao int8": (False, lambda: ao("Int8WeightOnlyConfig", head_too=False)),
    "torchao int8, head too": (True, lambda: ao("Int8WeightOnlyConfig", head_too=True)),
    "torchao int8 x int8": (True, lambda: ao("Int8DynamicActivationInt8WeightConfig", head_too=True)),
    "torchao int4": (False, lambda: int4(head_too=False)),
    "torchao int4, head too": (True, lambda: int4(head_too=True)),
    "bitsandbytes int8": (False, lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes int8, head too": (True, lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["-"])),
    "bitsandbytes nf4": (False, lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bitsandbytes fp4, head too": (True, lambda: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["-"])),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model whose matrices are wide enough for groups of 64 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore")  # of these packages, about their own parts
@torch.no_grad()
def test_scan_and_output_use_the_quantised_head(scheme: str, folder: Path) -> None:
    head_too, config = SCHEMES[scheme]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32)
    assert is_quantised(decoder_layers(model)[0].mlp.up_proj)
    assert is_quantised(model.lm_head) == head_too
    true = truth(model, LOOKBACK, input_ids=IDS)
    wrapped = cdsurgery.wrap(model, lookback=LOOKBACK)
    out = wrapped(input_ids=IDS)
    assert torch.equal(out.final_logits, true.candidates[0])
    assert torch.equal(out.logits, true.logits)
    assert torch.equal(out.selected_layer, true.layer)
    assert (true.layer < 6).any()
    written = wrapped.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(written[:, 9], true.logits[:, -1].argmax(-1))
    assert torch.equal(cdsurgery.unwrap(wrapped)(input_ids=IDS).logits, true.candidates[0])


def is_quantised(linear: nn.Module) -> bool:
    return type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter
