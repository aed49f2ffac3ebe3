"""Faults put into the owner on purpose: the explorer finds each, as what it is.

An explorer that has never found anything may be looking the wrong way. Each fault is one a careful
person might commit; `pytest -s` shows the stories.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.errors import Problem
from orchestrator.machine import actions
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
from orchestrator.machine.facts import CancelRequested, Fact, Request, SlotEvidence
from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE, Row
from orchestrator.runtime.history import LoadRecord
from orchestrator.runtime.owner import Call, Owner
from orchestrator.runtime.ports import SlotLock
from orchestrator.runtime.snapshot import Snapshot
from tests.kit.shell.explorer import Report, explore
from tests.kit.shell.gates import HeldLock
from tests.kit.shell.scene import RecordedLifecycle, Scene


def caught(report: Report, *names: str, within: int) -> None:
    """The fault is found, as the right thing, and the story is short enough to be read."""
    print(f"\n{report}")
    found = report.counterexample
    assert found is not None, "the seeded fault was not found"
    assert found.invariant in names, found.story
    assert len(found.steps) <= within, found.story


@dataclass(frozen=True)
class Fault:
    """A broken owner, where it shows, and as what."""

    owner: type[Owner]
    scene: Scene
    found: tuple[str, ...]
    within: int = 20


# ------------------------------------------------------------------------------ evidence and locks


class TakesOldPulse(Owner):
    """A child that was alive once is believed to be alive."""

    def _child_is_alive(self) -> bool:
        return self.snapshot.ctx.child is not None


class TakesOldEmptiness(Owner):
    """A slot that a kill has emptied is believed to be empty when the model is there."""

    def _take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        return SlotEvidence(is_empty=True), super()._take_slot()[1]


class KeepsTheLock(Owner):
    """Evidence is taken, no spawn follows, and nobody lets go of the lock."""

    def _take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        evidence, lock = super()._take_slot()
        if isinstance(lock, HeldLock):
            lock = lock.os.lock = UnreleasedLock(lock.os)
        return evidence, lock


class UnreleasedLock(HeldLock):
    def release(self) -> None:
        pass


# ------------------------------------------------------------------------------------------- tokens


class SharesTheToken(Owner):
    """One token for all loads."""

    def _token(self, generation: Generation) -> CancelToken:
        return super()._token(Generation(1))


class RenewsTheToken(Owner):
    """Every effect gets a fresh one: the cancel sets another."""

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
    """Who has been superseded is not told."""

    def _settle(self, command: Settle) -> None:
        answer = command.answer
        if not isinstance(answer, Problem) or answer.category != "superseded":
            super()._settle(command)


class AnswersOnlyTheFirst(Owner):
    """One answer a step: callers that joined wait for ever."""

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
    """A caller that has gone is remembered for ever."""

    def _withdraw(self, call: Call) -> None:
        super()._withdraw(call)
        if call.settled.cancelled():
            self._calls[call.ticket] = call


# ----------------------------------------------------------------------------- callers that go away


class ForgetsWhoLeftEarly(Owner):
    """A caller that left while its model was looked up is not noticed."""

    def ask(self, call: Call, fact: Request) -> None:
        self.post(fact)


class CancelsForEverybody(Owner):
    """A caller that leaves takes the load along."""

    def _withdraw(self, call: Call) -> None:
        if call.settled.cancelled():
            generation = call.accepted.result() if call.accepted.done() else None
            self.post(CancelRequested(call.ticket, None, generation, self.clock()))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ order, and showing


class PublishesLast(Owner):
    """Commands first, then the snapshot: who is answered reads what was true before."""

    def pump(self, fact: Fact) -> None:
        lock: SlotLock | None = None
        try:
            fact, lock = self._with_evidence(fact)
            before = self.snapshot
            state, ctx, commands = self._machine.step(before.state, before.ctx, fact)
            shown = self._shown(fact, state, ctx)
            for ended in (c for c in commands if isinstance(c, Concluded)):
                self.history.add(ended, now=self.clock(), story=shown.story)
            for command in commands:
                self._carry_out_safely(command, lock)
            self.snapshot = shown
            if state is not before.state:
                self._tell(fact, before, shown)
        finally:
            if lock is not None:
                lock.release()


class ShowsOnlyTransitions(Owner):
    """A step that stays in its state is not published."""

    def _shown(self, fact: Fact, state: State, ctx: Any) -> Snapshot:
        return self.snapshot if state is self.snapshot.state else super()._shown(fact, state, ctx)


class TellsNoTransition(Owner):
    def _tell(self, fact: Fact, before: Snapshot, shown: Snapshot) -> None:
        if shown.state is not State.KILLING:
            super()._tell(fact, before, shown)


class TellsTheLastAnswer(Owner):
    """What became of a load is what its last caller was told."""

    def _accept(self, command: Accept) -> None:
        super()._accept(command)
        self._of = {**getattr(self, "_of", {}), command.ticket: command.generation}

    def _settle(self, command: Settle) -> None:
        super()._settle(command)
        if (generation := getattr(self, "_of", {}).get(command.ticket)) is not None:
            records, answer = self.history.records, cast("Any", command.answer)
            known = records.get(generation)
            target = known.target if known else cast("Any", self.snapshot.ctx.job).target
            records[generation] = LoadRecord(generation, target, 0.0, Timings(), answer)


# ------------------------------------------------------------------------------- commands, and time


class DropsItsOwnFacts(Owner):
    """A queued load is never told that it may start."""

    def _carry_out(self, command: Command, lock: SlotLock | None) -> None:
        if not isinstance(command, Post):
            super()._carry_out(command, lock)


class ForgetsTheTime(Owner):
    def _carry_out(self, command: Command, lock: SlotLock | None) -> None:
        if not isinstance(command, SetTimer):
            super()._carry_out(command, lock)


class SwallowsAFailedStart(Owner):
    """An effect that cannot begin never reports."""

    def _start(self, effect: Effect, lock: SlotLock | None) -> None:
        with contextlib.suppress(OSError):
            self.effects.start(effect, self._token(effect.generation), lock)


class StopsAtTheFirstCommand(Owner):
    """What is behind a command that raises is lost."""

    def _carry_out_safely(self, command: Command, lock: SlotLock | None) -> None:
        self._carry_out(command, lock)
        if isinstance(command, SetToken):
            raise OSError(9, "Bad file descriptor")


STEP = "promise_every_fact_is_digested"
FAULTS = (
    Fault(TakesOldPulse, Scene("load A", warm="A"), ("inv_loaded_is_what_was_asked",)),
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
    Fault(KeepsCalls, Scene("load A; withdraw"), ("promise_nothing_is_kept",)),
    Fault(
        ForgetsWhoLeftEarly,
        Scene("load A slow; withdraw"),
        ("inv_answered_once", "inv_an_end_before_the_commit_wins"),
    ),
    Fault(
        CancelsForEverybody,
        Scene("load A; withdraw | load A", mishaps=0),
        ("inv_answered_once", "inv_cancelled_only_if_asked", "promise_nothing_is_kept"),
    ),
    Fault(PublishesLast, Scene("load A"), ("promise_the_snapshot_comes_first",)),
    Fault(ShowsOnlyTransitions, Scene("load A | load B"), ("promise_the_snapshot_is_the_machine",)),
    Fault(TellsNoTransition, Scene("load A"), ("promise_every_transition_is_told",)),
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
    Fault(ForgetsTheTime, Scene("lease | load B", warm="A"), ("inv_at_rest_is_settled",)),
    Fault(SwallowsAFailedStart, Scene("load A"), ("inv_at_rest_is_settled",)),
    Fault(StopsAtTheFirstCommand, Scene("load A | load B", mishaps=0), (STEP,)),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.owner.__name__)
def test_a_fault_in_the_owner_is_found(fault: Fault) -> None:
    """Each breaks a promise in some order of events, and the story says in which."""
    sound = explore(fault.scene)
    assert sound.counterexample is None
    report = explore(replace(fault.scene, owner=fault.owner))
    caught(report, *fault.found, within=fault.within)
    assert report.schedules <= sound.schedules


# ------------------------------------------------------------------------- faults in the machine


def test_a_failed_kill_that_forgets_the_pid_is_found() -> None:
    """The next load would start a second server beside what would not die."""

    def fail_all(s: Step[Any]) -> None:
        actions.fail_all(s)
        s.put(child=None)

    machine = RecordedLifecycle(fail_all=fail_all)
    report = explore(Scene("unload", warm="A", machine=machine))
    caught(report, "inv_a_server_ends_once", within=6)


def test_a_second_server_beside_the_first_is_found() -> None:
    """The slot is asked, and the answer is not listened to."""
    machine = RecordedLifecycle(slot_is_empty=lambda _, __: True)
    kinds: Any = frozenset({"stray"})
    report = explore(Scene("load A", kinds=kinds, machine=machine))
    caught(report, "inv_spawning_is_verified", within=10)


def test_a_cancelled_spawn_that_is_presumed_dead_is_found() -> None:
    """It may still hand over a live child, and then nobody would know of it."""

    def forgetful(row: Row) -> Row:
        cancelled = row.trigger == "spawned" and row.guards == ("is_current",)
        return replace(row, actions=("end_effect", "take_next", "begin_kill")) if cancelled else row

    machine = RecordedLifecycle([forgetful(row) for row in TABLE])
    report = explore(Scene("load A; cancel", machine=machine))
    caught(report, "inv_no_server_is_forgotten", within=16)


def test_a_cancel_that_comes_too_late_to_be_heard_is_found() -> None:
    """The token is looked at before the wait, and not after it."""
    ready = ("is_current", "token_is_unset", "child_is_alive")

    def deaf(row: Row) -> Row:
        is_ready = row.trigger == "ready" and row.guards == ready
        return replace(row, guards=("is_current", "child_is_alive")) if is_ready else row

    machine = RecordedLifecycle([deaf(row) for row in TABLE])
    report = explore(Scene("load A; cancel", machine=machine))
    caught(report, "inv_healthy_is_earned", within=20)
    assert report.counterexample is not None
    assert "ready of load 1" in report.counterexample.story
