"""What lies beside a foreign model, its configuration, tokenizer and weights: it comes along, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from grafts import copied, foreign, grafted, refused
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cdsurgery import ArtifactError, InvalidInputError, UnsupportedModelError
from cdsurgery.export.graft.companions import read_config, write_companions


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return copied("optimum-llama", tmp_path / "theirs")


@pytest.fixture
def external(tmp_path: Path) -> Path:
    return copied("genai-llama", tmp_path / "theirs")


def test_configurations_come_along() -> None:
    config = json.loads((grafted("genai-llama") / "genai_config.json").read_text())
    theirs = json.loads((foreign("genai-llama").parent / "genai_config.json").read_text())
    assert config == theirs
    assert json.loads((grafted("genai-llama") / "config.json").read_text())["hidden_size"] == 32
    ours, theirs = (folder / "config.json" for folder in (grafted("optimum-gpt2"), foreign("optimum-gpt2").parent))
    assert ours.read_bytes() == theirs.read_bytes()


def test_all_chat_templates_of_a_tokenizer_come_along(theirs: Path, tmp_path: Path) -> None:
    """transformers writes one beside the tokenizer, and the others into a folder."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(theirs.parent)
    (tmp_path / "artifact").mkdir()
    write_companions(theirs, tmp_path / "artifact", read_config(theirs))
    assert AutoTokenizer.from_pretrained(tmp_path / "artifact").chat_template == tokenizer.chat_template


def test_layers_that_the_configuration_does_not_know_are_refused(theirs: Path) -> None:
    config = json.loads((theirs.parent / "config.json").read_text())
    (theirs.parent / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    refused(theirs, UnsupportedModelError, "4 layers that read the cache .* num_hidden_layers=5")


def test_a_file_without_or_with_a_broken_configuration_is_refused(theirs: Path) -> None:
    (theirs.parent / "config.json").write_text("{")
    refused(theirs, InvalidInputError, r"config\.json cannot be used")
    (theirs.parent / "config.json").unlink()
    refused(theirs, InvalidInputError, r"neither config\.json nor genai_config\.json")
    (theirs.parent / "genai_config.json").write_text('{"model": {"type": "llama"}}')
    refused(theirs, InvalidInputError, "KeyError: 'decoder'")


def test_another_vocabulary_and_optional_files_that_say_nothing_are_refused(theirs: Path) -> None:
    config = json.loads((theirs.parent / "config.json").read_text())
    (theirs.parent / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    refused(theirs, UnsupportedModelError, "logits of 96 tokens, and its configuration says vocab_size=97")
    (theirs.parent / "config.json").write_text(json.dumps(config))
    for name, content in (
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("genai_config.json", "{}"),
        ("genai_config.json", '{"model": []}'),
    ):
        (theirs.parent / name).write_text(content)
        refused(theirs, InvalidInputError, rf"{name}.* cannot be used \(\w+: .*Mend it, or take it away")
        (theirs.parent / name).unlink()


def test_a_configuration_without_what_the_graph_does_not_show_is_refused(theirs: Path) -> None:
    bloom = {"model_type": "bloom", "n_layer": 4, "n_head": 2, "hidden_size": 32, "vocab_size": 96}
    (theirs.parent / "config.json").write_text(json.dumps(bloom))
    refused(theirs, InvalidInputError, r"bloom names no max_position_embeddings.*Add it to config\.json")


def test_weights_that_are_not_whole_beside_the_model_are_refused(external: Path) -> None:
    data = external.parent / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    refused(external, ArtifactError, "is truncated or of another model")
    data.unlink()
    refused(external, ArtifactError, "does not exist. Put the model's weights beside it")
    (external.parent.parent / "elsewhere").write_bytes(whole)
    data.symlink_to(external.parent.parent / "elsewhere")
    refused(external, ArtifactError, "is a link")
    data.unlink()
    data.hardlink_to(external.parent.parent / "elsewhere")
    refused(external, ArtifactError, "is a link")


@pytest.mark.parametrize("location", ["../elsewhere", "{folder}/elsewhere", "sub/../../elsewhere"])
def test_weights_out_of_the_folder_are_refused(external: Path, location: str) -> None:
    folder = external.parent.parent
    shutil.copy(external.parent / "model.onnx.data", folder / "elsewhere")
    model = onnx.load(external, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location.format(folder=folder)
    external.write_bytes(model.SerializeToString())
    refused(external, ArtifactError, "only in files beside the model")
