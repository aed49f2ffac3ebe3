"""Nothing in `AsyncOrchestrator` blocks the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from orchestrator import Cancelled, LoadOutcome, NotLoaded, State
from orchestrator.errors import UnknownGeneration
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from tests.kit.shell.harness import Harness, asyncio_test

ASYNC_CALLS: dict[str, Callable[[AsyncOrchestrator], Coroutine[Any, Any, Any]]] = {
    "load": lambda orch: orch.load("A"),
    "submit": lambda orch: orch.submit("A"),
    "unload": lambda orch: orch.unload(),
    "cancel": lambda orch: orch.cancel("x"),
    "lease": lambda orch: orch.lease().__aenter__(),
    "start": lambda orch: orch.start(),
    "close": lambda orch: orch.close(),
}


@pytest.mark.parametrize("name", ASYNC_CALLS)
@asyncio_test
async def test_the_first_call_does_not_claim_the_slot_in_the_event_loop(
    name: str, harness: Harness
) -> None:
    """Killing the processes of a dead owner may take seconds."""
    orch = harness.asynchronous()
    try:
        await ASYNC_CALLS[name](orch)
    except NotLoaded:
        assert name == "lease"
    await orch.close()
    assert harness.blocked_loop == []


@asyncio_test
async def test_reading_does_not_claim_the_slot(harness: Harness) -> None:
    orch = harness.asynchronous()
    assert orch.status().state is State.IDLE
    assert orch.progress().phase is None
    assert orch.logs() == ()
    assert orch.plan("A").action == "load"
    with pytest.raises(UnknownGeneration):
        orch.outcome(1)
    assert harness.claims == 0
    assert (await orch.load("A")).status == "loaded"
    assert orch.plan("A").action == "none"
    assert orch.plan("A", n_parallel=2).action == "reload"
    await orch.close()
    # `plan` looks the model up in the calling thread: see its docstring
    assert set(harness.blocked_loop) == {"look up", "find the server"}


@asyncio_test
async def test_hanging_look_ups_block_neither_the_loop_nor_other_calls(harness: Harness) -> None:
    """As on a network file system that does not answer."""
    harness.hold_look_ups_of("A")
    async with harness.asynchronous() as orch:
        loads = [asyncio.create_task(orch.load("A", load_request_id=f"id-{n}")) for n in range(6)]
        await asyncio.to_thread(harness.until_look_up_of, "A")
        assert orch.status().state is State.IDLE
        assert await orch.cancel("id-5")
        with pytest.raises(Cancelled):
            await loads[5]
        assert (await orch.unload("B")).status == "not_loaded"
        with pytest.raises(NotLoaded):
            async with orch.lease():
                pass
        loads[4].cancel()
        with pytest.raises(asyncio.CancelledError):
            await loads[4]
        assert not any(load.done() for load in loads[:4])
        harness.release_look_ups_of("A")
        answers = await asyncio.gather(*loads, return_exceptions=True)
        assert [type(answer) for answer in answers[4:]] == [asyncio.CancelledError, Cancelled]
        loaded = [answer for answer in answers[:4] if isinstance(answer, LoadOutcome)]
        assert len(loaded) == 4
        assert len({outcome.generation for outcome in loaded}) == 1
    assert harness.blocked_loop == []
