"""Models from a folder: safetensors only, no code of the folder's own, and an error that says what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, token_ids
from transformers import AutoConfig

import cdsurgery
from cdsurgery import InvalidInputError, UnsupportedModelError
from cdsurgery.loading import load_causal_lm, load_tokenizer


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.mark), "w")


def test_wrap_takes_the_folder_of_a_model(tmp_path: Path) -> None:
    plain = tiny_model("qwen3")
    plain.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            cdsurgery.wrap(tmp_path, lookback=2)(token_ids(1, 5)).final_logits, plain(token_ids(1, 5))[0]
        )
        assert torch.equal(cdsurgery.wrap(str(tmp_path)).lm_head.weight, plain.lm_head.weight)  # type: ignore[union-attr]


def test_a_model_comes_in_the_dtype_its_config_names(tmp_path: Path) -> None:
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path)
    assert load_causal_lm(tmp_path).dtype == torch.bfloat16


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    mark = tmp_path / "unpickled"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(InvalidInputError, match=r"could not be loaded.*pickled weights are never loaded"):
        load_causal_lm(tmp_path)
    torch.save(tiny_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInputError, match="pickled weights are never loaded"):
        load_causal_lm(tmp_path)
    assert not mark.exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "configuration_own.py").write_text(f"open({str(mark)!r}, 'w')\nclass OwnConfig: pass\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match="must be loaded by you and passed as objects"):
        load_causal_lm(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(("model_type", "found"), [("t5", "an encoder-decoder"), ("vit", "no causal LM")])
def test_what_is_no_causal_lm_is_refused_before_its_weights_are_read(
    model_type: str, found: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=found):
        load_causal_lm(tmp_path)


def test_weights_that_do_not_fit_or_are_truncated_and_a_missing_tokenizer_are_said(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"No tokenizer could be loaded.*one of: .+ Save it .*save_pretrained"):
        load_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(InvalidInputError, match="could not be loaded"):
        load_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InvalidInputError, match="could not be loaded"):
        load_causal_lm(tmp_path)


def test_weights_that_are_not_there_are_never_random(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(InvalidInputError, match=r"lack 9 of the model's tensors, such as model\.layers\.6\."):
        cdsurgery.wrap(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "null", r"The config\.json of .* is not that of a model"),
        ("config.json", {"hidden_size": "x"}, r"The config\.json of .* is not that of a model.*'hidden_size'"),
        ("config.json", {"hidden_act": "nope"}, r"cannot be built from its config\.json \(KeyError: 'nope'\)"),
        ("tokenizer.json", "{}", "No tokenizer could be loaded"),
    ],
)
def test_files_that_make_no_sense_are_named(tmp_path: Path, file: str, content: Any, message: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    if isinstance(content, dict):
        content = json.dumps(json.loads((tmp_path / file).read_text()) | content)
    (tmp_path / file).write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        load_tokenizer(tmp_path) if file == "tokenizer.json" else load_causal_lm(tmp_path)
