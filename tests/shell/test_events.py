"""Events: every transition, in order, for any number of readers, none of whom is waited for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Any

import pytest

from orchestrator.runtime.events import KEPT, Event, EventLog
from tests.kit.shell.facade import PATIENCE_S, House
from tests.shell.test_facades import run

LOAD = ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]


def test_a_load_is_told_transition_by_transition(house: House) -> None:
    with house.sync() as orch:
        events = orch.events()
        orch.load("A")
        told = list(islice(events, 5))
        assert [event.data["dest"] for event in told] == LOAD
        assert [event.id for event in told] == [1, 2, 3, 4, 5]
        for earlier, later in pairwise(told):
            assert earlier.data["dest"] == later.data["source"]
        first = told[0].as_dict()
        assert {"id", "kind", "source", "dest", "trigger", "generation", "at"} <= first.keys()
        assert (first["kind"], first["trigger"], first["generation"]) == ("transition", "load", 1)


def test_from_now_on_means_from_the_call_and_not_from_the_first_look(house: House) -> None:
    """Who asks for events and then does something must not miss what comes of it."""
    with house.sync() as orch:
        orch.load("A")
        events = orch.events()
        orch.unload()
        assert next(events).data["dest"] == "Killing"

    async def main() -> None:
        orch = house.asynchronous()
        early = orch.events()
        await orch.load("A")
        assert (await anext(early)).data["dest"] == "Killing"
        events = orch.events()
        await orch.unload()
        async with contextlib.aclosing(events), contextlib.aclosing(early):
            event = await anext(events)
            assert (event.data["source"], event.data["dest"]) == ("Healthy", "Killing")
        await orch.close()

    run(main)


def test_a_reader_resumes_after_the_last_event_it_saw(house: House) -> None:
    with house.sync() as orch:
        orch.load("A")
        seen = [event.id for event in islice(orch.events(after=0), 3)]
        assert seen == [1, 2, 3]
        assert [event.id for event in islice(orch.events(after=3), 2)] == [4, 5]
        assert orch.last_event_id == 5

    async def main() -> None:
        async with house.asynchronous() as orch:
            await orch.load("A")
            events = orch.events(after=3)
            async with contextlib.aclosing(events):
                assert [(await anext(events)).id, (await anext(events)).id] == [4, 5]

    run(main)


def test_closing_ends_every_reader_after_what_there_is_to_tell(
    house: House, pool: ThreadPoolExecutor
) -> None:
    orch = house.sync().start()
    readers = [pool.submit(lambda: [e.data["dest"] for e in orch.events(after=0)]) for _ in "abc"]
    orch.load("A")
    orch.close()
    for reader in readers:
        assert reader.result(PATIENCE_S) == [*LOAD, "Killing", "Idle"]

    async def main() -> None:
        orch = await house.asynchronous().start()  # a reader that begins after the end is refused

        async def read() -> list[str]:
            return [event.data["dest"] async for event in orch.events(after=0)]

        readers = [asyncio.create_task(read()) for _ in range(3)]
        await orch.load("A")
        await orch.close()
        assert await asyncio.gather(*readers) == [[*LOAD, "Killing", "Idle"]] * 3

    run(main)


def test_readers_in_several_loops_and_threads_see_the_same(
    house: House, pool: ThreadPoolExecutor
) -> None:
    orch = house.asynchronous()
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
    assert not house.events._wakers


def test_a_reader_that_goes_away_is_not_woken_any_more(house: House) -> None:
    async def main() -> None:
        async with house.asynchronous() as orch:

            async def read() -> None:
                async for _ in orch.events():
                    raise AssertionError("nothing happens")

            reader = asyncio.create_task(read())
            await asyncio.to_thread(house.until_read)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert not house.events._wakers

    run(main)


def test_a_reader_whose_loop_was_closed_stops_nobody(house: House) -> None:
    """The owner wakes readers from its own thread; a loop that is gone must not end it."""
    orch = house.asynchronous()
    loop = asyncio.new_event_loop()
    events = orch.events()
    reader: Any = loop.create_task(anext(events))
    loop.run_until_complete(loop.run_in_executor(None, house.until_read))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()

    async def main() -> None:
        assert (await orch.load("A")).status == "loaded"
        await orch.close()

    run(main)
    assert not reader.done()
    reader._log_destroy_pending = False


# ---------------------------------------------------------------------------------------- the log


def test_a_slow_reader_loses_the_oldest_and_nobody_waits_for_it() -> None:
    log = EventLog()
    for number in range(KEPT + 10):
        log.append("transition", {"n": number})
    assert len(log.since(0)) == KEPT
    assert log.since(0)[0] == Event(11, "transition", {"n": 10})
    assert log.since(KEPT + 9) == [Event(KEPT + 10, "transition", {"n": KEPT + 9})]
    assert log.last_id == KEPT + 10


def test_numbers_neither_repeat_nor_skip_whoever_reads_meanwhile(pool: ThreadPoolExecutor) -> None:
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
    stop()  # once more changes nothing
    log.close()
    for reader in readers:
        assert reader.result(PATIENCE_S) == list(range(1, 501))
    assert wakes == list(range(1, 501))
    assert log.wait(500) == []
    assert log.is_closed
