"""Layer B of the pool is worth what it finds: seeded faults of its shell, one by one.

Each is what a tired developer would write. If one is not found, the explorer is to be mended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.pool import commands
from orchestrator.pool.owner import Lease, PoolCall, PoolOwner
from orchestrator.pool.pool import AsyncModelPool, ModelPool
from orchestrator.pool.slot import PoolSlot
from orchestrator.runtime.gate import Gate
from orchestrator.runtime.owner import Call
from orchestrator.settings.request import LoadRequest
from tests.kit.shell.explorer import explore
from tests.kit.shell.pool_facades import LoopPoolStage, ThreadPoolStage
from tests.kit.shell.pool_scene import PoolScene


# ------------------------------------------------------------------------------------- the owner
class LosesAnswers(PoolOwner):
    """Does not say that a slot is empty."""

    def _carry_out(self, command: commands.Command) -> None:
        if not isinstance(command, commands.AnswerEmptied):
            super()._carry_out(command)


class KeepsLateLeases(PoolOwner):
    """Forgets the lease that is granted to somebody who has just gone."""

    def _grant(self, ticket: Ticket, name: str) -> None:
        if ticket not in self._calls:
            self._entered.pop(ticket, None)
        super()._grant(ticket, name)


class IgnoresWhoEnters(PoolOwner):
    """Closes an idle gate also when somebody has entered since it was idle."""

    def _hold(self, made: Sequence[commands.Command], *, must: bool) -> bool:
        return super()._hold(made, must=True)


class ForgetsWhoLeaves(PoolOwner):
    """Does not tell the machine of callers that have gone."""

    def _withdraw(self, call: PoolCall) -> None: ...


class NeverLooks(PoolOwner):
    """Does not look when the last lease of a server has ended."""

    def left(self, name: str, gate: Gate) -> None: ...


# ------------------------------------------------------------------------------------- the slots
class LeavesGatesOpen(PoolSlot):
    """Stops a server without closing its gate first."""

    def _shut(self, order: Any) -> None:
        self._order = order


class OpensClosedGates(PoolSlot):
    """Forgets a stop that came before the gate was there."""

    def _settled(self, generation: Generation, call: Call) -> None:
        order, self._order = self._order, "start"
        super()._settled(generation, call)
        self._order = order


class RenamesOldReports(PoolSlot):
    """Says of a start that waits for its turn what is true of the one before."""

    def start(self, generation: Generation, request: LoadRequest) -> None:
        self._generation = generation
        super().start(generation, request)


class LosesFailures(PoolSlot):
    """Reports an empty slot only if nothing was wrong."""

    def _end(self, generation: Generation, problem: Problem | None) -> None:
        if problem is None or problem.category == "cancelled":
            super()._end(generation, problem)


class NeverRests(PoolSlot):
    """Keeps the slot claimed when it is empty."""

    def _rest(self) -> None: ...


class TakesTheClosedForEmpty(PoolSlot):
    """Says that a slot is empty although its server could not be stopped."""

    def close(self, *, keep: bool, ended: Callable[[bool], None]) -> None:
        super().close(keep=keep, ended=lambda _: ended(True))


# ----------------------------------------------------------------------------------- the facades
class KeepsLeases(AsyncModelPool):
    """Gives a lease back only if it has noticed the grant."""

    def _leave(self, call: PoolCall | None, lease: Lease | None) -> None:
        super()._leave(None, lease)


class KeepsLeasesInThreads(ModelPool):
    """The same for threads."""

    def _leave(self, call: PoolCall | None, lease: Lease | None) -> None:
        super()._leave(None, lease)


class LoopKeepsLeases(LoopPoolStage):
    facade = KeepsLeases


class ThreadKeepsLeases(ThreadPoolStage):
    facade = KeepsLeasesInThreads


OWNERS = [
    (LosesAnswers, PoolScene("unload A", ThreadPoolStage, warm="A"), "somebody_waits"),
    (KeepsLateLeases, PoolScene("lease A; withdraw", ThreadPoolStage), "a_lease_is_lost"),
    (
        IgnoresWhoEnters,
        PoolScene("load B | lease A; release", ThreadPoolStage, warm="A"),
        "promise_commands_are_carried_out",
    ),
    (ForgetsWhoLeaves, PoolScene("lease A; withdraw", LoopPoolStage), "waits_for_nobody"),
    (
        NeverLooks,
        PoolScene("lease A; release | load B", ThreadPoolStage, warm="A"),
        "leaves_for_later",
    ),
]
SLOTS = [
    (LeavesGatesOpen, PoolScene("unload A", ThreadPoolStage, warm="A"), "carried_out"),
    (OpensClosedGates, PoolScene("lease A; withdraw", ThreadPoolStage), "only_residents_are_open"),
    (
        RenamesOldReports,
        PoolScene("unload A | load A", ThreadPoolStage, warm="A"),
        "inv_memory_is_reserved",
    ),
    (
        LosesFailures,
        PoolScene("load A", ThreadPoolStage, mishaps=1),
        "somebody_waits",
    ),
    (NeverRests, PoolScene("unload A", ThreadPoolStage, warm="A"), "something_is_left"),
    (
        TakesTheClosedForEmpty,
        PoolScene("shutdown", ThreadPoolStage, warm="A", mishaps=1),
        "inv_memory_is_reserved",
    ),
]
FACADES = [LoopKeepsLeases, ThreadKeepsLeases]


def assert_found(scene: PoolScene, breaks: str) -> None:
    report = explore(scene)
    print(f"\n{report}")
    assert report.counterexample is not None, report
    assert breaks in report.counterexample.invariant, report


@pytest.mark.parametrize(("owner", "scene", "breaks"), OWNERS)
def test_explorer_finds_a_fault_of_the_owner(
    owner: type[PoolOwner], scene: PoolScene, breaks: str
) -> None:
    assert_found(scene.with_fault(owner=owner), breaks)


@pytest.mark.parametrize(("slot", "scene", "breaks"), SLOTS)
def test_explorer_finds_a_fault_of_a_slot(
    slot: type[PoolSlot], scene: PoolScene, breaks: str
) -> None:
    assert_found(scene.with_fault(slot=slot), breaks)


@pytest.mark.parametrize("stage", FACADES)
def test_explorer_finds_a_facade_that_keeps_a_lease(stage: type[ThreadPoolStage]) -> None:
    assert_found(PoolScene("lease A; withdraw", stage), "a_lease_is_lost")


@pytest.mark.parametrize(
    "scene", [scene for _, scene, _ in (*OWNERS, *SLOTS)], ids=lambda scene: scene.program
)
def test_without_the_fault_nothing_is_found(scene: PoolScene) -> None:
    """A promise that is always broken would find every fault."""
    report = explore(scene)
    assert report.counterexample is None, report.counterexample
