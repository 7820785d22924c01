"""Wrapped models and what they return, pickled and back, as torch.save and processes that are spawned do."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, token_ids
from peft import LoraConfig, get_peft_model

import cdsurgery
from cdsurgery import ConfidentOutput
from cdsurgery.transforms import TRANSFORMS

# peft 0.21 asks transformers 5.23 for gradient checkpointing by the name it had before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LOOKBACK = 3
IDS = token_ids(2, 9)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    for name in ("logits", "final_logits", "selected_layer", "entropy"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def wrapped(family: str = "llama", **options: Any) -> Any:
    return cdsurgery.wrap(tiny_model(family), lookback=LOOKBACK, **options)


@pytest.mark.parametrize(
    "make",
    [
        wrapped,
        lambda: wrapped("gemma2"),
        lambda: wrapped("mamba").bfloat16(),
        lambda: wrapped("granite", scan="fused"),
        lambda: wrapped("rwkv", scan="lazy", probability=0.5, seed=3),
        lambda: adapted(wrapped()),
        lambda: cdsurgery.wrap(adapted(tiny_model("llama")), lookback=LOOKBACK),
    ],
    ids=["full", "softcap", "cast", "fused", "lazy", "adapter around", "adapter inside"],
)
@torch.no_grad()
def test_a_wrapped_model_is_pickled(make: Any) -> None:
    model = make()
    out = model(input_ids=IDS)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model)
        assert_equal(twin(input_ids=IDS), out)
        # Of a fused scan, final logits are other sums.
        torch.testing.assert_close(cdsurgery.unwrap(twin)(input_ids=IDS).logits, out.final_logits)
        assert not any(module._forward_hooks for module in twin.modules())
    assert_equal(model(input_ids=IDS), out)


def test_a_copy_of_an_object_of_a_derived_class_is_of_that_class() -> None:
    model = wrapped()
    derived = model.__class__ = type("Derived", (type(model),), {})  # as fully_shard of FSDP does
    assert type(copy.deepcopy(model)) is derived


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mamba"])
@torch.no_grad()
def test_what_it_returns_is_pickled(family: str) -> None:
    out = wrapped(family)(IDS, output_hidden_states=True)
    kept, again = pickle.loads(pickle.dumps((1, out)))
    assert kept == 1 and isinstance(again, ConfidentOutput) and list(again) == list(out)
    assert_equal(again, out)
    file = io.BytesIO()
    torch.save({"outputs": [out]}, file)
    file.seek(0)
    assert_equal(torch.load(file, weights_only=False)["outputs"][0], out)


def test_every_transform_of_a_tail_is_pickled() -> None:
    assert pickle.loads(pickle.dumps(TRANSFORMS)) == TRANSFORMS


@pytest.mark.thorough
@torch.no_grad()
def test_another_process_has_the_same_model(tmp_path: Path) -> None:
    model = wrapped("gemma2")
    torch.save((model, model(IDS)), tmp_path / "pickled")
    script = (
        "import sys, torch; torch.set_num_threads(1); torch.set_grad_enabled(False); "
        "model, out = torch.load(sys.argv[1], weights_only=False); ours = model(torch.tensor(eval(sys.argv[2]))); "
        "assert all(torch.equal(ours[name], out[name]) for name in ('logits', 'selected_layer', 'entropy'))"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "pickled", str(IDS.tolist())], check=True)
