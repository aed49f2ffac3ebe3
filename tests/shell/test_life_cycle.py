"""The life cycle of a facade: it starts once, belongs to one process, and ends once."""

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
    OrchestratorError,
    ShuttingDown,
    SlotOccupied,
    SlotOwned,
    State,
    WrongProcess,
)
from orchestrator.base import log, workers
from tests.kit.sentences import assert_sentence
from tests.kit.shell.harness import PATIENCE_S, Harness, asyncio_test, ctrl_c, error_of
from tests.kit.shell.records import Entry


def test_the_slot_is_claimed_once_at_the_first_call(harness: Harness) -> None:
    orch = harness.sync()
    assert orch.status().state is State.IDLE
    assert harness.claims == 0
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: orch.start(), range(8)))
    assert harness.claims == 1
    orch.close()


def test_an_owner_is_published_only_when_it_is_complete(harness: Harness) -> None:
    """Other threads read it without a lock."""
    published: list[int] = []

    class Watched(Orchestrator):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "_owner" and value is not None:
                published.append(self._pid)
            super().__setattr__(name, value)

    with Watched(llama_server="/llama", parts=harness.parts()):
        assert published == [os.getpid()]


def test_a_failed_start_can_be_repeated(harness: Harness) -> None:
    """What it had claimed is released."""

    refusals = [SlotOwned.because("another orchestrator owns it")]

    def effects(*args: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return harness.make_effects(*args)

    orch = Orchestrator(llama_server="/llama", parts=harness.parts(effects=effects))
    with pytest.raises(SlotOwned):
        orch.start()
    assert (harness.claims, harness.releases) == (1, 1)
    assert orch.load("A").status == "loaded"
    orch.close()


# --------------------------------------------------------------------------------------- the end


def calls_on(orch: Orchestrator) -> tuple[Callable[[], object], ...]:
    """Return every call that needs the owner."""
    return (
        lambda: orch.load("A"),
        lambda: orch.submit("A"),
        lambda: orch.prefetch("o/A"),
        lambda: orch.variants("A"),
        lambda: orch.unload(),
        lambda: orch.cancel("x"),
        lambda: orch.plan("A"),
        lambda: orch.outcome(1),
        lambda: orch.lease().__enter__(),
        lambda: orch.events(),
        lambda: orch.start(again=False),
    )


def test_every_call_after_close_raises_shutting_down(harness: Harness) -> None:
    orch = harness.sync()
    orch.load("A")
    orch.close()
    assert not harness.os.alive
    for call in calls_on(orch):
        with pytest.raises(ShuttingDown) as refused:
            call()
        assert_sentence("facade.closed", refused.value.message)
    assert orch.status().state is State.IDLE
    assert orch.status().loaded is None


def test_an_orchestrator_that_was_never_used_can_be_closed(harness: Harness) -> None:
    orch = harness.sync()
    orch.close()
    orch.close()
    assert harness.claims == 0
    with pytest.raises(ShuttingDown):
        orch.load("A")
    with pytest.raises(ShuttingDown):
        orch.plan("A")


@asyncio_test
async def test_an_async_orchestrator_that_was_never_used_can_be_closed(harness: Harness) -> None:
    orch = harness.asynchronous()
    await orch.close()
    with pytest.raises(ShuttingDown):
        await orch.load("A")


def test_concurrent_closes_return_after_the_shutdown(harness: Harness) -> None:
    harness.open_gates = frozenset()
    orch = harness.sync().start()
    with ThreadPoolExecutor(8) as threads:
        load = threads.submit(orch.load, "A")
        harness.effects.wait_for("kill")
        closes = [threads.submit(orch.close) for _ in range(6)]
        harness.until(lambda shown: shown.ctx.is_shutting_down)
        assert not any(close.done() for close in closes)
        harness.effects.open()
        for close in closes:
            close.result(PATIENCE_S)
        assert isinstance(error_of(load), ShuttingDown)
    orch.close()
    assert harness.effects.is_closed
    assert not harness.os.started


@asyncio_test
async def test_concurrent_async_closes_return_after_the_shutdown(harness: Harness) -> None:
    orch = harness.asynchronous()
    await orch.load("A")
    await asyncio.gather(*(orch.close() for _ in range(6)))
    await orch.close()
    assert orch.status().state is State.IDLE
    assert not harness.os.alive


def test_an_interrupted_close_can_be_repeated(harness: Harness, pool: ThreadPoolExecutor) -> None:
    """A second Ctrl-C must not let the server outlive its host."""
    harness.open_gates = frozenset({"download", "spawn", "probe"})
    orch = harness.sync().start()
    load = pool.submit(orch.load, "A")
    harness.effects.let_through("kill")
    pid = load.result(PATIENCE_S).pid
    with ctrl_c(pool, lambda: harness.effects.wait_for("kill")):
        orch.close()
    assert pid in harness.os.alive
    harness.effects.open()
    orch.close()
    assert not harness.os.alive
    assert harness.effects.is_closed


def test_close_raises_if_a_process_survives_and_releases_the_slot(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    orch = harness.sync()
    orch.load("A")
    harness.effects.open_gates = frozenset()
    close = pool.submit(orch.close)
    harness.effects.wait_for("kill").fail()
    assert isinstance(error_of(close), SlotOccupied)
    assert harness.effects.is_closed
    orch.close()
    harness.os.alive.clear()


def test_an_error_in_close_leaves_no_caller_waiting(
    harness: Harness, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:

    def broken(*, keep: bool) -> None:
        raise OSError(5, "Input/output error")

    harness.hold_look_ups_of("A")
    orch = harness.sync().start()
    reader = pool.submit(list, orch.events())
    load = pool.submit(orch.load, "A")
    harness.until_look_up_of("A")
    monkeypatch.setattr(harness.effects, "close", broken)
    with pytest.raises(OSError, match="Input/output error"):
        orch.close()
    seen = [event.data["dest"] for event in reader.result(PATIENCE_S)]
    assert seen == ["Killing", "Idle"], "the shutdown itself"
    harness.release_look_ups_of("A")
    assert isinstance(error_of(load), ShuttingDown)
    with pytest.raises(ShuttingDown):
        orch.unload()
    orch.close()


def test_a_load_looked_up_during_close_is_refused(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    """Its request reaches an owner that no longer reads its inbox."""
    harness.hold_look_ups_of("A")
    orch = harness.sync().start()
    load = pool.submit(orch.load, "A")
    harness.until_look_up_of("A")
    orch.close()
    harness.release_look_ups_of("A")
    assert isinstance(error_of(load), ShuttingDown | Cancelled)
    assert not harness.os.started


@asyncio_test
async def test_an_async_load_looked_up_during_close_is_refused(harness: Harness) -> None:
    harness.hold_look_ups_of("A")
    orch = harness.asynchronous()
    loads = [asyncio.create_task(orch.load("A")) for _ in range(6)]
    await asyncio.to_thread(harness.until_look_up_of, "A")
    await orch.close()
    harness.release_look_ups_of("A")
    for load in loads:
        with pytest.raises(ShuttingDown):
            await load
    assert not harness.os.started
    assert not harness.owner._calls


@asyncio_test
async def test_a_load_without_a_worker_thread_raises_and_leaves_no_call(
    harness: Harness, failures: list[Entry]
) -> None:
    class NoThreads:
        def submit(self, _: object) -> NoReturn:
            raise RuntimeError("can't start new thread")

    async with harness.asynchronous() as orch:
        harness.workers = NoThreads()
        for ask in (orch.load, orch.submit, orch.prefetch):
            with pytest.raises(OrchestratorError, match="new thread"):
                await ask("A")
        harness.workers = workers.shared()
        log.flush()
        assert [entry["event"] for entry in failures] == ["look_up.failed"] * 3
        failures.clear()
    assert not harness.os.started
    assert not harness.owner._calls


def test_close_answers_callers_waiting_for_a_lease(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.open_gates = frozenset()
    orch = harness.sync().start()
    load = pool.submit(orch.load, "A")
    harness.effects.wait_for("kill")

    def lease() -> None:
        with orch.lease():
            pass

    waiting = pool.submit(lease)
    harness.until(lambda shown: bool(shown.ctx.lease_waiters))
    closing = pool.submit(orch.close)
    harness.until(lambda shown: shown.ctx.is_shutting_down)
    harness.effects.open()
    closing.result(PATIENCE_S)
    assert isinstance(error_of(waiting), ShuttingDown)
    assert isinstance(error_of(load), ShuttingDown)


# ------------------------------------------------------------------------------------------ forks


def test_every_call_in_a_forked_process_raises_wrong_process(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    """A fork has no owner thread, and may have a lock that is held for ever."""
    is_held, is_over = threading.Event(), threading.Event()
    with harness.sync() as orch:
        pid = orch.load("A").pid
        calls = calls_on(orch)

        def hold() -> None:
            with orch._life:  # as `start` and `close` do
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
            signal.alarm(int(PATIENCE_S))  # the fork must not outlive the test if it hangs
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
        with open(read, "rb") as seen:
            assert seen.read() == b"w" * len(calls) + b"c"
        assert os.waitpid(child, 0)[1] == 0
        assert orch.load("A").pid == pid
    assert not harness.os.alive
