"""The owner, pumped by hand, when its effects, its log or its callers fail."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from orchestrator.base import log
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import Answer, Loaded
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import (
    CancelRequested,
    Child,
    Fact,
    Fetched,
    LookUpRequested,
    SlotEvidence,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.machine.states import State
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.owner import Call, Owner
from orchestrator.settings.request import LoadRequest
from tests.kit.shell.gates import ALL_KINDS, GatedEffects, VirtualClock
from tests.kit.shell.harness import PATIENCE_S
from tests.kit.shell.pumped import PumpedOwner
from tests.kit.shell.records import Entry, outcomes


def pumped_owner(**settings: Any) -> PumpedOwner:
    clock = VirtualClock()
    return PumpedOwner(Owner(lambda post: GatedEffects(post, clock), clock=clock, **settings))


@pytest.fixture
def pumped() -> PumpedOwner:
    return pumped_owner()


def answer_of(call: Call) -> Answer:
    assert call.settled.done(), "the call has no answer"
    return call.settled.result()


def category_of(call: Call) -> str:
    answer = answer_of(call)
    assert isinstance(answer, Problem), answer
    return answer.category


def logged(failures: list[Entry]) -> list[str]:
    """Return and clear what was logged as an error: it was expected."""
    log.flush()
    events = [entry["event"] for entry in failures]
    failures.clear()
    return events


# ------------------------------------------------------------------------------------------ tokens


def test_a_load_in_flight_keeps_its_token_while_others_queue(
    pumped: PumpedOwner,
) -> None:
    """A cancel that sets a new token has no effect if the effect polls the old one."""
    pumped.load("A")
    pumped.let_through("kill")
    for number in range(60):
        pumped.load(f"M{number}", on_busy="queue")
    download = pumped.effects.wait_for("download", 1)
    assert not download.token.is_set()
    pumped.cancel(1)
    assert download.token.reason == "user"


def test_tokens_of_ended_loads_are_dropped(pumped: PumpedOwner) -> None:
    pumped.effects.open()
    for number in range(20):
        pumped.load("AB"[number % 2])
        pumped.process()
    assert pumped.state is State.HEALTHY
    assert pumped.owner._tokens.keys() == {Generation(20)}


def test_the_history_holds_the_last_256_loads(pumped: PumpedOwner) -> None:
    pumped.effects.open()
    for number in range(258):
        pumped.load(f"M{number}")
    assert len(outcomes(pumped.owner)) == 256
    assert min(outcomes(pumped.owner)) == 3
    assert all(isinstance(outcome, LoadOutcome) for outcome in outcomes(pumped.owner).values())


def test_a_withdrawn_call_is_forgotten(pumped: PumpedOwner) -> None:
    for _ in range(10):
        assert pumped.load("A").settled.cancel()
        pumped.process()
    assert not pumped.owner._calls
    assert set(vars(pumped.owner)) == set(vars(pumped_owner().owner))


# -------------------------------------------------------------------------- effects that fail


def test_a_slot_that_cannot_be_checked_counts_as_occupied(
    pumped: PumpedOwner, failures: list[Entry]
) -> None:
    """Without an answer the load would wait for ever."""

    def broken() -> tuple[SlotEvidence, None]:
        raise OSError(24, "Too many open files")

    call = pumped.load("A")
    pumped.let_through("kill")
    pumped.effects.take_slot = broken  # type: ignore[method-assign]
    for _ in range(3):
        pumped.let_through("download", "kill")
    pumped.let_through("download", "kill")
    assert category_of(call) == "slot_occupied"
    assert "Too many open files" in str(answer_of(call))
    assert pumped.state is State.IDLE
    assert not pumped.effects.os.started
    assert set(logged(failures)) == {"slot.not_answering"}


def test_a_child_that_cannot_be_checked_counts_as_dead(
    pumped: PumpedOwner, failures: list[Entry]
) -> None:

    def broken(_: Child) -> bool:
        raise OSError(24, "Too many open files")

    call = pumped.load("A")
    pumped.let_through("kill", "download", "spawn")
    pumped.effects.child_is_alive = broken  # type: ignore[method-assign, assignment]
    pumped.let_through("probe", "kill")
    assert category_of(call) == "server_start_failed"
    assert pumped.state is State.IDLE
    assert not pumped.effects.os.alive
    assert logged(failures) == ["child.not_answering"]


def test_a_failing_command_does_not_prevent_the_others(
    pumped: PumpedOwner, failures: list[Entry]
) -> None:
    """The machine has taken the step, so its other answers are due."""

    def broken() -> None:
        raise OSError(9, "Bad file descriptor")

    call = pumped.load("A")
    pumped.effects.wait_for("kill").token.on_set(broken)
    newer = pumped.load("B")
    assert category_of(call) == "superseded"
    assert newer.accepted.result() == 2
    assert logged(failures) == ["command.failed"]
    pumped.effects.open()
    pumped.process()
    assert isinstance(answer_of(newer), Loaded)


@pytest.mark.parametrize("kind", ["kill", "download", "spawn", "probe"])
def test_an_effect_that_cannot_start_fails_its_load(
    kind: str, pumped: PumpedOwner, failures: list[Entry]
) -> None:
    """In every phase, and the next load succeeds."""

    def refuse(effect: object, _: object) -> None:
        if type(effect).__name__.lower() == kind:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    pumped.effects.watch = refuse
    pumped.effects.open(ALL_KINDS - {"kill"})
    call = pumped.load("A")
    while pumped.effects.parked:
        pumped.let_through("kill")
    assert isinstance(answer_of(call), Problem)
    assert pumped.state is State.IDLE
    assert logged(failures) == ["effect.failed"]
    pumped.effects.watch = lambda _, __: None
    pumped.effects.open()
    again = pumped.load("A")
    assert isinstance(answer_of(again), Loaded)
    assert pumped.effects.os.most_alive == 1


# ----------------------------------------------------------------------------- unusual facts


def test_a_fact_that_cannot_be_processed_changes_nothing(
    pumped: PumpedOwner, failures: list[Entry]
) -> None:
    pumped.load("A")
    before = pumped.owner.snapshot
    call = pumped.owner.call()
    broken: Any = LookUpRequested(call.ticket, None, "load", 0.0)  # type: ignore[arg-type]
    pumped.owner.ask(call, broken)
    pumped.process()
    assert category_of(call) == "internal"
    assert pumped.owner.snapshot == before
    unknown: Any = type("Unknown", (), {"trigger": "dance"})()
    pumped.owner.pump(unknown)
    assert pumped.owner.snapshot == before
    assert logged(failures) == ["owner.failed", "owner.failed"]


def test_the_slot_lock_is_released_if_the_step_fails(
    pumped: PumpedOwner, failures: list[Entry]
) -> None:
    """Otherwise the slot would stay locked until the process ends."""
    pumped.load("A")
    pumped.let_through("kill")
    nonsense: Any = Fetched(Generation(1), 0.0, None)  # type: ignore[arg-type]
    pumped.owner._machine = None  # type: ignore[assignment]
    pumped.owner.pump(nonsense)
    assert pumped.effects.os.lock is None
    assert logged(failures) == ["owner.failed"]


def test_a_caller_that_leaves_before_its_request_is_forgotten(pumped: PumpedOwner) -> None:
    call = pumped.owner.call()
    call.settled.cancel()
    pumped.process()
    assert pumped.state is State.IDLE
    request = LoadRequest(model_path="A")
    pumped.owner.ask(call, LookUpRequested(call.ticket, request, "load", pumped.owner.clock()))
    pumped.process()
    ctx = pumped.owner.snapshot.ctx
    assert (ctx.wanted, ctx.look_ups, pumped.owner._timers) == ((), (), {})
    assert pumped.state is State.IDLE
    assert not pumped.owner._calls


def test_an_abandoned_load_continues_if_the_policy_says_so() -> None:
    """Its outcome is recorded, although it has no caller."""
    for is_ready in (True, False):
        pumped = pumped_owner(policy=Policy(abandoned_load="continue"))
        call = pumped.load("A")
        call.settled.cancel()
        pumped.process()
        pumped.let_through("kill", "download", "spawn")
        probe = pumped.effects.wait_for("probe")
        probe.succeed() if is_ready else probe.fail()
        pumped.process()
        if not is_ready:
            assert Generation(1) not in outcomes(pumped.owner), "its server is not dead yet"
            pumped.let_through("kill")
        outcome = outcomes(pumped.owner)[Generation(1)]
        if is_ready:
            assert isinstance(outcome, LoadOutcome)
            assert pumped.state is State.HEALTHY
        else:
            assert isinstance(outcome, Problem)
            assert outcome.category == "server_start_failed"
            assert outcome.story == pumped.owner.snapshot.story


# --------------------------------------------------------------------------------- the thread


def test_every_call_around_the_end_is_answered() -> None:
    """Before, during and after the end: `shutting_down`, never silence."""
    owner = Owner(GatedEffects)
    owner.start("test")
    calls: list[Call] = []
    some, has_stopped = threading.Barrier(5), threading.Event()

    def ask() -> None:
        for number in range(200):
            call = owner.call()
            calls.append(call)
            if number % 2:  # waits for the slot, which nobody empties here
                owner.ask(call, UnloadRequested(call.ticket, None, 0.0))
            else:
                owner.ask(call, CancelRequested(call.ticket, "x", None, 0.0))
            if number == 50:
                some.wait(PATIENCE_S)
            if number == 150:
                assert has_stopped.wait(PATIENCE_S)

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    some.wait(PATIENCE_S)
    owner.stop()
    has_stopped.set()
    for caller in callers:
        caller.join(PATIENCE_S)
    answers = [call.settled.result(PATIENCE_S) for call in calls]
    refused = [answer for answer in answers if isinstance(answer, Problem)]
    assert {answer.category for answer in refused} == {"shutting_down"}
    assert 4 * 49 <= len(refused) < len(calls) == 800
    assert not owner._calls
    assert owner.events.is_closed


def test_facts_are_processed_in_order_on_one_thread() -> None:
    seen: list[tuple[int, Fact]] = []

    class Witness(Owner):
        def pump(self, fact: Fact) -> None:
            seen.append((threading.get_ident(), fact))
            super().pump(fact)

    owner = Witness(GatedEffects)
    owner.start("test")
    facts = [Withdrawn(owner.call().ticket, float(n)) for n in range(100)]
    for fact in facts:
        owner.post(fact)
    owner.stop()
    assert [fact for _, fact in seen] == facts
    assert len({thread for thread, _ in seen}) == 1
    assert threading.get_ident() not in {thread for thread, _ in seen}
