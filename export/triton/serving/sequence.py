"""One request on its way: its tokens so far, what it still owes its client, and why it ends."""

from __future__ import annotations

from collections.abc import Sequence as Series
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .detokenizer import Detokenizer, StopWords
from .errors import RequestError
from .request import GenerationRequest
from .sampling import Sampler


class Reply(Protocol):
    """The way back to the client."""

    def send(self, outputs: dict[str, NDArray[Any]], final: bool) -> None:
        """Send a response; the last one is final."""

    def fail(self, error: RequestError) -> None:
        """Send an error, which is final."""

    def cancelled(self) -> bool:
        """Whether the client has gone."""


class Choice:
    """One generated token and what is told of it: the layer that spoke, its entropy in nats, whether it changed."""

    __slots__ = ("changed", "entropy", "layer", "token")

    def __init__(self, token: int, layer: int, entropy: float, changed: bool) -> None:
        self.token, self.layer, self.entropy, self.changed = token, layer, entropy, changed


class Sequence:
    """A request, from its arrival to its last response.

    Attributes:
        request: what was asked for.
        prompt: its ids.
        sampler: chooses its tokens.
        reply: where they go.
        deadline: on the scheduler's clock, seconds; None for never.
        queue_deadline: while it waits.
        taken: prompt tokens that the graph has seen.
        states: its cache while the prompt is taken in.
        newest: the last token it got, which the graph has not seen yet.
        over: whether its place belongs to others again.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: list[int],
        reply: Reply,
        decode: Any,
        end_tokens: Series[int],
        *,
        deadline: float | None = None,
        queue_deadline: float | None = None,
    ) -> None:
        self.request, self.prompt, self.reply = request, prompt, reply
        self.deadline, self.queue_deadline = deadline, queue_deadline
        self.sampler = Sampler(request.sampling, prompt)
        self.over = False
        self.taken = 0
        self.states: list[Any] = []
        self.newest = -1
        self._end_tokens = frozenset(end_tokens)
        self._detokenizer = Detokenizer(decode, prompt)
        self._stop_words = StopWords(request.stop_words)
        self._count = 0
        self._text = request.text if request.echo else ""
        self._unsent: list[Choice] = []
        self._due = False

    @property
    def length(self) -> int:
        """Tokens that the cache holds once the newest one has been run: all but that one."""
        return len(self.prompt) + self._count - 1

    def accept(self, choice: Choice) -> bool:
        """Take the next token; return whether the request is done."""
        self._count += 1
        self.newest = choice.token
        self._unsent.append(choice)
        piece, stopped = self._stop_words.push(self._detokenizer.push(choice.token))
        done = stopped or choice.token in self._end_tokens or self._count >= self.request.max_tokens
        if done and not stopped:
            rest, _ = self._stop_words.push(self._detokenizer.flush())
            piece += rest + self._stop_words.flush()
        self._text += piece
        self._due = done or (self.request.stream and bool(piece))
        return done

    def respond(self, final: bool) -> None:
        """Send what the newest token has completed."""
        if self._due:
            self.reply.send(self._outputs(), final)
            self._text, self._unsent, self._due = "", [], False

    def _outputs(self) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = {"text_output": np.array([[self._text.encode("utf-8")]], object)}
        if self.request.input_count:
            outputs["num_input_tokens"] = np.array([[len(self.prompt)]], np.int32)
        if self.request.output_count:
            outputs["num_output_tokens"] = np.array([[len(self._unsent)]], np.int32)
        if self.request.layers:
            outputs["selected_layer"] = np.array([[choice.layer for choice in self._unsent]], np.int32)
            outputs["entropy"] = np.array([[choice.entropy for choice in self._unsent]], np.float32)
            outputs["changed"] = np.array([[choice.changed for choice in self._unsent]], np.bool_)
        return outputs
