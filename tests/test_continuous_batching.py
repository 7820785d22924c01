"""transformers' `generate_batch`: prompts of any length packed into one row, in a paged cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import cdsurgery

LOOKBACK = 4
PROMPTS = [
    torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (5, 17, 2)
]
NEW = 8
# Else the cache is as large as the machine's memory. Fewer tokens a step than there are in the prompts, so that prompts
# are taken in beside the steps of others, and the longest one in parts.
SMALL = {"num_blocks": 16, "page_size": 8, "max_batch_tokens": 12}


def continuous(model: Any, **more: Any) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(**SMALL, **more)
    outputs = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=small).values()
    assert not [output.error for output in outputs if output.error]
    return [output.generated_tokens for output in outputs]


def one_by_one(model: Any) -> list[list[int]]:
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("scan", ["auto", "full", "fused"])
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_packed_prompts_get_the_texts_that_each_gets_alone(scan: str, probability: float) -> None:
    plain = one_by_one(tiny_model("llama"))
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, probability=probability, seed=1, scan=scan)
    texts = one_by_one(model)
    assert continuous(model) == texts
    assert texts != plain


@pytest.mark.parametrize("scan", ["auto", "fused"])
def test_a_compiled_step_of_padded_rows_gives_the_same_texts(scan: str) -> None:
    """What is captured on a GPU is padded in the same way."""
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
    compiled = CompileConfig(backend="eager", mode=None)
    assert continuous(model, varlen_compile_config=compiled) == one_by_one(model)


@pytest.mark.parametrize("scan", ["auto", "fused"])
def test_nobody_measures_what_nobody_sees(scan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
    entropies: list[Tensor] = []
    output = cdsurgery.head.confident_output
    monkeypatch.setattr(
        cdsurgery.head,
        "confident_output",
        lambda plain, **fields: (entropies.append(fields["entropy"]), output(plain, **fields))[1],
    )
    continuous(model)
    measured = torch.cat(entropies, dim=1)
    assert not measured[..., 1].isnan().any()
    assert measured[..., -1].isnan().any()
