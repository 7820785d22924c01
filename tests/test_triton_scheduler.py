"""What the loop of the server does when something goes wrong or is full: everybody is told, and it goes on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from artifacts import artifact, wrapped
from served import NEW, Reply, prompts, request, settings_of, truth

from cdsurgery.export.triton.repository import ARTIFACT
from cdsurgery.export.triton.serving.decoder import OrtDecoder
from cdsurgery.export.triton.serving.errors import RequestError
from cdsurgery.export.triton.serving.scheduler import Scheduler


def loop(place: Path, **changes: Any) -> tuple[Scheduler, OrtDecoder, Any]:
    (place / ARTIFACT).symlink_to(artifact("llama"))
    config = settings_of("llama", **changes)
    decoder = OrtDecoder(place, config, ("cpu", 0))
    seconds = itertools.count()  # a second passes whenever it looks
    return Scheduler(decoder, config, clock=lambda: float(next(seconds))), decoder, config


def fail(*_: Any) -> Any:
    raise MemoryError("no room")


def test_a_model_that_is_unloaded_tells_who_waits_and_who_runs(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT).symlink_to(artifact("llama"))
    config = settings_of("llama", slots=2, chunk=2)
    scheduler = Scheduler(OrtDecoder(tmp_path, config, ("cpu", 0)), config)
    runs, prefills, waits = (Reply() for _ in range(3))
    for prompt, reply in (([1], runs), ([1] * 9, prefills), ([1], waits)):
        scheduler.submit(request(config, prompt, reply))
    scheduler.step()
    scheduler.step()
    scheduler.close()
    for reply in (runs, prefills, waits):
        assert str(reply.error) == "The model was unloaded before the answer ended."
    assert scheduler.counts.failed == 3
    assert not scheduler.step(), "somebody who was told that it is over is still waiting"


def test_a_runtime_that_fails_ends_the_requests_in_slots_and_no_more(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT).symlink_to(artifact("llama"))
    config = settings_of("llama")
    decoder = OrtDecoder(tmp_path, config, ("cpu", 0))
    scheduler = Scheduler(decoder, config)
    unlucky, later = Reply(), Reply()
    scheduler.submit(request(config, [1, 2], unlucky))
    scheduler.step()
    run, decoder.run = decoder.run, lambda *arguments: 1 / 0  # type: ignore[method-assign]
    scheduler.step()
    assert unlucky.error is not None and "ZeroDivisionError" in str(unlucky.error)
    decoder.run = run  # type: ignore[method-assign]
    scheduler.submit(request(config, [1, 2], later))
    while scheduler.step():
        pass
    assert len(later.tokens) == NEW


@pytest.mark.parametrize("part", ["run", "place"])
def test_a_runtime_that_fails_with_a_prompt_tells_its_client(part: str, tmp_path: Path) -> None:
    scheduler, decoder, config = loop(tmp_path, chunk=2, slots=2)
    first, second, waits, later = (Reply() for _ in range(4))
    for reply in (first, second, waits):
        scheduler.submit(request(config, [1, 2, 3], reply))
    whole = getattr(decoder, part)
    setattr(decoder, part, fail)
    scheduler.step()
    setattr(decoder, part, whole)
    for reply in (first, second):
        assert str(reply.error) == "The decoder failed: MemoryError: no room"
    scheduler.submit(request(config, [1, 2, 3], later))
    while scheduler.step():
        pass
    assert len(waits.tokens) == len(later.tokens) == NEW
    assert (scheduler.counts.failed, scheduler.counts.finished) == (2, 2)


class Broken(Reply):
    """A client to whom no response gets through."""

    def send(self, outputs: dict[str, Any], final: bool) -> None:
        fail()

    def fail(self, error: RequestError) -> None:
        super().fail(error)
        fail()


def test_a_client_that_cannot_be_answered_costs_the_others_nothing(tmp_path: Path) -> None:
    scheduler, decoder, config = loop(tmp_path)
    (asked, *_), lost, stays, later = prompts(config.vocabulary), Broken(), Reply(), Reply()
    scheduler.submit(request(config, asked, lost, stream=True))
    scheduler.submit(request(config, asked, stays, stream=True))
    while scheduler.step():
        pass
    assert str(lost.error) == "The answer failed: MemoryError: no room"
    assert stays.tokens == truth(wrapped("llama"), asked, NEW)
    assert (scheduler.counts.failed, scheduler.counts.finished) == (1, 1)
    scheduler.submit(request(config, asked, lost := Broken()))
    scheduler.submit(request(config, asked, later))
    scheduler.step()
    decoder.run = fail  # type: ignore[method-assign]
    scheduler.step()  # which tells both, if it can
    assert lost.ended and later.ended


class Insistent(Reply):
    """A client that asks again the moment it has its answer."""

    def __init__(self, again: Any) -> None:
        super().__init__()
        self._again = again

    def send(self, outputs: dict[str, Any], final: bool) -> None:
        super().send(outputs, final)
        if final:
            self._again()


@pytest.mark.parametrize("queue", [0, 2])
def test_as_many_requests_are_taken_as_there_are_slots_and_places_to_wait(queue: int, tmp_path: Path) -> None:
    scheduler, _, config = loop(tmp_path, slots=2, queue=queue)
    later = Reply()

    def submit(reply: Reply) -> None:
        scheduler.submit(request(config, [1, 2], reply))

    first = Insistent(lambda: submit(later))
    replies = [first, *(Reply() for _ in range(queue + 1))]
    for reply in replies:  # all at once, before any has a slot
        submit(reply)
    with pytest.raises(RequestError, match=f"All 2 slots are taken and {queue} requests wait already"):
        submit(Reply())
    while scheduler.step():
        pass
    assert [len(reply.tokens) for reply in [*replies, later]] == [NEW] * (queue + 3)
    for reply in (gone := [Reply() for _ in range(queue + 2)]):
        submit(reply)
        reply.gone = True
    scheduler.step()
    assert {reply.error.code for reply in gone if reply.error} == {"CANCELLED"}
    submit(Reply())  # for those that went away have left their places
