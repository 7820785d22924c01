"""Models that read images: proven on text, and given an image they select as the plain model's layers say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model, token_ids, truth
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import cdsurgery

LOOKBACK, ROWS, TOKENS_PER_IMAGE, STEPS = 4, 2, 4, 3
IMAGE = 255  # the token that stands for a part of the image
IDS = token_ids(ROWS, 12).clamp(max=IMAGE - 1)
IDS[:, 2 : 2 + TOKENS_PER_IMAGE] = IMAGE

_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
# 4 x 4 patches of 8 x 8 pixels in three colours, of which the towers make TOKENS_PER_IMAGE states.
GRID = torch.cartesian_prod(torch.arange(4), torch.arange(4))
PIXELS = torch.rand(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(2))

# model type -> options of its config, and what it is given of the images.
READERS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "qwen3_5": (
        {"image_token_id": IMAGE},
        {
            "pixel_values": PIXELS.reshape(ROWS * 16, 192).repeat(1, 2),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
        },
    ),
    "gemma3": ({"image_token_id": IMAGE, "mm_tokens_per_image": TOKENS_PER_IMAGE}, {"pixel_values": PIXELS}),
    "gemma4": (
        {"image_token_id": IMAGE, "vision_config": _GEMMA4_VISION},
        {"pixel_values": PIXELS.reshape(ROWS, 16, 192), "image_position_ids": GRID.expand(ROWS, 16, 2)},
    ),
    "llama4": ({"image_token_id": IMAGE, "vision_config": {"intermediate_size": 256}}, {"pixel_values": PIXELS}),
}


def reader(family: str) -> Any:
    return tiny_model(family, mapping=MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, **READERS[family][0])


def inputs(family: str, ids: Tensor) -> dict[str, Tensor]:
    """With the places of the image, by the name under which the family wants them."""
    places = {"gemma3": "token_type_ids", "llama4": "attention_mask"}.get(family, "mm_token_type_ids")
    marks = torch.ones_like(ids) if family == "llama4" else (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), places: marks} | READERS[family][1]


@pytest.mark.parametrize("family", READERS)
@torch.no_grad()
def test_a_model_that_is_given_an_image_selects_as_its_layers_say(family: str) -> None:
    given = inputs(family, IDS)
    true = truth(reader(family), LOOKBACK, **given)
    model = cdsurgery.wrap(reader(family), lookback=LOOKBACK)
    out = model(**given)
    assert torch.equal(out.final_logits, true.candidates[0])
    assert torch.equal(out.selected_layer, true.layer) and true.layer.unique().numel() > 1
    assert torch.equal(out.logits, true.logits)
    torch.testing.assert_close(out.entropy.double(), true.entropy, rtol=1e-6, atol=0)
    blind = truth(reader(family), LOOKBACK, input_ids=IDS.clamp(max=IMAGE - 1))
    assert not torch.equal(blind.candidates[0][:, -1], out.final_logits[:, -1]), "the image changes nothing"


@pytest.mark.parametrize("family", READERS)
@torch.no_grad()
def test_text_about_an_image_is_that_of_a_loop_over_full_forwards(family: str) -> None:
    plain, text = reader(family), IDS
    for _ in range(STEPS):
        newest = truth(plain, LOOKBACK, **inputs(family, text)).logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, newest], dim=1)
    model = cdsurgery.wrap(reader(family), lookback=LOOKBACK)
    model.generation_config.eos_token_id = None
    written = model.generate(**inputs(family, IDS), max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(written, text)


@torch.no_grad()
def test_a_softcap_that_is_declared_and_never_applied_is_told_from_one_that_is() -> None:
    capped = {"final_logit_softcapping": 8.0}
    reads = tiny_model("gemma3", mapping=MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, text_config=capped)
    for model, found in ((reads, []), (tiny_model("gemma3_text", **capped), ["softcap"])):
        assert model.config.get_text_config().final_logit_softcapping == 8.0
        model.lm_head.weight.mul_(1e-3)  # logits so small lie within rounding of their softcap in bfloat16
        assert [row.name for row in cdsurgery.wrap(model.bfloat16()).anatomy.transforms] == found
