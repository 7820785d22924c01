"""onnxruntime-genai decodes an artifact as it does any decoder, and gets the tokens of the wrapped model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import pytest
import torch
from artifacts import EXPORTED, Client, artifact, wrapped
from families import mostly, token_ids
from transformers import DynamicCache, GenerationConfig

from cdsurgery import UnsupportedModelError
from cdsurgery.cli.main import main
from cdsurgery.export.artifact import clients
from cdsurgery.export.artifact.clients import GENAI, GENAI_TYPES, genai_config
from cdsurgery.export.artifact.manifest import read_manifest
from cdsurgery.export.signature import Signature, TensorSpec

NEW, PAD, END = 24, 0, 2
# Sinks, sliding windows, softcaps, head sizes that differ by layer, shared keys, convolution and recurrent states.
FAMILIES = (*EXPORTED, "gpt_oss", "gemma2", "gemma3_text", "gemma4_text", "qwen3_5_text")
every_family = pytest.mark.parametrize("family", mostly(("llama", "gpt_oss", "qwen3_5_text"), FAMILIES))


def decode(folder: Path, rows: Sequence[Sequence[int]], **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy texts of right-padded rows, and the layer that chose each token of each row."""
    model = onnxruntime_genai.Model(str(folder))
    params = onnxruntime_genai.GeneratorParams(model)
    length = max(map(len, rows))
    params.set_search_options(batch_size=len(rows), max_length=length + NEW, do_sample=False, **options)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array([[*row, *[PAD] * (length - len(row))] for row in rows], np.int32))
    layers: list[list[int]] = [[] for _ in rows]
    while not generator.is_done():
        generator.generate_next_token()
        for row, layer in zip(layers, generator.get_output("selected_layer"), strict="num_beams" not in options):
            row.append(int(layer[0]))
    return [generator.get_sequence(row).tolist()[length:] for row in range(len(rows))], layers


def truth(family: str, row: Sequence[int], **options: Any) -> list[int]:
    """What the wrapped PyTorch model says after one unpadded row."""
    ids = torch.tensor([list(row)])
    text = wrapped(family).generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, **options)
    return text[0, len(row) :].tolist()


def spoken(text: Sequence[int]) -> list[int]:
    """The text before its end: genai leaves the token that ended it out of some texts, and pads others behind it."""
    return list(text[: text.index(END)] if END in text else text)


@every_family
def test_greedy_tokens_are_those_of_pytorch(family: str) -> None:
    moved = 0
    for seed, length in enumerate((1, 2, 5, 17)):
        row = token_ids(1, length, seed)[0].tolist()
        (text,), (layers,) = decode(artifact(family), [row])
        assert spoken(text) == spoken(truth(family, row))
        moved += sum(layer < len(wrapped(family).anatomy.layers) for layer in layers)
    assert moved > 0, "no token was spoken by an earlier layer: the test would pass on the final logits"


def right_padded_truth(family: str, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the wrapped PyTorch model says after right-padded rows, whose padding stays between prompt and text."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    positions, last = (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1) - 1
    # Windows are not cut from the graph's cache, so not here either; recurrent states need layers that keep them.
    cache, texts = DynamicCache(config=wrapped(family).config if family == "qwen3_5_text" else None), []
    for _ in range(NEW):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        with torch.no_grad():
            logits = wrapped(family)(**inputs, use_cache=True).logits
        ids = logits[torch.arange(len(rows)), last].argmax(-1)[:, None]
        texts.append(ids)
        mask, last = torch.cat([mask, torch.ones_like(ids)], dim=1), torch.zeros_like(last)
        positions = mask.sum(-1, keepdim=True) - 1
    return torch.cat(texts, dim=1).tolist()


@every_family
def test_a_ragged_batch_gets_the_tokens_of_pytorch(family: str) -> None:
    rows = [token_ids(1, length, length)[0].tolist() for length in (7, 2, 4)]
    texts = [spoken(text) for text in decode(artifact(family), rows)[0]]
    assert texts == [spoken(text) for text in right_padded_truth(family, rows)]
    window = getattr(wrapped(family).config, "sliding_window", None)
    recurrent = any(spec.name.endswith(".recurrent") for spec in read_manifest(artifact(family)).signature.inputs)
    if window is None and not recurrent:  # a window counts padding and a state takes it in, in PyTorch as well
        assert texts == [spoken(truth(family, row)) for row in rows]


def test_beam_search_gives_the_text_of_pytorch() -> None:
    row = token_ids(1, 5)[0].tolist()
    (text,), _ = decode(artifact("llama"), [row], num_beams=3, early_stopping=False)
    assert spoken(text) == spoken(truth("llama", row, num_beams=3))


@pytest.mark.parametrize("name", [*sorted(set(GENAI_TYPES.values())), "decoder"])
def test_every_name_of_a_family_is_one_that_genai_knows(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("llama"), tmp_path / "copy")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["type"] = name
    (folder / "genai_config.json").write_text(json.dumps(config))
    row = token_ids(1, 3)[0].tolist()
    assert decode(folder, [row])[0] == decode(artifact("llama"), [row])[0]


@pytest.mark.parametrize(("model_type", "name"), [("gpt_oss", "gptoss"), ("gpt2", "decoder"), ("olmo2", "decoder")])
def test_a_family_that_genai_does_not_name_is_a_decoder_there(
    model_type: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped("llama")
    monkeypatch.setattr(model.config, "model_type", model_type)
    assert genai_config(model, read_manifest(artifact("llama")).signature)["model"]["type"] == name


@every_family
def test_the_config_names_tensors_that_the_graph_has(family: str) -> None:
    model = json.loads((artifact(family) / "genai_config.json").read_text())["model"]
    client = Client(artifact(family))
    depth = len(wrapped(family).anatomy.layers)
    for side, names in (("inputs", client.inputs), ("outputs", client.outputs)):
        filled = {name.replace("%d", str(n)) for name in model["decoder"][side].values() for n in range(depth)}
        extra = {"final_logits", "selected_layer", "entropy"} if side == "outputs" else set()
        assert set(names) - filled == extra
        assert all(
            any(re.fullmatch(name.replace("%d", r"\d+"), n) for n in names) for name in model["decoder"][side].values()
        )
    keys = next(value.shape for value in client.session.get_inputs() if value.name.endswith(".key"))
    assert (model["decoder"]["num_key_value_heads"], model["decoder"]["head_size"]) == (keys[1], keys[3])
    assert model["decoder"]["num_hidden_layers"] == depth
    assert model["context_length"] == 128
    assert model["vocab_size"] == 256


def test_special_tokens_and_sampling_are_those_that_generate_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    signature = read_manifest(artifact("llama")).signature
    settings = GenerationConfig(eos_token_id=[7, 9], do_sample=True, temperature=0.6, top_k=20)
    monkeypatch.setattr(model, "generation_config", settings)
    monkeypatch.setattr(model.config, "pad_token_id", None)
    config = genai_config(model, signature)
    found = {name: config["model"].get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert found == {"bos_token_id": 1, "eos_token_id": [7, 9], "pad_token_id": 7}
    assert {"do_sample": True, "temperature": 0.6, "top_k": 20}.items() <= config["search"].items()
    assert "top_p" not in config["search"]


def layer_signature(*states: TensorSpec, logits: bool = True) -> Signature:
    """The llama artifact's signature with other states of layer 0 at the end."""
    whole = read_manifest(artifact("llama")).signature
    outputs = [spec for spec in whole.outputs if logits or spec.name != "logits"]
    return Signature((*whole.inputs, *states), tuple(outputs))


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        (lambda: layer_signature(logits=False), "returns no logits"),
        (
            lambda: layer_signature(TensorSpec("past_key_values.0.value", "float32", ("batch", 2, "past", 8))),
            "layer 0 has keys .* and values .* same shape",
        ),
        (lambda: layer_signature(TensorSpec("past.9.conv", "float32", ("batch", 4, 3))), "layer 9 keeps conv; genai"),
        (lambda: layer_signature(TensorSpec("past.9.memory", "float32", ("batch", 4))), "layer 9 keeps memory"),
    ],
    ids=["no logits", "other values than keys", "convolution alone", "unknown state"],
)
def test_what_genai_cannot_run_gets_no_config_and_the_reason_is_returned(
    signature: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        genai_config(wrapped("llama"), signature())
    not_for = clients.write_client_files(tmp_path, wrapped("llama"), signature(), None)
    assert list(not_for) == [GENAI]
    assert not (tmp_path / "genai_config.json").exists()
    assert (tmp_path / "config.json").exists()


def test_a_convolution_and_a_recurrent_state_are_named_by_templates() -> None:
    states = [TensorSpec(f"past.3.{part}", "float32", ("batch", 4, 3)) for part in ("conv", "recurrent")]
    whole = read_manifest(artifact("llama")).signature
    hybrid = Signature((*(spec for spec in whole.inputs if ".3." not in spec.name), *states), whole.outputs)
    inputs = genai_config(wrapped("llama"), hybrid)["model"]["decoder"]["inputs"]
    assert inputs["past_conv_names"] == "past.%d.conv"
    assert inputs["past_recurrent_names"] == "past.%d.recurrent"
    assert inputs["past_key_names"] == "past_key_values.%d.key"


@pytest.mark.thorough
def test_the_command_and_the_manifest_say_for_whom_an_artifact_is_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Any:
        raise UnsupportedModelError("it keeps [states] of its own.")

    usual = artifact("llama")
    monkeypatch.setattr(clients, "genai_config", refuse)
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact"), "--json"]) == 0
    printed = capsys.readouterr()
    not_for = {GENAI: "it keeps [states] of its own."}
    assert json.loads(printed.out)["not_for"] == not_for
    assert "Not for onnxruntime-genai: it keeps [states] of its own." in printed.err
    assert read_manifest(tmp_path / "artifact").not_for == not_for
    assert read_manifest(usual).not_for == {}
