"""The command line as a process: help, streams, colours, progress."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ESCAPE, PROCESS, exit_code, run_command

from cdsurgery.cli.main import COMMANDS
from cdsurgery.cli.screen import Screen, TokenCounter, visible


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


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_who_has_seen_enough_is_no_error(folder: Path, flags: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*PROCESS, "inspect", str(folder), *flags]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr
    assert done.returncode == 141  # what a shell says of a program that the signal ended
