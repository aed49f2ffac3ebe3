"""Events: every transition, in order, for any number of readers that delay nobody."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Any

import pytest

from orchestrator.runtime.events import MAX_EVENTS, Event, EventLog
from tests.kit.shell.harness import PATIENCE_S, Harness, asyncio_test, run

LOAD = ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]


def test_a_load_emits_one_event_per_transition(harness: Harness) -> None:
    with harness.sync() as orch:
        events = orch.events()
        orch.load("A")
        seen = list(islice(events, 5))
        assert [event.data["dest"] for event in seen] == LOAD
        assert [event.id for event in seen] == [1, 2, 3, 4, 5]
        for earlier, later in pairwise(seen):
            assert earlier.data["dest"] == later.data["source"]
        first = seen[0].as_dict()
        assert {"id", "kind", "source", "dest", "trigger", "generation", "at"} <= first.keys()
        assert (first["kind"], first["trigger"], first["generation"]) == ("transition", "load", 1)


def test_events_begin_at_the_call_not_at_the_first_iteration(harness: Harness) -> None:
    """A caller that asks for events and then acts must not miss the first of them."""
    with harness.sync() as orch:
        orch.load("A")
        events = orch.events()
        orch.unload()
        assert next(events).data["dest"] == "Killing"


@asyncio_test
async def test_async_events_begin_at_the_call_not_at_the_first_iteration(harness: Harness) -> None:
    orch = harness.asynchronous()
    early = orch.events()
    await orch.load("A")
    assert (await anext(early)).data["dest"] == "Killing"
    events = orch.events()
    await orch.unload()
    async with contextlib.aclosing(events), contextlib.aclosing(early):
        event = await anext(events)
        assert (event.data["source"], event.data["dest"]) == ("Healthy", "Killing")
    await orch.close()


def test_a_reader_resumes_after_a_given_event(harness: Harness) -> None:
    with harness.sync() as orch:
        orch.load("A")
        seen = [event.id for event in islice(orch.events(after=0), 3)]
        assert seen == [1, 2, 3]
        assert [event.id for event in islice(orch.events(after=3), 2)] == [4, 5]
        assert orch.last_event_id == 5


@asyncio_test
async def test_an_async_reader_resumes_after_a_given_event(harness: Harness) -> None:
    async with harness.asynchronous() as orch:
        await orch.load("A")
        events = orch.events(after=3)
        async with contextlib.aclosing(events):
            assert [(await anext(events)).id, (await anext(events)).id] == [4, 5]


def test_close_ends_every_reader_after_the_last_event(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    orch = harness.sync().start()
    readers = [pool.submit(lambda: [e.data["dest"] for e in orch.events(after=0)]) for _ in "abc"]
    orch.load("A")
    orch.close()
    for reader in readers:
        assert reader.result(PATIENCE_S) == [*LOAD, "Killing", "Idle"]


@asyncio_test
async def test_async_close_ends_every_reader_after_the_last_event(harness: Harness) -> None:
    orch = await harness.asynchronous().start()  # events after close would be refused

    async def read() -> list[str]:
        return [event.data["dest"] async for event in orch.events(after=0)]

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await orch.load("A")
    await orch.close()
    assert await asyncio.gather(*readers) == [[*LOAD, "Killing", "Idle"]] * 3


def test_readers_in_several_loops_see_the_same_events(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    orch = harness.asynchronous()
    begun = threading.Barrier(4)

    async def read() -> list[int]:
        events = orch.events(after=0)
        begun.wait(PATIENCE_S)
        return [event.id async for event in events]

    readers = [pool.submit(run, read) for _ in range(3)]

    async def act() -> None:
        await orch.start()
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        for number in range(20):
            await orch.load("AB"[number % 2])
        await orch.close()

    run(act)
    seen = [reader.result(PATIENCE_S) for reader in readers]
    assert seen == [list(range(1, len(seen[0]) + 1))] * 3
    assert not harness.events._wakers


@asyncio_test
async def test_a_cancelled_reader_is_unsubscribed(harness: Harness) -> None:
    async with harness.asynchronous() as orch:

        async def read() -> None:
            async for _ in orch.events():
                raise AssertionError("nothing happens")

        reader = asyncio.create_task(read())
        await asyncio.to_thread(harness.until_followed)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert not harness.events._wakers


def test_a_reader_with_a_closed_loop_does_not_stop_the_owner(harness: Harness) -> None:
    """The owner wakes readers from its own thread."""
    orch = harness.asynchronous()
    loop = asyncio.new_event_loop()
    events = orch.events()
    reader: Any = loop.create_task(anext(events))
    loop.run_until_complete(loop.run_in_executor(None, harness.until_followed))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()

    async def main() -> None:
        assert (await orch.load("A")).status == "loaded"
        await orch.close()

    run(main)
    assert not reader.done()
    reader._log_destroy_pending = False


# ---------------------------------------------------------------------------------------- the log


def test_the_log_keeps_the_newest_events() -> None:
    log = EventLog()
    for number in range(MAX_EVENTS + 10):
        log.append("transition", {"n": number})
    assert len(log.since(0)) == MAX_EVENTS
    assert log.since(0)[0] == Event(11, "transition", {"n": 10})
    assert log.since(MAX_EVENTS + 9) == [
        Event(MAX_EVENTS + 10, "transition", {"n": MAX_EVENTS + 9})
    ]
    assert log.last_id == MAX_EVENTS + 10


def test_concurrent_readers_see_every_number_once(pool: ThreadPoolExecutor) -> None:
    log = EventLog()

    def read() -> list[int]:
        seen: list[int] = []
        while batch := log.wait(seen[-1] if seen else 0):
            seen += [event.id for event in batch]
        return seen

    readers = [pool.submit(read) for _ in range(4)]
    wakes: list[int] = []
    stop = log.subscribe(lambda: wakes.append(log.last_id))
    for _ in range(500):
        log.append("transition", {})
    stop()
    stop()  # idempotent
    log.close()
    for reader in readers:
        assert reader.result(PATIENCE_S) == list(range(1, 501))
    assert wakes == list(range(1, 501))
    assert log.wait(500) == []
    assert log.is_closed


def test_an_event_is_made_again_from_its_json() -> None:
    """As a client of another process receives it."""
    event = Event(7, "transition", {"source": "Idle", "dest": "Killing"})
    members = event.as_dict()
    assert members == {"id": 7, "kind": "transition", "source": "Idle", "dest": "Killing"}
    assert Event.from_dict(members) == event
    assert (event.dest, event["source"], event.id) == ("Killing", "Idle", 7)
    with pytest.raises(AttributeError, match=r"^trigger$"):
        _ = event.trigger
    with pytest.raises(AttributeError, match=r"^data$"):
        _ = object.__new__(Event).data
