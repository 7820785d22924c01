"""Requests as they come -> one batch that runs on, which they join and leave at every step.

A step: 1 drop those whose client has gone or whose time is up, 2 give free slots to those that wait, 3 take in at most
one chunk of prompt tokens, 4 put those that begin and those that stay into one cache, 5 run the batch by one token.
So a prompt of any length holds the others up by no more than a chunk. Iteration-level scheduling is Orca's
(https://www.usenix.org/conference/osdi22/presentation/yu), chunks of a prompt between steps are Sarathi's
(https://arxiv.org/abs/2308.16369).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import Rows, mask_and_positions, regroup
from .decoder import Decoder, empty_states
from .errors import RequestError
from .metrics import Counts
from .sequence import Choice, Sequence
from .settings import Settings

LOG = logging.getLogger(__name__)  # what comes of it stands in the server's log

# Asking Triton whether a client has gone costs a message to the server, for each request.
CANCEL_CHECK_SECONDS = 0.1


class Scheduler:
    """The loop. `submit` is for any thread; all else happens in the one that calls `step`.

    Attributes:
        counts: what has happened so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._decoder, self._settings, self._clock = decoder, settings, clock
        self._growing = [spec.growing for spec in settings.past]
        self.counts = Counts()
        self._open = 0  # requests that wait or have a slot, until their client is told the end
        self._queue: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._prefilling: deque[Sequence] = deque()
        self._ready: list[Sequence] = []  # the prompt is in; they join the batch at the next step
        self._running: list[Sequence] = []  # row r of the batch is the r-th
        self._rows: list[int] = []  # the row of each running request in `_states`, whose batch may hold others yet
        self._states: list[Any] = []
        self._batch = 0
        self._next_cancel_check = 0.0

    def submit(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            RequestError: the queue is full, or the model is being unloaded.
        """
        with self._changed:
            if self._closed:
                raise RequestError("UNAVAILABLE", "The model is being unloaded. Send the request again.")
            slots, queue = self._settings.slots, self._settings.queue
            if self._open >= slots + queue:
                raise RequestError(
                    "UNAVAILABLE",
                    f"All {slots} slots are taken and {queue} requests wait already, which is this model's limit. Send "
                    "it again later.",
                )
            self._open += 1
            self._queue.append(sequence)
            self._changed.notify()

    def wait(self, timeout: float) -> None:
        """Return when there is something to do, or after so many seconds."""
        with self._changed:
            if not (self._closed or self._queue or self._in_slots):
                self._changed.wait(timeout)

    def close(self) -> None:
        """Take no more requests, and fail those that have not ended."""
        with self._changed:
            self._closed = True
            left = [*self._queue, *self._prefilling, *self._ready, *self._running]
            self._queue.clear()
            self._changed.notify()
        self._prefilling.clear()
        self._ready, self._running, self._rows = [], [], []
        for sequence in left:
            self._fail(sequence, RequestError("UNAVAILABLE", "The model was unloaded before the answer ended."))

    def step(self) -> bool:
        """Do what is to do once; return whether there is more.

        An error of the runtime ends the requests in a slot, each with its message, and the loop goes on.
        """
        try:
            self._drop()
            self._admit()
            self._prefill()
            self._join()
            self._decode()
        except Exception as error:
            message = f"The decoder failed: {type(error).__name__}: {error}"
            left = [*self._prefilling, *self._ready, *self._running]
            self._prefilling.clear()
            self._ready, self._running, self._rows, self._states = [], [], [], []
            for sequence in left:
                self._fail(sequence, RequestError("INTERNAL", message))
        self.counts.running, self.counts.queued = self._in_slots, len(self._queue)
        return bool(self._queue or self._in_slots)

    @property
    def _in_slots(self) -> int:
        return len(self._prefilling) + len(self._ready) + len(self._running)

    def _drop(self) -> None:
        now = self._clock()
        check_cancelled = now >= self._next_cancel_check
        if check_cancelled:
            self._next_cancel_check = now + CANCEL_CHECK_SECONDS
        with self._changed:
            waiting = list(self._queue)
        gone = {
            id(sequence)
            for sequence in [*waiting, *self._prefilling, *self._ready, *self._running]
            if self._is_over(sequence, now, check_cancelled)
        }
        if not gone:
            return
        with self._changed:
            self._queue = deque(sequence for sequence in self._queue if id(sequence) not in gone)
        self._prefilling = deque(sequence for sequence in self._prefilling if id(sequence) not in gone)
        self._ready = [sequence for sequence in self._ready if id(sequence) not in gone]
        self._keep([id(sequence) not in gone for sequence in self._running])

    def _is_over(self, sequence: Sequence, now: float, check_cancelled: bool) -> bool:
        """Whether a request has ended without an answer; it has then been told."""
        if sequence.queue_deadline is not None and now >= sequence.queue_deadline:
            seconds = self._settings.queue_timeout_seconds
            self._fail(sequence, RequestError("UNAVAILABLE", f"No slot became free within {seconds:g} seconds."))
            return True
        if sequence.deadline is not None and now >= sequence.deadline:
            self._fail(sequence, RequestError("UNAVAILABLE", "The request's time was over before its answer was."))
            return True
        if check_cancelled and sequence.reply.cancelled():
            self.counts.cancelled += 1
            self._end(sequence)
            self._tell(sequence, RequestError("CANCELLED", "The client cancelled the request."))
            return True
        return False

    def _admit(self) -> None:
        with self._changed:
            free = self._settings.slots - self._in_slots
            admitted = [self._queue.popleft() for _ in range(min(free, len(self._queue)))]
            self._prefilling += admitted  # first of all, so that an error finds them
        for sequence in admitted:
            sequence.queue_deadline = None
            sequence.states = self._decoder.place(empty_states(self._settings.past))

    def _prefill(self) -> None:
        """Take in a chunk of prompt tokens; who does not get its whole prompt in goes to the end of the line."""
        left = self._settings.chunk
        while left > 0 and self._prefilling:
            sequence = self._prefilling[0]  # and it stays there until it has been run, so that an error finds it
            start = sequence.taken
            ids = np.array([sequence.prompt[start : start + left]], np.int64)
            mask, positions = mask_and_positions([start], start, ids.shape[1])
            tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            ended = start + ids.shape[1] == len(sequence.prompt)
            wanted = self._wanted([sequence]) if ended else ["selected_layer"]
            results, sequence.states = self._decoder.run(tokens, sequence.states, wanted)
            sequence.taken += ids.shape[1]
            self.counts.prompt_tokens += ids.shape[1]
            left -= ids.shape[1]
            if not ended:
                self._prefilling.rotate(-1)
                continue
            (choice,) = self._choices([sequence], results)
            self._prefilling.popleft()
            if not self._accept(sequence, choice):
                self._ready.append(sequence)

    def _join(self) -> None:
        """Make the batch that which runs: only when somebody has come or gone is anything copied."""
        if not self._ready and len(self._rows) == self._batch:
            return
        groups = []
        if self._running:
            lengths = [sequence.length for sequence in self._running]
            groups.append(Rows(self._decoder.fetch(self._states), self._rows, lengths))
        groups += [Rows(self._decoder.fetch(sequence.states), [0], [sequence.length]) for sequence in self._ready]
        self._running += self._ready
        for sequence in self._ready:
            sequence.states = []
        self._ready = []
        self._batch, self._rows = len(self._running), list(range(len(self._running)))
        self._states = self._decoder.place(regroup(groups, self._growing)) if groups else []

    def _decode(self) -> None:
        if not self._running:
            return
        lengths = [sequence.length for sequence in self._running]
        # The cache is as wide as its longest row: the columns of those that left went with them in `_join`.
        mask, positions = mask_and_positions(lengths, max(lengths), 1)
        ids = np.array([sequence.newest for sequence in self._running], np.int64)[:, None]
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        results, self._states = self._decoder.run(tokens, self._states, self._wanted(self._running))
        choices = self._choices(self._running, results)
        self._keep([not self._accept(*pair) for pair in zip(self._running, choices, strict=True)])

    def _keep(self, stay: list[bool]) -> None:
        """Forget rows of the batch; their part of the cache goes at the next join."""
        self._running = [sequence for sequence, stays in zip(self._running, stay, strict=True) if stays]
        self._rows = [row for row, stays in zip(self._rows, stay, strict=True) if stays]

    def _wanted(self, sequences: list[Sequence]) -> list[str]:
        """The outputs that these requests need."""
        confident = any(sequence.request.confident for sequence in sequences)
        final = any(sequence.request.layers or not sequence.request.confident for sequence in sequences)
        entropy = any(sequence.request.layers for sequence in sequences)
        wanted = (("logits", confident), ("final_logits", final), ("selected_layer", True), ("entropy", entropy))
        return [name for name, needed in wanted if needed]

    def _choices(self, sequences: list[Sequence], results: dict[str, NDArray[Any]]) -> list[Choice | None]:
        """The next token of every row; None where the logits are no numbers, which that request has been told."""
        largest: dict[str, NDArray[Any]] = {}
        for name in {"logits", "final_logits"} & results.keys():
            results[name] = results[name][:, -1]
            largest[name] = results[name].argmax(axis=-1)
        layers = results["selected_layer"][:, -1]
        choices: list[Choice | None] = []
        for row, sequence in enumerate(sequences):
            name = "logits" if sequence.request.confident else "final_logits"
            logits, best = results[name][row], int(largest[name][row])
            if not np.isfinite(logits[best]):  # argmax finds a NaN or an infinity, if there is one
                self._fail(sequence, RequestError("INTERNAL", "The model's logits are NaN or infinite."))
                choices.append(None)
                continue
            token = best if sequence.sampler.plain else sequence.sampler.choose(logits)
            layer = int(layers[row]) if sequence.request.confident else self._settings.layers
            entropy, changed = 0.0, False
            if sequence.request.layers:
                entropy = float(results["entropy"][row, -1, self._settings.layers - layer])
                changed = token != int(largest["final_logits"][row])
            depth = self._settings.layers - layer
            self.counts.tokens += 1
            self.counts.moved += depth > 0
            self.counts.depth += depth
            choices.append(Choice(token, layer, entropy, changed))
        return choices

    def _accept(self, sequence: Sequence, choice: Choice | None) -> bool:
        """Give a request its next token; return whether it has ended. What goes wrong with it ends it alone."""
        if choice is None:
            return True
        try:
            if done := sequence.accept(choice):
                self._end(sequence)
            sequence.respond(final=done)
        except Exception as error:
            self.counts.failed += 1
            self._end(sequence)
            self._tell(sequence, RequestError("INTERNAL", f"The answer failed: {type(error).__name__}: {error}"))
            return True
        self.counts.finished += done
        return done

    def _end(self, sequence: Sequence) -> bool:
        """Give its place to another request, before its client can send one; return whether it had one still."""
        with self._changed:
            had, sequence.over = not sequence.over, True
            self._open -= had
        return had

    def _fail(self, sequence: Sequence, error: RequestError) -> None:
        if self._end(sequence):
            self.counts.failed += 1
            self._tell(sequence, error)

    def _tell(self, sequence: Sequence, error: RequestError) -> None:
        try:
            sequence.reply.fail(error)
        except Exception:  # there is no way to that client any more, and the others are not to suffer from it
            LOG.exception("A client could not be told: %s", error)
