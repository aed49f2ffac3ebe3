"""A facade's life: it starts once, belongs to one process, and ends once, whoever asks."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pytest

from orchestrator import (
    Cancelled,
    Orchestrator,
    ShuttingDown,
    SlotOccupied,
    SlotOwned,
    State,
    WrongProcess,
)
from orchestrator.base import workers
from tests.kit.shell.facade import (
    PATIENCE_S,
    House,
    HouseParts,
    ctrl_c,
)
from tests.shell.test_facades import error_of, run


def test_nothing_is_claimed_before_the_first_call_and_then_once(house: House) -> None:
    orch = house.sync()
    assert orch.status().state is State.IDLE
    assert house.claims == 0
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: orch.start(), range(8)))
    assert house.claims == 1
    orch.close()


def test_nobody_sees_an_owner_before_it_can_be_used(house: House) -> None:
    """Calls of other threads take no lock: what they see must be whole."""
    published: list[int] = []

    class Watched(Orchestrator):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "_owner" and value is not None:
                published.append(self._pid)
            super().__setattr__(name, value)

    with Watched(llama_server="/llama", parts=HouseParts(house)):
        assert published == [os.getpid()]


def test_a_slot_that_could_not_be_claimed_may_be_free_later(house: House) -> None:
    """The orchestrator is as good as new; what it had claimed is given back."""

    class OwnedOnce(HouseParts):
        is_owned = True

        def effects(self, slot: Any, post: Any, *rest: Any) -> Any:
            if self.is_owned:
                self.is_owned = False
                raise SlotOwned.because("somebody else has it")
            return super().effects(slot, post, *rest)

    orch = Orchestrator(llama_server="/llama", parts=OwnedOnce(house))
    with pytest.raises(SlotOwned):
        orch.start()
    assert (house.claims, house.releases) == (1, 1)
    assert orch.load("A").status == "loaded"
    orch.close()


# --------------------------------------------------------------------------------------- the end


def calls_on(orch: Orchestrator) -> tuple[Callable[[], object], ...]:
    """Every call that needs a living orchestrator."""
    return (
        lambda: orch.load("A"),
        lambda: orch.submit("A"),
        lambda: orch.unload(),
        lambda: orch.cancel("x"),
        lambda: orch.plan("A"),
        lambda: orch.outcome(1),
        lambda: orch.lease().__enter__(),
        lambda: orch.events(),
        lambda: orch.start(),
    )


def test_after_close_every_call_says_so(house: House) -> None:
    orch = house.sync()
    orch.load("A")
    orch.close()
    assert not house.os.alive
    for call in calls_on(orch):
        with pytest.raises(ShuttingDown):
            call()
    assert orch.status().state is State.IDLE
    assert orch.status().loaded is None


def test_an_orchestrator_that_was_never_used_can_be_closed(house: House) -> None:
    orch = house.sync()
    orch.close()
    orch.close()
    assert house.claims == 0
    with pytest.raises(ShuttingDown):
        orch.load("A")
    with pytest.raises(ShuttingDown):
        orch.plan("A")

    async def main() -> None:
        never = house.asynchronous()
        await never.close()
        with pytest.raises(ShuttingDown):
            await never.load("A")

    run(main)


def test_close_may_be_called_again_and_by_several_at_once(house: House) -> None:
    """Each returns when everything has ended, and it ends once."""
    house.open_gates = frozenset()
    orch = house.sync().start()
    with ThreadPoolExecutor(8) as threads:
        load = threads.submit(orch.load, "A")
        house.effects.wait_for("kill")
        closes = [threads.submit(orch.close) for _ in range(6)]
        house.until(lambda shown: shown.ctx.is_shutting_down)
        assert not any(close.done() for close in closes)
        house.effects.open()
        for close in closes:
            close.result(PATIENCE_S)
        assert isinstance(error_of(load), ShuttingDown)
    orch.close()
    assert house.effects.is_closed
    assert not house.os.started


def test_async_close_may_be_called_by_several_at_once(house: House) -> None:
    async def main() -> None:
        orch = house.asynchronous()
        await orch.load("A")
        await asyncio.gather(*(orch.close() for _ in range(6)))
        await orch.close()
        assert orch.status().state is State.IDLE

    run(main)
    assert not house.os.alive


def test_a_close_that_was_interrupted_can_be_finished(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """A second Ctrl-C must not be the reason that a server outlives its host."""
    house.open_gates = frozenset({"download", "spawn", "probe"})
    orch = house.sync().start()
    load = pool.submit(orch.load, "A")
    house.effects.let_through("kill")
    pid = load.result(PATIENCE_S).pid
    with ctrl_c(pool, lambda: house.effects.wait_for("kill")):
        orch.close()
    assert pid in house.os.alive
    house.effects.open()
    orch.close()
    assert not house.os.alive
    assert house.effects.is_closed


def test_a_close_that_leaves_something_alive_says_so_and_lets_go(
    house: House, pool: ThreadPoolExecutor
) -> None:
    orch = house.sync()
    orch.load("A")
    house.effects.open_gates = frozenset()
    close = pool.submit(orch.close)
    house.effects.wait_for("kill").fail()
    assert isinstance(error_of(close), SlotOccupied)
    assert house.effects.is_closed
    orch.close()
    house.os.alive.clear()


def test_effects_that_cannot_be_closed_leave_nobody_waiting(
    house: House, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong at the end: it is the end, and everybody hears so."""

    def broken() -> None:
        raise OSError(5, "Input/output error")

    house.hold_look_ups_of("A")
    orch = house.sync().start()
    reader = pool.submit(list, orch.events())
    load = pool.submit(orch.load, "A")
    house.look_up_has_begun("A")
    monkeypatch.setattr(house.effects, "close", broken)
    with pytest.raises(OSError, match="Input/output error"):
        orch.close()
    told = [event.data["dest"] for event in reader.result(PATIENCE_S)]
    assert told == ["Killing", "Idle"], "the shutdown itself"
    house.let_look_ups_go("A")
    assert isinstance(error_of(load), ShuttingDown)
    with pytest.raises(ShuttingDown):
        orch.unload()
    orch.close()


def test_a_load_that_is_looked_up_during_the_close_is_refused(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """It asks an owner that listens no more: it must hear so, and not wait for ever."""
    house.hold_look_ups_of("A")
    orch = house.sync().start()
    load = pool.submit(orch.load, "A")
    house.look_up_has_begun("A")
    orch.close()
    house.let_look_ups_go("A")
    assert isinstance(error_of(load), ShuttingDown | Cancelled)
    assert not house.os.started


def test_an_async_load_that_is_looked_up_during_the_close_is_refused(house: House) -> None:
    house.hold_look_ups_of("A")

    async def main() -> None:
        orch = house.asynchronous()
        loads = [asyncio.create_task(orch.load("A")) for _ in range(6)]
        await asyncio.to_thread(house.look_up_has_begun, "A")
        await orch.close()
        house.let_look_ups_go("A")
        for load in loads:
            with pytest.raises(ShuttingDown):
                await load

    run(main)
    assert not house.os.started
    assert not house.owner._calls


def test_a_load_that_nobody_can_look_up_leaves_nothing_behind(house: House) -> None:
    """Where no thread can be started, the caller hears that, and its load never comes later."""

    class NoThreads:
        def submit(self, _: object) -> NoReturn:
            raise RuntimeError("can't start new thread")

    async def main() -> None:
        async with house.asynchronous() as orch:
            house.workers = NoThreads()
            for ask in (orch.load, orch.submit, orch.prefetch):
                with pytest.raises(RuntimeError, match="new thread"):
                    await ask("A")
            house.workers = workers.shared()

    run(main)
    assert not house.os.started
    assert not house.owner._calls


def test_a_close_wakes_whoever_waits_for_a_lease(house: House, pool: ThreadPoolExecutor) -> None:
    house.open_gates = frozenset()
    orch = house.sync().start()
    load = pool.submit(orch.load, "A")
    house.effects.wait_for("kill")

    def lease() -> None:
        with orch.lease():
            pass

    waiting = pool.submit(lease)
    house.until(lambda shown: bool(shown.ctx.lease_waiters))
    closing = pool.submit(orch.close)
    house.until(lambda shown: shown.ctx.is_shutting_down)
    house.effects.open()
    closing.result(PATIENCE_S)
    assert error_of(waiting).status == 503
    assert isinstance(error_of(load), ShuttingDown)


# ------------------------------------------------------------------------------------------ forks


def test_a_forked_worker_is_told_that_it_owns_nothing(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """It has a copy of everything but the threads: a call would wait for ever, and so would a
    lock that another thread held in the moment of the fork.
    """
    is_held, is_over = threading.Event(), threading.Event()
    with house.sync() as orch:
        pid = orch.load("A").pid
        calls = calls_on(orch)

        def hold() -> None:
            with orch._life:  # as somebody who is starting or closing does
                is_held.set()
                is_over.wait(PATIENCE_S)

        holding = pool.submit(hold)
        assert is_held.wait(PATIENCE_S)
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: threads and fork
            child = os.fork()
        if child == 0:
            said = b""
            signal.alarm(int(PATIENCE_S))  # a worker that hangs must not outlive the test
            try:
                for call in calls:
                    try:
                        call()
                    except WrongProcess:
                        said += b"w"
                orch.close()
                said += b"c"
            finally:
                os.write(write, said or b"?")
                os._exit(0)
        is_over.set()
        holding.result(PATIENCE_S)
        os.close(write)
        with open(read, "rb") as told:
            assert told.read() == b"w" * len(calls) + b"c"
        assert os.waitpid(child, 0)[1] == 0
        assert orch.load("A").pid == pid
    assert not house.os.alive
