"""The command line: exit codes, one message for each bad input, JSON, and what goes to which stream."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from cdsurgery.cli import demo
from cdsurgery.cli.main import COMMANDS, main
from cdsurgery.cli.screen import Screen, TokenCounter, visible

LAYERS, CONTEXT = 4, 128
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 4 layers with a byte-level tokenizer, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["def f(x):\n    return x\n", "class A:\n    import os\n"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,  # the default leaves the logits near uniform, where every layer says the same
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shown(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The artifact that `demo --keep` left, and what the demo printed with --json."""
    artifact = tmp_path_factory.mktemp("kept") / "artifact"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert main(["demo", "--model", str(folder), "--keep", str(artifact), "--lookback", "3", "--json"]) == 0
        return artifact, json.loads(sys.stdout.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def transformers_as_it_was() -> Iterator[None]:
    """The commands silence transformers for good, which is right for a process of their own only."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, its output piped."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from cdsurgery.cli.main import main; sys.exit(main())", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


def exit_code(arguments: list[str]) -> int | str | None:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse leaves this way
        return stop.code


# Bad input


MODEL = "<model>"  # stands for the folder of the fixture
BAD_INPUT = {
    "unknown path": (["inspect", "/no/such/model"], "There is no folder /no/such/model"),
    "unknown path, generate": (["generate", "/no/such/model", "x"], "There is no folder /no/such/model"),
    "no config": (["inspect", "<empty>"], "has no config.json"),
    "encoder-decoder": (["inspect", "<t5>"], "encoder-decoder"),
    "lookback 0": (["inspect", MODEL, "--lookback", "0"], "lookback is 0; as an integer it must be at least 1"),
    "lookback negative": (["inspect", MODEL, "--lookback", "-2"], "lookback is -2"),
    "lookback beyond the depth": (["inspect", MODEL, "--lookback", "4"], "Use an integer in [1, 3]"),
    "lookback 0.0": (["inspect", MODEL, "--lookback", "0.0"], "a float in (0, 1]"),
    "lookback 1.5": (["inspect", MODEL, "--lookback", "1.5"], "a float in (0, 1]"),
    "lookback nan": (["inspect", MODEL, "--lookback", "nan"], "a float in (0, 1]"),
    "probability above 1": (["inspect", MODEL, "--probability", "1.1"], "it must be a number in [0, 1]"),
    "probability below 0": (["inspect", MODEL, "--probability", "-0.1"], "it must be a number in [0, 1]"),
    "seed negative": (["generate", MODEL, "x", "--seed", "-1"], "seed is -1"),
    "seed negative, plain": (["generate", MODEL, "x", "--plain", "--seed", "-1"], "seed is -1"),
    "unknown measure": (["inspect", MODEL, "--measure", "variance"], "it must be one of entropy, log_p_squared"),
    "empty prompt": (["generate", MODEL, ""], "The prompt is empty"),
    "beyond the context": (
        ["generate", MODEL, "x y z", "--max-new-tokens", "124"],
        "The prompt has 5 tokens; with 124 new ones that is 129, and the model's context holds 128. Shorten the prompt",
    ),
    "no new tokens": (["generate", MODEL, "x", "--max-new-tokens", "0"], "it must be at least 1"),
    "temperature 0": (["generate", MODEL, "x", "--sample", "--temperature", "0"], "it must be greater than 0"),
    "top-p above 1": (["generate", MODEL, "x", "--sample", "--top-p", "1.2"], "it must be in (0, 1]"),
    "temperature alone": (["generate", MODEL, "x", "--temperature", "0.5"], "add --sample"),
    "plain with lookback": (["generate", MODEL, "x", "--plain", "--lookback", "2"], "leave out --lookback"),
    "artifact exists": (["export", "onnx", MODEL, "<empty>"], "exists already"),
    "artifact in no folder": (["export", "onnx", MODEL, "<empty>/no/artifact"], "does not exist"),
    "kept artifact exists": (["demo", "--model", MODEL, "--keep", "<empty>"], "exists already"),
    "demo of no model": (["demo", "--model", "/no/such/model"], "There is no folder /no/such/model"),
    "not an artifact": (["verify", "<empty>", "--against", MODEL], "is not an artifact"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    T5Config().save_pretrained(tmp_path / "t5")
    places = {MODEL: str(folder), "<empty>": str(tmp_path / "empty"), "<t5>": str(tmp_path / "t5")}
    for mark, place in places.items():
        arguments = [argument.replace(mark, place) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("cdsurgery: error: ")]
    assert len(errors) == 1 and message in errors[0] and err.splitlines()[-1] == errors[0]
    assert out == "" and "Traceback" not in err and ESCAPE not in err
    assert sorted(tmp_path.rglob("*")) == before, "something was left half written"


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["generate", "model"], ["export", "onnx", "m"], ["inspect", "m", "--lookback", "ten"], ["verify"]],
    ids=" ".join,
)
def test_bad_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(arguments) == 2
    assert "usage: cdsurgery" in capsys.readouterr().err


def test_without_a_command_help_is_printed_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([]) == 2
    assert "examples:" in capsys.readouterr().err


def test_an_error_is_a_json_document_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["type"] == "InvalidInputError" and error["message"] in err


def test_an_export_that_fails_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdsurgery.errors import ArtifactError
    from cdsurgery.export import onnx

    def fail(*_arguments: Any) -> None:
        raise ArtifactError("the graph is not right")

    monkeypatch.setattr(onnx, "_trace", fail)
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact")]) == 2
    assert "the graph is not right" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_message_says_what_to_install(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("cdsurgery.export")
    monkeypatch.delitem(sys.modules, "cdsurgery.export")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact")]) == 2
    assert "pip install 'cdsurgery[onnx]'" in capsys.readouterr().err


# What the commands say


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


def test_export_lists_its_files(
    folder: Path, shown: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from cdsurgery import export

    monkeypatch.setattr(export, "to_onnx", lambda *_arguments, **_options: shown[0])  # the demo has made one already
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact"), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {"model.onnx", "cdsurgery.json", "tokenizer.json"} <= files.keys()
    assert main(["export", "onnx", str(folder), str(tmp_path / "artifact")]) == 0
    out, err = capsys.readouterr()
    assert "model.onnx" in out and "cdsurgery verify" in err


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


# The command in a process of its own


def test_help_names_every_command_and_loads_no_exporter() -> None:
    script = (
        "import sys\nfrom cdsurgery.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'onnx', 'onnxruntime', 'onnxscript', 'rich.console'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *help_lines, heavy = done.stdout.splitlines()
    for command in COMMANDS:
        assert f"cdsurgery {command}" in "\n".join(help_lines)
    assert heavy == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"example:\n  cdsurgery {command}" in out and "--json" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cdsurgery 0.")


def test_a_pipe_gets_plain_text(folder: Path) -> None:
    done = run_command("inspect", str(folder), FORCE_COLOR="1", COLUMNS="40", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "proof" in done.stdout
    assert ESCAPE not in done.stdout + done.stderr
    assert "tied" in done.stdout or "weights of its own" in done.stdout, "a line was wrapped"


def test_an_error_in_a_process_is_exit_code_2_without_a_traceback() -> None:
    done = run_command("generate", "/no/such/model", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert "cdsurgery: error: There is no folder /no/such/model" in done.stderr and "Traceback" not in done.stderr


# The screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colours_unless_told_otherwise(
    no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdsurgery.errors import SurgeryError

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stderr", Terminal())
    Screen(as_json=False).error(SurgeryError("[red] is not markup"))
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "[red] is not markup" in shown
    assert (f"{ESCAPE}[1;31m" in shown) is coloured


def test_a_stage_on_a_terminal_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Screen(as_json=False).stage("Counting [1]") as stage:
        counter = TokenCounter(stage, 2)
        for _ in range(3):  # the prompt and two tokens
            counter.put(None)
        counter.end()
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "Counting [1] 2/2 tokens" in shown and shown.rstrip().endswith(f" s{ESCAPE}[0m")


def test_control_characters_are_written_out() -> None:
    assert visible("a\x1b[31m\tb\r\n\u3000\u00a0\x9b") == "a\\x1b[31m\tb\\r\n\u3000\u00a0\\x9b"


def test_json_has_no_nan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=True).result({"entropy": (0.5, float("nan"), float("-inf"))})
    assert json.loads(capsys.readouterr().out) == {"entropy": [0.5, None, None]}
