"""A slot of a pool where no thread can be started says so, and works when there is one again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, cast

import pytest

from orchestrator import Orchestrator
from orchestrator.base.threads import NoThread
from orchestrator.base.tokens import Generation
from orchestrator.pool import commands, facts
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.slots import PoolSlots
from orchestrator.settings.request import LoadRequest
from tests.kit.shell.fakes import fake_parts


class FewThreads:
    """Workers that start their work when a test says so, or not at all."""

    def __init__(self) -> None:
        self.has_some = True
        self.work: list[Callable[[], object]] = []

    def submit(self, work: Callable[[], object]) -> Future[object]:
        if not self.has_some:
            raise NoThread
        self.work.append(work)
        return Future()


@pytest.fixture
def threads() -> FewThreads:
    return FewThreads()


@pytest.fixture
def posted() -> list[facts.Fact]:
    return []


@pytest.fixture
def slots(threads: FewThreads, posted: list[facts.Fact]) -> Iterator[PoolSlots[Orchestrator]]:
    parts = fake_parts(workers=lambda: threads)
    made: list[Orchestrator] = []

    def make(name: str) -> Orchestrator:
        made.append(Orchestrator(llama_server="/llama", slot=f"pool.{name}", parts=parts))
        return made[-1]

    yield PoolSlots(make, posted.append, cast("Any", threads), lambda: 0.0)
    for orch in made:
        orch.close()


def start(generation: int) -> commands.Start:
    request = LoadRequest(model_path="A")
    return commands.Start("a", Generation(generation), Amounts(), request=request)


def test_start_without_a_thread_has_failed_and_the_next_one_is_carried_out(
    slots: PoolSlots[Orchestrator], threads: FewThreads, posted: list[facts.Fact]
) -> None:
    threads.has_some = False
    slots.start(start(1))
    [emptied] = posted
    assert isinstance(emptied, facts.Emptied)
    assert emptied.problem is not None
    assert (emptied.generation, emptied.problem.category) == (1, "unavailable")
    threads.has_some = True
    slots.start(start(2))
    assert len(threads.work) == 1


def test_stop_without_a_thread_leaves_the_slot_stuck_and_is_tried_again(
    slots: PoolSlots[Orchestrator], threads: FewThreads, posted: list[facts.Fact]
) -> None:
    threads.has_some = False
    slots.stop(commands.Stop("a", Generation(1), "unload"))
    [stuck] = posted
    assert isinstance(stuck, facts.BecameStuck)
    threads.has_some = True
    slots.stop(commands.Stop("a", Generation(1), "stuck"))
    assert len(threads.work) == 1


def test_figure_that_cannot_be_asked_for_is_not_waited_for(
    slots: PoolSlots[Orchestrator], threads: FewThreads, posted: list[facts.Fact]
) -> None:
    threads.has_some = False
    slots.measure(commands.Measure("a", 7))
    [failed] = posted
    assert isinstance(failed, facts.MeasureFailed)
    assert (failed.edition, failed.problem.category) == (7, "unavailable")
