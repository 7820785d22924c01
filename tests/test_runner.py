"""`export.load`: an artifact behaves as the wrapped model does, in a call and in `generate`."""

from __future__ import annotations

import pytest
import torch
from artifacts import artifact, wrapped
from families import token_ids
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from cdsurgery import ConfidentOutput, InvalidInputError, export
from cdsurgery.export import OnnxRunner

NEW = 24


@pytest.fixture(scope="module")
def runner() -> OnnxRunner:
    return export.load(artifact("llama"))


def left_padded() -> dict[str, Tensor]:
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, :2] = 0
    return {"input_ids": token_ids(3, 8), "attention_mask": mask}


def test_a_call_returns_the_fields_of_a_wrapped_model(runner: OnnxRunner) -> None:
    ids = token_ids(2, 6)
    found, truth = runner(ids), wrapped("llama")(ids, logits_to_keep=1)
    assert isinstance(found, ConfidentOutput)
    for name in ("logits", "final_logits", "selected_layer", "entropy"):
        assert found[name].shape == truth[name].shape
        assert found[name].dtype == truth[name].dtype
        assert torch.allclose(found[name].double(), truth[name].double(), rtol=1e-4, atol=1e-4)
    assert found.past_key_values.get_seq_length() == 6


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampling", "beams"],
)
def test_generate_gives_the_tokens_of_pytorch(runner: OnnxRunner, options: dict[str, object]) -> None:
    inputs = left_padded()
    torch.manual_seed(3)
    found = runner.generate(**inputs, max_new_tokens=NEW, **options)
    torch.manual_seed(3)
    truth = wrapped("llama").generate(**inputs, max_new_tokens=NEW, **options)
    assert torch.equal(found, truth)
    assert found.shape[1] > 8 + 4


def test_a_streamer_sees_every_token_once_and_in_order(runner: OnnxRunner) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    collector = Collector()
    ids = token_ids(1, 4)
    found = runner.generate(ids, max_new_tokens=NEW, do_sample=False, streamer=collector)
    assert collector.tokens == found[0].tolist()
    assert collector.ended


def test_a_chunked_prompt_gives_what_the_whole_prompt_gives(runner: OnnxRunner) -> None:
    ids = token_ids(2, 10)
    whole = runner(ids)
    past = None
    for chunk in ids.split([3, 1, 6], dim=1):
        out = runner(chunk, past_key_values=past)
        past = out.past_key_values
    assert torch.allclose(out.logits, whole.logits, rtol=0, atol=1e-3)
    assert torch.equal(out.selected_layer, whole.selected_layer)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[3, -1]])}, "ids from -1 to 3; allowed are 0 to 255"),
        ({"input_ids": torch.tensor([[256]])}, "ids from 256 to 256"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": torch.tensor([1, 2])}, r"shape \[2\]"),
        ({"input_ids": torch.tensor([[1.0]])}, "torch.float32"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 2)}, r"must be \[1, 3\]"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "position_ids": torch.ones(1, 2)}, r"\[1, 3\]"),
        ({"input_ids": torch.ones(1, 129, dtype=torch.int64)}, "position 128; the model's context is 128 tokens"),
    ],
)
def test_bad_inputs_are_said_clearly(runner: OnnxRunner, inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        runner(**inputs)


def test_a_provider_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(InvalidInputError, match=r"has no NoSuchProvider here; it has .*CPUExecutionProvider"):
        export.load(artifact("llama"), providers=["NoSuchProvider"])
