"""Results -> stdout, progress and errors -> stderr: colours on a terminal, plain text elsewhere.

rich is imported where it is first needed, so that help does not wait for it.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO
from unicodedata import category

from cdsurgery.errors import SurgeryError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.status import Status

# Wide enough that nothing we print is wrapped: what reads a pipe wants whole lines.
PIPE_WIDTH = 400
# How often a log, which cannot overwrite its last line, hears of progress.
LOG_SECONDS = 5.0


class Screen:
    """Where a command's words go.

    Args:
        as_json: results are one JSON document on stdout.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.out, self.err = _console(sys.stdout), _console(sys.stderr)

    def result(self, document: dict[str, Any], *text: RenderableType) -> None:
        """Print what the command found: the document with `--json`, else the texts."""
        if self.as_json:
            # Not through rich, which would wrap and style it. NaN is no JSON, hence `_finite`.
            print(json.dumps(_finite(document), indent=2, allow_nan=False), file=sys.stdout)
            return
        for part in text:
            self.out.print(part, soft_wrap=isinstance(part, str))  # a text has its lines already

    def error(self, error: SurgeryError) -> None:
        """Print what went wrong on one line; with `--json`, also as the document on stdout."""
        if self.as_json:
            self.result({"error": {"type": type(error).__name__, "message": str(error)}})
        self.err.print("cdsurgery: error:", style="bold red", end=" ")
        self.err.print(visible(str(error)), soft_wrap=True)

    @contextmanager
    def stage(self, text: str) -> Iterator[Stage]:
        """Show that something is under way, for as long as the block runs, and how long it took."""
        started = time.perf_counter()
        if self.err.is_terminal:
            from rich.text import Text

            with self.err.status(Text(text)) as status:
                yield Stage(text, self.err, status)
            self.err.print(text, end=" ")
            self.err.print(f"{time.perf_counter() - started:.1f} s", style="dim")
        else:
            self.err.print(text)
            yield Stage(text, self.err, None)


class Stage:
    """One piece of work under way."""

    def __init__(self, text: str, console: Console, status: Status | None) -> None:
        self._text, self._console, self._status = text, console, status
        self._noted = time.perf_counter()

    def note(self, progress: str) -> None:
        """Show how far it is; in a log, now and then."""
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(f"{self._text} {progress}"))
        elif time.perf_counter() - self._noted > LOG_SECONDS:
            self._noted = time.perf_counter()
            self._console.print(f"{self._text} {progress}")


class TokenCounter:
    """A streamer for `generate` that counts new tokens on a stage instead of printing them.

    Args:
        total: the most tokens that can come.
    """

    def __init__(self, stage: Stage, total: int) -> None:
        self._stage, self._total = stage, total
        self._count = -1  # the first thing a streamer is given is the prompt

    def put(self, _tokens: Any) -> None:
        """Count one more token."""
        self._count += 1
        self._stage.note(f"{self._count}/{self._total} tokens")

    def end(self) -> None:
        """Nothing is held back."""


def visible(text: str) -> str:
    """The text with control characters written out, line breaks and tabs excepted.

    A model can generate any byte: printed as it is, an escape code would colour, move or retitle the terminal.
    """
    return "".join(c.encode("unicode_escape").decode() if category(c) == "Cc" and c not in "\n\t" else c for c in text)


def spelled(piece: str) -> str:
    """A piece of text on one line: line breaks are written out too."""
    return visible(piece).replace("\n", "\\n")


def quoted(piece: str) -> str:
    """A piece of text on one line, in quotes that show its spaces."""
    return f"'{spelled(piece)}'"


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a model's text need not fit the locale's encoding
    terminal = stream.isatty()
    console = Console(
        file=stream,
        force_terminal=terminal,  # said outright, because FORCE_COLOR would put escape codes into pipes
        width=None if terminal else PIPE_WIDTH,
        markup=False,  # brackets in a model's text are not ours to interpret
        highlight=False,
        emoji=False,
    )
    console.on_broken_pipe = _broken_pipe  # type: ignore[method-assign]  # rich's exits with 1: a check failed
    return console


def _broken_pipe() -> NoReturn:
    raise BrokenPipeError


def _finite(value: Any) -> Any:
    """The same document with null for every number that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
