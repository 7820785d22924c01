"""What the commands say and leave behind, as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import ESCAPE, LAYERS
from transformers import LlamaForCausalLM

from cdsurgery.cli import demo
from cdsurgery.cli.main import main
from cdsurgery.cli.screen import visible


def test_inspect_prints_the_anatomy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--lookback", "0.5"]) == 0
    out, err = capsys.readouterr()
    for part in ("llama", "4 LlamaDecoderLayer", "model.layers.0 ... model.layers.3", "model.norm", "lm_head", "proof"):
        assert part in out
    assert "2: layers 2 to 4 may speak" in out
    assert "Loading" in err and "Loading" not in out


def test_inspect_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"]["paths"] == [f"model.layers.{index}" for index in range(LAYERS)]
    assert found["unembedding"] == {"path": "lm_head", "shape": [270, 32], "tied": False, "bias": False}
    assert found["confident"]["lookback"] == LAYERS - 1
    assert found["proof"] == "bitwise"


def test_inspect_prints_logit_transforms_and_declared_layer_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=3.0,
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "softcap: final_logit_softcapping = 3.0" in out and "modeling_gemma2.py#L518-L521" in out
    assert "4: 2 sliding_attention, 2 full_attention" in out and "tied to the input embedding" in out


def test_generate_prints_the_text_on_stdout_and_the_rest_on_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(folder), "def ", "--max-new-tokens", "8", "--lookback", "3"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == visible("def " + found["text"]) + "\n"
    assert "8 tokens" in err and "mean depth" in err
    assert len(found["tokens"]) == len(found["selected_layers"]) == 8
    assert set(found["selected_layers"]) <= {1, 2, 3, 4} and set(found["selected_layers"]) != {4}


def test_plain_generation_is_that_of_the_model_as_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "def ", "--max-new-tokens", "8", "--plain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("def ", return_tensors="pt")["input_ids"]
    plain = LlamaForCausalLM.from_pretrained(folder).generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found["tokens"] == plain[0, prompt.shape[1] :].tolist()
    assert found["selected_layers"] is None


def test_a_seed_repeats_a_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["generate", str(folder), "def ", "--max-new-tokens", "12", "--sample", "--temperature", "2"]
        assert main([*arguments, "--top-p", "0.95", "--seed", seed, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] != texts[2]


def test_demo_compares_both_decodings_and_both_runtimes(shown: tuple[Path, dict[str, Any]]) -> None:
    artifact, found = shown
    assert found["passed"] and found["equal"] == found["compared"] == found["tokens"] > 0
    assert (found["layers"], found["lookback"]) == (LAYERS, 3)
    assert [prompt["prompt"] for prompt in found["prompts"]] == list(demo.PROMPTS)
    tokens = [token for prompt in found["prompts"] for token in prompt["tokens"]]
    assert found["tokens"] == len(tokens)
    assert found["moved"] == sum(token["selected_layer"] < LAYERS for token in tokens) > 0
    assert found["changed"] == sum(token["token"] != token["final_token"] for token in tokens) > 0
    assert all(len(token["entropy"]) == 4 for token in tokens)
    assert (artifact / "model.onnx").is_file()


def test_an_artifact_generates_what_its_model_does(
    folder: Path, shown: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for source, flags in ((folder, ["--lookback", "3"]), (shown[0], [])):
        assert main(["generate", str(source), "def ", "--max-new-tokens", "16", "--json", *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [each.pop("runtime") for each in found] == ["torch", "onnxruntime"]
    assert found[0] | {"model": None} == found[1] | {"model": None}


@pytest.mark.parametrize("flags", [["--lookback", "2"], ["--plain"]], ids=" ".join)
def test_an_artifact_keeps_its_selection(
    flags: list[str], shown: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(shown[0]), "def ", *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_verify_passes_and_fails_with_its_report(
    folder: Path, shown: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(shown[0]), "--against", str(folder)]) == 0
    assert "passed" in capsys.readouterr().out
    other = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    other.save_pretrained(tmp_path)
    assert main(["verify", str(shown[0]), "--against", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    # Rounded to bfloat16 its weights are others; it is compared in the dtype that was exported, and not refused.
    LlamaForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(tmp_path)
    assert main(["verify", str(shown[0]), "--against", str(tmp_path)]) == 1


def test_export_lists_its_files(
    folder: Path, shown: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from cdsurgery import export

    made = shutil.copytree(shown[0], tmp_path / "made")  # the demo has made one already
    (made / "more").mkdir()
    (made / "more" / "template.jinja").write_text("{{ x }}")
    monkeypatch.setattr(export, "to_onnx", lambda *_arguments, **_options: made)
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact"), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {"model.onnx", "cdsurgery.json", "tokenizer.json"} <= files.keys()
    assert files["more/template.jinja"] == 7 and "more" not in files
    assert main(["export", "onnx", str(folder), str(tmp_path / "an artifact")]) == 0
    out, err = capsys.readouterr()
    assert "model.onnx" in out and f"cdsurgery verify '{tmp_path / 'an artifact'}' --against" in err
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact"), "--no-parity"]) == 0
    assert "verify" not in capsys.readouterr().err


def test_the_demo_says_it_in_words(
    folder: Path,
    shown: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cdsurgery import export

    monkeypatch.setattr(export, "to_onnx", lambda *_arguments, **_options: None)
    monkeypatch.setattr(export, "load", lambda _folder, load=export.load: load(shown[0]))
    assert main(["demo", "--model", str(folder), "--lookback", "3"]) == 0
    out, err = capsys.readouterr()
    count = shown[1]["tokens"]
    assert out.splitlines()[-1] == f"PyTorch = ONNX Runtime: {count} of {count} tokens equal"
    assert "final layer" in out and "most confident layer" in out and "«" in out and " -> " in out
    assert ESCAPE not in out + err and "Exporting" in err

    monkeypatch.setattr(demo.Summary, "passed", False)
    assert main(["demo", "--model", str(folder), "--lookback", "3"]) == 1


def test_the_demo_outside_of_a_checkout_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cdsurgery.__file__", str(tmp_path / "cdsurgery" / "__init__.py"))
    assert main(["demo"]) == 2
    assert "--model" in capsys.readouterr().err
