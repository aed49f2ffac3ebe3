"""The order of calls: a slow look-up, or a slot that is being claimed, must not change it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator import (
    Cancelled,
    State,
    Superseded,
)
from tests.kit.shell.harness import PATIENCE_S, Harness, asyncio_test, error_of


def test_a_newer_load_supersedes_one_with_a_slow_look_up(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    """The last Apply wins, whichever model is on the slower disk."""
    harness.hold_look_ups_of("A")
    with harness.sync() as orch:
        older = pool.submit(orch.load, "A")
        harness.until_look_up_of("A")
        newer = orch.load("B")
        assert isinstance(error_of(older), Superseded)
        harness.release_look_ups_of("A")
        status = orch.status()
        assert status.loaded is not None
        assert status.loaded.pid == newer.pid
        assert [process.model for process in harness.os.started] == ["B"]


@pytest.mark.parametrize("model", [None, "A"])
def test_a_later_unload_cancels_a_load_with_a_slow_look_up(
    model: str | None, harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.hold_look_ups_of("A")
    with harness.sync() as orch:
        older = pool.submit(orch.load, "A")
        harness.until_look_up_of("A")
        assert orch.unload(model).status == "unloaded"
        assert isinstance(error_of(older), Cancelled)
        harness.release_look_ups_of("A")
        assert orch.status().state is State.IDLE
        assert not harness.os.started
        assert orch.load("A").status == "loaded"


def test_an_unload_of_another_model_leaves_a_slow_look_up_alone(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.hold_look_ups_of("A")
    with harness.sync() as orch:
        older = pool.submit(orch.load, "A")
        harness.until_look_up_of("A")
        assert orch.unload("B").status == "not_loaded"
        harness.release_look_ups_of("A")
        assert older.result(PATIENCE_S).status == "loaded"


@asyncio_test
async def test_async_calls_keep_their_order(harness: Harness) -> None:
    harness.hold_look_ups_of("A")
    async with harness.asynchronous() as orch:
        older = asyncio.create_task(orch.load("A"))
        await asyncio.to_thread(harness.until_look_up_of, "A")
        newer = await orch.load("B")
        harness.release_look_ups_of("A")
        with pytest.raises(Superseded):
            await older
        assert orch.status().loaded == newer


@asyncio_test
async def test_calls_keep_their_order_while_the_slot_is_claimed(harness: Harness) -> None:
    """A call takes its place when it is made, not when the owner has started."""
    harness.claim_gate.clear()
    harness.hold_look_ups_of("A")
    orch = harness.asynchronous()
    older = asyncio.create_task(orch.load("A"))
    await asyncio.sleep(0)
    newer = asyncio.create_task(orch.unload())
    await asyncio.sleep(0)
    assert not harness.owners
    harness.claim_gate.set()
    assert (await newer).status == "unloaded"
    harness.release_look_ups_of("A")
    with pytest.raises(Cancelled):
        await older
    assert orch.status().state is State.IDLE
    await orch.close()
