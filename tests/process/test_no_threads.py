"""Hosts in which no thread can be started, from some moment on (B106)."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from orchestrator import AsyncOrchestrator, Unavailable
from orchestrator.base.workers import Workers
from orchestrator.runtime.parts import Parts
from tests.kit.process.support import Fake, Make
from tests.kit.sentences import assert_sentence


class Limit:
    """Lets this many further threads start; None: all."""

    def __init__(self) -> None:
        self.left: int | None = None

    def start(self) -> None:
        if self.left == 0:
            raise RuntimeError("can't start new thread")
        if self.left is not None:
            self.left -= 1


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    limit, start = Limit(), threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        limit.start()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return limit


@pytest.fixture
def parts() -> Parts:
    """Parts with threads of their own: those of the process may be idle from another test."""
    workers = Workers(idle_s=0.01)
    return Parts(workers=lambda: workers)


@pytest.mark.parametrize("allowed", range(3))
def test_a_host_without_threads_claims_nothing_and_does_nothing_later(
    make: Make, fake: Fake, model_a: str, limit: Limit, parts: Parts, allowed: int
) -> None:
    """Owner, warden and one worker are needed. Nobody has the slot afterwards."""
    orch = make(parts=parts)
    limit.left = allowed
    with pytest.raises(Unavailable) as refused:
        orch.load(model_a)
    assert_sentence("threads.none", refused.value.message)
    limit.left = None
    with make() as other:
        assert other.load(model_a).status == "loaded"
    assert orch.load(model_a).status == "loaded"
    assert len(fake.entries("start")) == 2


def test_a_claimed_slot_needs_no_further_thread(
    make: Make, fake: Fake, model_a: str, model_b: str, limit: Limit, parts: Parts
) -> None:
    """Although its worker has been idle for long: loads, swaps, unloads and the end."""
    with make(parts=parts).start() as orch:
        limit.left = 0
        assert orch.load(model_a).status == "loaded"
        assert orch.load(model_b).status == "loaded"
        assert orch.unload().status == "unloaded"
    assert fake.running() == set()


def test_an_async_host_without_threads_is_told_so_and_can_close(
    fake: Fake, state_dir: Path, model_a: str, limit: Limit, parts: Parts
) -> None:
    async def scene() -> None:
        orch = AsyncOrchestrator(
            llama_server=fake.path, state_dir=state_dir, server_env=fake.env, parts=parts
        )
        limit.left = 0
        for refused in (orch.start, lambda: orch.load(model_a), lambda: orch.variants(model_a)):
            with pytest.raises(Unavailable):
                await refused()
        limit.left = None
        await orch.start()
        limit.left = 0
        assert (await orch.load(model_a)).status == "loaded"
        await orch.close()
        limit.left = None  # asyncio itself needs one to end its executor

    asyncio.run(scene())
    assert fake.running() == set()
