"""Callers that go away: a cancelled await, an interrupted wait, a closed event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator import (
    LoadOutcome,
    ModelNotFound,
    Problem,
    State,
)
from tests.kit.shell.harness import PATIENCE_S, Harness, asyncio_test, ctrl_c, run


@asyncio_test
async def test_a_cancelled_await_withdraws_only_its_caller(harness: Harness) -> None:
    """A client that disconnects must not end the load of those that joined it."""
    harness.open_gates = frozenset()
    async with harness.asynchronous() as orch:
        first = asyncio.create_task(orch.load("A"))
        await asyncio.to_thread(harness.until_callers, 1)
        second = asyncio.create_task(orch.load("A"))
        await asyncio.to_thread(harness.until_callers, 2)
        first.cancel()
        await asyncio.to_thread(harness.until_callers, 1)
        with pytest.raises(asyncio.CancelledError):
            await first
        harness.effects.open()
        outcome = await second
        assert (outcome.status, outcome.generation, outcome.joined) == ("loaded", 1, True)


@pytest.mark.parametrize("policy", ["cancel", "continue"])
@asyncio_test
async def test_abandoned_load_decides_what_follows_the_last_caller(
    policy: Any, harness: Harness
) -> None:
    """Either way the load has an outcome."""
    harness.open_gates = frozenset()
    async with harness.asynchronous(abandoned_load=policy) as orch:
        caller = asyncio.create_task(orch.load("A"))
        await asyncio.to_thread(harness.until_callers, 1)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await asyncio.to_thread(harness.catch_up)
        harness.effects.open()
        shown = await asyncio.to_thread(
            harness.until, lambda s: s.ctx.effect is None and s.ctx.job is None
        )
        outcome = orch.outcome(1)
        if policy == "continue":
            assert shown.state is State.HEALTHY
            assert isinstance(outcome, LoadOutcome)
            assert outcome == orch.status().loaded
        else:
            assert shown.state is State.IDLE
            assert isinstance(outcome, Problem)
            assert outcome.category == "cancelled"


@asyncio_test
async def test_a_caller_cancelled_during_its_look_up_requests_nothing(harness: Harness) -> None:
    harness.hold_look_ups_of("A")
    async with harness.asynchronous() as orch:
        pid = (await orch.load("B")).pid
        caller = asyncio.create_task(orch.load("A"))
        await asyncio.to_thread(harness.until_look_up_of, "A")
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        harness.release_look_ups_of("A")
        assert (await orch.load("B", on_busy="queue")).model_path == "B"
        assert not harness.owner._calls
        assert (await orch.load("B")).pid in harness.os.alive
        assert pid == harness.os.started[0].pid


def test_ctrl_c_during_a_load_withdraws_the_caller(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.open_gates = frozenset()
    with harness.sync() as orch:
        with ctrl_c(pool, lambda: harness.effects.wait_for("kill")):
            orch.load("A")
        harness.catch_up()
        assert orch.status().loading is None
        harness.effects.open()
        harness.until(lambda shown: shown.state is State.IDLE)
        assert not harness.os.started
        assert not harness.owner._calls


def test_ctrl_c_during_a_look_up_withdraws_the_caller(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.hold_look_ups_of("A")
    with harness.sync() as orch:
        with ctrl_c(pool, lambda: harness.until_look_up_of("A")):
            orch.load("A")
        harness.catch_up()
        assert orch.status().generation == 0
        assert not harness.owner._calls


def test_ctrl_c_just_after_the_request_withdraws_the_caller(harness: Harness) -> None:
    """The request is in the inbox, and its caller has gone."""
    harness.open_gates = frozenset()
    with harness.sync() as orch:
        orch.start()
        ask = harness.owner.ask

        def interrupted(*call: Any) -> None:
            ask(*call)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(harness.owner, "ask", interrupted)
            with pytest.raises(KeyboardInterrupt):
                orch.load("A")
        harness.catch_up()
        assert orch.status().loading is None
        harness.effects.open()


def test_an_event_loop_closed_during_a_load_does_not_stop_the_owner(harness: Harness) -> None:
    """The answer has no receiver; the next caller is served."""
    harness.open_gates = frozenset()
    orch = harness.asynchronous()
    loop = asyncio.new_event_loop()
    caller: Any = loop.create_task(orch.load("A"))
    loop.run_until_complete(loop.run_in_executor(None, harness.until_callers, 1))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    harness.effects.open()
    harness.until(lambda shown: shown.state is State.HEALTHY)

    async def main() -> None:
        outcome = await orch.load("A")
        assert (outcome.status, outcome.generation) == ("already_loaded", 1)
        await orch.close()

    run(main)
    assert not caller.done()
    caller._log_destroy_pending = False


@asyncio_test
async def test_a_submit_cancelled_during_its_look_up_loads_nothing(harness: Harness) -> None:
    """Without its generation nobody could ever cancel the load."""
    harness.open_gates = frozenset()
    harness.hold_look_ups_of("A")
    async with harness.asynchronous() as orch:
        caller = asyncio.create_task(orch.submit("A"))
        await asyncio.to_thread(harness.until_look_up_of, "A")
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        harness.release_look_ups_of("A")
        with pytest.raises(ModelNotFound):
            await orch.load("missing")
        await asyncio.to_thread(harness.catch_up)
        assert orch.status().loading is None
        harness.effects.open()


@asyncio_test
async def test_a_submit_cancelled_before_it_is_accepted_loads_nothing(harness: Harness) -> None:
    """The owner is paused between the request and the generation."""
    harness.open_gates = frozenset()
    async with harness.asynchronous() as orch:
        with harness.owner.paused():
            caller = asyncio.create_task(orch.submit("A"))
            for _ in range(20):
                await asyncio.sleep(0)
            caller.cancel()
            done, _ = await asyncio.wait({caller}, timeout=PATIENCE_S / 4)
            assert done, "a cancelled submit does not return"
            assert caller.cancelled()
        harness.effects.open()
        await asyncio.to_thread(harness.catch_up)
        await asyncio.to_thread(harness.until, lambda shown: shown.state is State.IDLE)
        assert not harness.os.started


@asyncio_test
async def test_a_lease_granted_to_a_cancelled_caller_is_released(harness: Harness) -> None:
    """Otherwise every later swap would wait for the whole drain timeout."""
    harness.open_gates = frozenset()
    async with harness.asynchronous() as orch:
        loading = asyncio.create_task(orch.load("A"))
        await asyncio.to_thread(harness.until, lambda shown: shown.ctx.job is not None)

        async def hold() -> None:
            async with orch.lease():
                raise AssertionError("it was cancelled before")

        caller = asyncio.create_task(hold())
        await asyncio.to_thread(harness.until, lambda shown: bool(shown.ctx.lease_waiters))
        harness.effects.open()
        harness.until(lambda shown: shown.state is State.HEALTHY)
        harness.catch_up()  # the lease is granted, and the loop has not noticed it
        assert harness.owner.gate.inside == 1
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert (await loading).generation == 1
        assert harness.owner.gate.inside == 0
