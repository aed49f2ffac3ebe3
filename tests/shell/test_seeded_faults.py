"""Seeded faults in the owner and the machine: the explorer must find each one.

Each is a mistake that a careful programmer might make; `pytest -s` prints the stories.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from orchestrator.base.background import Background
from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.errors import Problem
from orchestrator.machine.actions import ending
from orchestrator.machine.actions.working import Step
from orchestrator.machine.commands import (
    Accept,
    Command,
    Concluded,
    Effect,
    Post,
    SetTimer,
    Settle,
    SetToken,
    Timings,
)
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import CancelRequested, Child, Fact, Request, SlotEvidence
from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE, Row
from orchestrator.runtime.answers import LeasedServer, PastLoad, load_outcome
from orchestrator.runtime.gate import Gate
from orchestrator.runtime.owner import Call, Owner
from orchestrator.runtime.ports import SlotLock
from orchestrator.runtime.snapshot import Snapshot
from tests.kit.shell.explorer import Report, explore
from tests.kit.shell.gates import GatedEffects, HeldLock
from tests.kit.shell.records import HeldUpError, stuck
from tests.kit.shell.scene import WITH_HANG, WITH_HOST, WITH_KEEPER, RecordedLifecycle, Scene
from tests.kit.shell.stage import Stage


def caught(report: Report, *names: str, within: int) -> None:
    """Assert that the fault broke one of these invariants, in a story of at most `within` moves."""
    print(f"\n{report}")
    found = report.counterexample
    assert found is not None, "the seeded fault was not found"
    assert found.invariant in names, found.story
    assert len(found.steps) <= within, found.story


@dataclass(frozen=True)
class Fault:
    """A faulty owner, a scene that shows it, and the invariants that it breaks."""

    owner: type[Owner]
    scene: Scene
    found: tuple[str, ...]
    within: int = 20


# ------------------------------------------------------------------------------ evidence and locks


class TakesOldPulse(Owner):
    """Takes a child for alive because it was alive once."""

    def _of_child(self, holds: Callable[[Child], bool]) -> bool:
        return self.snapshot.ctx.child is not None


class TakesOldEmptiness(Owner):
    """Takes the slot for empty at the spawn because a kill had emptied it."""

    def _take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        return SlotEvidence(is_empty=True), super()._take_slot()[1]


class KeepsTheLock(Owner):
    """Does not release the lock if no spawn follows."""

    def _take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        evidence, lock = super()._take_slot()
        if isinstance(lock, HeldLock):
            lock = lock.os.lock = UnreleasedLock(lock.os)
        return evidence, lock


class UnreleasedLock(HeldLock):
    def release(self) -> None:
        pass


# --------------------------------------------------------------------------------------- the gate


class LetsInLate(Owner):
    """Its gate lets callers in after it was closed."""

    def _make_gate(self, server: LeasedServer | None) -> Gate:
        return _LateGate(server, self.clock, self._post_drained)


class _LateGate(Gate):
    def enter(self, who: Hashable) -> LeasedServer | None:
        self._inside.add(who)
        return self.server


class LosesTheLast(Owner):
    """Its gate does not tell of the last one to leave."""

    def _make_gate(self, server: LeasedServer | None) -> Gate:
        return Gate(server, self.clock, lambda _: None)


class CountsNoWaiter(Owner):
    """Grants what has waited for a load, and does not count it."""

    def _settle(self, command: Settle) -> None:
        super()._settle(command)
        self.gate.leave(command.ticket)


class KeepsItClosed(Owner):
    """Does not open the gate again when an idle server is not stopped."""

    def _make_gate(self, server: LeasedServer | None) -> Gate:
        return _ClosedGate(server, self.clock, self._post_drained)


class _ClosedGate(Gate):
    def reopen(self) -> None:
        pass


# ------------------------------------------------------------------------------------------- tokens


class SharesTheToken(Owner):
    """Has one token for all loads."""

    def _token(self, generation: Generation) -> CancelToken:
        return super()._token(Generation(1))


class RenewsTheToken(Owner):
    """Gives every effect a new token, so that a cancel sets another one."""

    def _token(self, generation: Generation) -> CancelToken:
        self._tokens.pop(generation, None)
        return super()._token(generation)


class NeverSetsTheToken(Owner):
    def _carry_out(self, command: Command, lock: SlotLock | None) -> None:
        if not isinstance(command, SetToken):
            super()._carry_out(command, lock)


# ------------------------------------------------------------------------------------------ answers


class AnswersTwice(Owner):
    def _settle(self, command: Settle) -> None:
        call = self._calls.get(command.ticket)
        super()._settle(command)
        if call is not None:
            call.settled.set_result(command.answer)


class LosesAnswers(Owner):
    """Does not answer superseded callers."""

    def _settle(self, command: Settle) -> None:
        answer = command.answer
        if not isinstance(answer, Problem) or answer.category != "superseded":
            super()._settle(command)


class AnswersOnlyTheFirst(Owner):
    """Answers one call per step, so that callers that joined wait for ever."""

    def pump(self, fact: Fact) -> None:
        self._answered = False
        super().pump(fact)

    def _settle(self, command: Settle) -> None:
        if not self._answered:
            self._answered = True
            super()._settle(command)


class AnswersSomethingElse(Owner):
    def _settle(self, command: Settle) -> None:
        answer = command.answer
        if isinstance(answer, Problem):
            answer = replace(answer, category="internal")
        super()._settle(replace(command, answer=answer))


class ForgetsTheGeneration(Owner):
    def _accept(self, command: Accept) -> None:
        self._token(command.generation)


class KeepsCalls(Owner):
    """Retains a caller that has gone away."""

    def _withdraw(self, call: Call) -> None:
        super()._withdraw(call)
        if call.settled.cancelled():
            self._calls[call.ticket] = call


# ----------------------------------------------------------------------------- callers that go away


class ForgetsWhoLeftEarly(Owner):
    """Does not notice a caller that left before its request arrived."""

    def ask(self, call: Call, fact: Request) -> None:
        self.post(fact)


class CancelsForEverybody(Owner):
    """Cancels the load when one of its callers leaves."""

    def _withdraw(self, call: Call) -> None:
        if call.settled.cancelled():
            generation = call.accepted.result() if call.accepted.done() else None
            self.post(CancelRequested(call.ticket, None, generation, self.clock()))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ order, and showing


class PublishesLast(Owner):
    """Carries out the commands before it publishes the snapshot."""

    def pump(self, fact: Fact) -> None:
        lock: SlotLock | None = None
        try:
            fact, lock = self._with_evidence(fact)
            before = self.snapshot
            state, ctx, commands = self._machine.step(before.state, before.ctx, fact)
            concluded = [c for c in commands if isinstance(c, Concluded)]
            after = self._next_snapshot(fact, state, ctx, concluded)
            for command in commands:
                self._carry_out_safely(command, lock)
            self.snapshot = after
            if state is not before.state:
                self._report_transition(fact, before, after)
        finally:
            if lock is not None:
                lock.release()


class ShowsOnlyTransitions(Owner):
    """Publishes a step only if the state changes."""

    def _next_snapshot(self, fact: Fact, state: State, *rest: Any) -> Snapshot:
        before = self.snapshot
        return before if state is before.state else super()._next_snapshot(fact, state, *rest)


class TellsNoTransition(Owner):
    def _report_transition(self, fact: Fact, before: Snapshot, after: Snapshot) -> None:
        if after.state is not State.KILLING:
            super()._report_transition(fact, before, after)


class TellsTheLastAnswer(Owner):
    """Records the last answer to a caller as the outcome of the load."""

    def _accept(self, command: Accept) -> None:
        super()._accept(command)
        self._of = {**getattr(self, "_of", {}), command.ticket: command.generation}

    def _settle(self, command: Settle) -> None:
        super()._settle(command)
        generation, answer = (
            getattr(self, "_of", {}).get(command.ticket),
            cast("Any", command.answer),
        )
        if generation is not None:
            outcome = answer if isinstance(answer, Problem) else load_outcome(answer)
            wrong = PastLoad(generation, State.IDLE, "", None, 0.0, 0.0, Timings(), outcome)
            others = (load for load in self.snapshot.history if load.generation != generation)
            self.snapshot = replace(self.snapshot, history=(*others, wrong))


# ------------------------------------------------------------------------------- commands, and time


class DropsItsOwnFacts(Owner):
    """Drops the fact that starts a queued load."""

    def _carry_out(self, command: Command, lock: SlotLock | None) -> None:
        if not isinstance(command, Post):
            super()._carry_out(command, lock)


class ForgetsTheTime(Owner):
    def _carry_out(self, command: Command, lock: SlotLock | None) -> None:
        if not isinstance(command, SetTimer):
            super()._carry_out(command, lock)


class SwallowsAFailedStart(Owner):
    """Posts no completion for an effect that cannot start."""

    def _start(self, effect: Effect, lock: SlotLock | None) -> None:
        with contextlib.suppress(OSError):
            self.effects.start(effect, self._token(effect.generation), lock)


class StopsAtTheFirstCommand(Owner):
    """Drops the commands behind one that raises."""

    def _carry_out_safely(self, command: Command, lock: SlotLock | None) -> None:
        self._carry_out(command, lock)
        if isinstance(command, SetToken):
            raise OSError(9, "Bad file descriptor")


STEP = "promise_every_fact_is_processed"
FAULTS = (
    Fault(TakesOldPulse, Scene("load A", warm="A"), ("inv_loaded_is_what_was_requested",)),
    Fault(
        TakesOldEmptiness,
        Scene("load A", kinds=frozenset({"stray"})),
        ("inv_spawning_is_verified",),
    ),
    Fault(KeepsTheLock, Scene("load A; cancel"), ("promise_the_lock_is_not_kept",)),
    Fault(
        SharesTheToken,
        Scene("load A | load B", mishaps=0),
        ("promise_a_token_belongs_to_one_load",),
    ),
    Fault(RenewsTheToken, Scene("load A"), ("promise_a_token_belongs_to_one_load",)),
    Fault(
        NeverSetsTheToken,
        Scene("load A; cancel"),
        ("inv_token_set_once", "promise_a_token_belongs_to_one_load"),
    ),
    Fault(AnswersTwice, Scene("unload"), (STEP,)),
    Fault(LosesAnswers, Scene("load A | load B", mishaps=0), ("promise_answers_arrive",)),
    Fault(AnswersOnlyTheFirst, Scene("load A | load A", mishaps=0), ("promise_answers_arrive",)),
    Fault(AnswersSomethingElse, Scene("load A | load B", mishaps=0), ("promise_answers_arrive",)),
    Fault(ForgetsTheGeneration, Scene("load A"), ("promise_answers_arrive",)),
    Fault(KeepsCalls, Scene("load A; withdraw"), ("promise_no_call_is_retained",)),
    Fault(
        ForgetsWhoLeftEarly,
        Scene("load A late; withdraw"),
        ("inv_answered_once", "inv_cancel_before_the_commit_wins"),
    ),
    Fault(
        CancelsForEverybody,
        Scene("load A; withdraw | load A", mishaps=0),
        ("inv_answered_once", "inv_only_meant_calls_are_cancelled", "promise_no_call_is_retained"),
    ),
    Fault(PublishesLast, Scene("load A"), ("promise_the_snapshot_comes_first",)),
    Fault(ShowsOnlyTransitions, Scene("load A | load B"), ("promise_the_snapshot_is_the_machine",)),
    Fault(TellsNoTransition, Scene("load A"), ("promise_every_transition_is_an_event",)),
    Fault(
        TellsTheLastAnswer,
        Scene("load A | load A id=x; cancel x", mishaps=0),
        ("promise_the_outcome_is_the_loads",),
    ),
    Fault(
        DropsItsOwnFacts,
        Scene("load B | load A queue", mishaps=0),
        ("inv_at_rest_all_are_answered",),
    ),
    Fault(ForgetsTheTime, Scene("lease | load B", warm="A"), ("promise_timers_are_kept",)),
    Fault(
        LetsInLate,
        Scene("lease; release | unload", warm="A", mishaps=0),
        ("inv_nobody_is_let_in_late",),
    ),
    Fault(
        LosesTheLast,
        Scene("lease; release | unload", warm="A", mishaps=0),
        ("inv_a_drain_ends_with_the_last",),
    ),
    Fault(CountsNoWaiter, Scene("load A | lease", mishaps=0), ("promise_a_lease_is_counted",)),
    Fault(
        KeepsItClosed,
        Scene("load o/B prefetch", warm="A", policy=Policy(idle_ttl_s=1.0), mishaps=0),
        ("inv_the_gate_is_as_the_machine_says",),
    ),
    Fault(SwallowsAFailedStart, Scene("load A"), ("inv_at_rest_is_settled",)),
    Fault(StopsAtTheFirstCommand, Scene("load A | load B", mishaps=0), (STEP,)),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.owner.__name__)
def test_explorer_finds_a_faulty_owner(fault: Fault) -> None:
    """Each fault breaks a promise in some order of events."""
    sound = explore(fault.scene)
    assert sound.counterexample is None
    report = explore(replace(fault.scene, owner=fault.owner))
    caught(report, *fault.found, within=fault.within)
    assert report.schedules <= sound.schedules


# ------------------------------------------------------------------------- faults in the machine


def test_explorer_finds_a_failed_kill_that_forgets_the_pid() -> None:
    """The next load would start a second server."""

    def fail_all(s: Step[Any]) -> None:
        ending.fail_all(s)
        s.put(child=None)

    machine = RecordedLifecycle(fail_all=fail_all)
    report = explore(Scene("unload", warm="A", machine=machine))
    caught(report, "inv_a_server_ends_once", within=6)


def test_explorer_finds_a_spawn_into_an_occupied_slot() -> None:
    machine = RecordedLifecycle(slot_is_empty=lambda _, __: True)
    kinds: Any = frozenset({"stray"})
    report = explore(Scene("load A", kinds=kinds, machine=machine))
    caught(report, "inv_spawning_is_verified", within=10)


def test_explorer_finds_a_cancelled_spawn_presumed_dead() -> None:
    """It may still hand over a live child, which nobody would know of."""

    def forgetful(row: Row) -> Row:
        cancelled = row.trigger == "spawned" and row.guards == ("is_current",)
        return replace(row, actions=("end_effect", "take_next", "begin_kill")) if cancelled else row

    machine = RecordedLifecycle([forgetful(row) for row in TABLE])
    report = explore(Scene("load A; cancel", machine=machine))
    caught(report, "inv_no_server_is_forgotten", within=16)


def test_explorer_finds_a_token_that_is_not_checked_after_the_wait() -> None:
    ready = ("is_current", "token_is_unset", "child_is_alive")

    def deaf(row: Row) -> Row:
        is_ready = row.trigger == "ready" and row.guards == ready
        return replace(row, guards=("is_current", "child_is_alive")) if is_ready else row

    machine = RecordedLifecycle([deaf(row) for row in TABLE])
    report = explore(Scene("load A; cancel", machine=machine))
    caught(report, "inv_healthy_is_proven", within=20)
    assert report.counterexample is not None
    assert "ready of load 1" in report.counterexample.story


def test_explorer_finds_a_keeper_that_says_too_early_that_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill_its_own(effects: GatedEffects) -> None:
        for process in tuple(effects.os.alive.values()):
            if not process.is_left:
                effects.crash(process.pid)

    monkeypatch.setattr(GatedEffects, "kill_everything", kill_its_own)
    report = explore(Scene("unload", warm="A", kinds=WITH_KEEPER))
    caught(report, "inv_unloaded_is_empty", within=7)


def test_explorer_finds_a_keeper_that_loses_an_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatedEffects, "_note_exit", lambda *_: None)
    report = explore(Scene("load A", kinds=WITH_KEEPER))
    caught(report, "inv_healthy_at_rest_is_alive", within=20)


def test_explorer_finds_an_adoption_without_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "_may_answer", lambda _, process: process is not None)
    report = explore(Scene("unload B", warm="A", kinds=WITH_HOST, policy=Policy(keeps_server=True)))
    caught(report, "inv_healthy_is_proven", within=6)


def test_explorer_finds_a_hang_that_is_told_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(stage: Stage) -> Child | None:
        is_told = bool(stage.inbox.facts) or stage.state is not State.HEALTHY
        return None if is_told else stage.owner.snapshot.ctx.child

    monkeypatch.setattr(Stage, "_hung_child", child)
    report = explore(Scene("unload B", warm="A", kinds=WITH_HANG))
    caught(report, "inv_a_server_is_stopped_for_a_reason", within=6)


def test_explorer_finds_an_owner_that_waits_for_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    with stuck():
        monkeypatch.setattr(Background, "put", lambda _, work: work())
        with pytest.raises(HeldUpError, match="transitioned"):
            explore(Scene("load A", mishaps=0), log=contextlib.nullcontext)
        monkeypatch.undo()
