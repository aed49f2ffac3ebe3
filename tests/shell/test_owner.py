"""The owner, pumped by hand: what becomes of a step when something around it goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import Answer, Loaded
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import (
    CancelRequested,
    Child,
    Fact,
    Fetched,
    LoadRequested,
    SlotEvidence,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.machine.states import State
from orchestrator.runtime.owner import Call, Owner
from orchestrator.settings.request import LoadRequest
from tests.kit.machine.world import target
from tests.kit.shell.facade import PATIENCE_S
from tests.kit.shell.gates import ALL_KINDS, GatedEffects, VirtualClock
from tests.kit.shell.records import Entry, outcomes
from tests.kit.shell.stage import Inbox


class Hand:
    """An owner that processes what its inbox holds when it is told to."""

    def __init__(self, **settings: Any) -> None:
        self.clock = VirtualClock()
        self.owner = Owner(
            lambda post: GatedEffects(post, self.clock), clock=self.clock, **settings
        )
        self.inbox = Inbox()
        self.owner._inbox = self.inbox  # type: ignore[assignment]
        effects = self.owner.effects
        assert isinstance(effects, GatedEffects)
        self.effects = effects

    def turn(self) -> None:
        """Process everything there is."""
        while self.inbox.facts:
            self.owner.pump(self.inbox.facts.pop(0))

    def load(self, model: str, **fields: Any) -> Call:
        call = self.owner.call()
        request = LoadRequest(model_path=model, **fields)
        self.owner.ask(call, LoadRequested(call.ticket, target(request), self.clock()))
        self.turn()
        return call

    def cancel(self, generation: int) -> Call:
        call = self.owner.call()
        self.owner.ask(call, CancelRequested(call.ticket, None, generation, self.clock()))
        self.turn()
        return call

    def unload(self) -> Call:
        call = self.owner.call()
        self.owner.ask(call, UnloadRequested(call.ticket, None, self.clock()))
        self.turn()
        return call

    def let_through(self, *kinds: Any) -> None:
        for kind in kinds:
            self.effects.let_through(kind)
            self.turn()

    @property
    def state(self) -> State:
        return self.owner.snapshot.state


@pytest.fixture
def hand() -> Hand:
    return Hand()


def answer_of(call: Call) -> Answer:
    assert call.settled.done(), "it has no answer"
    return call.settled.result()


def category_of(call: Call) -> str:
    answer = answer_of(call)
    assert isinstance(answer, Problem), answer
    return answer.category


def logged(failures: list[Entry]) -> list[str]:
    """What was logged as an error; from here on it is expected."""
    events = [entry["event"] for entry in failures]
    failures.clear()
    return events


# ------------------------------------------------------------------------------------------ tokens


def test_the_token_of_a_load_in_flight_is_kept_however_many_wait_behind_it(hand: Hand) -> None:
    """A cancel that sets a fresh token, while the effect polls the old one, has no effect."""
    hand.load("A")
    hand.let_through("kill")
    for number in range(60):
        hand.load(f"M{number}", on_busy="queue")
    download = hand.effects.wait_for("download", 1)
    assert not download.token.is_set()
    hand.cancel(1)
    assert download.token.reason == "user"


def test_tokens_of_ended_loads_are_dropped(hand: Hand) -> None:
    """What is kept for each load would be kept for ever."""
    hand.effects.open()
    for number in range(20):
        hand.load("AB"[number % 2])
        hand.turn()
    assert hand.state is State.HEALTHY
    assert hand.owner._tokens.keys() == {Generation(20)}


def test_outcomes_are_kept_of_the_last_256_loads(hand: Hand) -> None:
    hand.effects.open()
    for number in range(258):
        hand.load(f"M{number}")
    assert len(outcomes(hand.owner)) == 256
    assert min(outcomes(hand.owner)) == 3
    assert all(isinstance(outcome, Loaded) for outcome in outcomes(hand.owner).values())


def test_a_call_that_was_withdrawn_leaves_nothing_behind(hand: Hand) -> None:
    for _ in range(10):
        assert hand.load("A").settled.cancel()
        hand.turn()
    assert not hand.owner._calls
    assert set(vars(hand.owner)) == set(vars(Hand().owner))


# ------------------------------------------------------------------- what cannot be asked or begun


def test_a_slot_that_cannot_be_asked_is_not_empty(hand: Hand, failures: list[Entry]) -> None:
    """The load waits for that answer: without one it would wait for ever."""

    def broken() -> tuple[SlotEvidence, None]:
        raise OSError(24, "Too many open files")

    call = hand.load("A")
    hand.let_through("kill")
    hand.effects.take_slot = broken  # type: ignore[method-assign]
    for _ in range(3):
        hand.let_through("download", "kill")
    hand.let_through("download", "kill")
    assert category_of(call) == "slot_occupied"
    assert "Too many open files" in str(answer_of(call))
    assert hand.state is State.IDLE
    assert not hand.effects.os.started
    assert set(logged(failures)) == {"slot.not_answering"}


def test_a_child_that_cannot_be_asked_for_is_not_loaded(hand: Hand, failures: list[Entry]) -> None:
    """A corpse is never loaded, and a load never hangs for want of an answer."""

    def broken(_: Child) -> bool:
        raise OSError(24, "Too many open files")

    call = hand.load("A")
    hand.let_through("kill", "download", "spawn")
    hand.effects.child_is_alive = broken  # type: ignore[method-assign, assignment]
    hand.let_through("probe", "kill")
    assert category_of(call) == "server_start_failed"
    assert hand.state is State.IDLE
    assert not hand.effects.os.alive
    assert logged(failures) == ["child.not_answering"]


def test_one_command_that_fails_costs_the_step_no_other(hand: Hand, failures: list[Entry]) -> None:
    """The machine has taken the step: who is owed an answer by it gets it."""

    def broken() -> None:
        raise OSError(9, "Bad file descriptor")

    call = hand.load("A")
    hand.effects.wait_for("kill").token.on_set(broken)
    newer = hand.load("B")
    assert category_of(call) == "superseded"
    assert newer.accepted.result() == 2
    assert logged(failures) == ["command.failed"]
    hand.effects.open()
    hand.turn()
    assert isinstance(answer_of(newer), Loaded)


@pytest.mark.parametrize("kind", ["kill", "download", "spawn", "probe"])
def test_an_effect_that_cannot_begin_has_failed(
    kind: str, hand: Hand, failures: list[Entry]
) -> None:
    """In every phase; and the next load succeeds."""

    def refuse(effect: object, _: object) -> None:
        if type(effect).__name__.lower() == kind:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    hand.effects.watch = refuse
    hand.effects.open(ALL_KINDS - {"kill"})
    call = hand.load("A")
    while hand.effects.parked:
        hand.let_through("kill")
    assert isinstance(answer_of(call), Problem)
    assert hand.state is State.IDLE
    assert logged(failures) == ["effect.failed"]
    hand.effects.watch = lambda _, __: None
    hand.effects.open()
    again = hand.load("A")
    assert isinstance(answer_of(again), Loaded)
    assert hand.effects.os.most_alive == 1


@pytest.fixture
def broken_log() -> Iterator[None]:
    """A host whose log raises: its standard output is a closed pipe."""
    before = structlog.get_config()

    def closed(*_: object) -> Any:
        raise BrokenPipeError(32, "Broken pipe")

    structlog.configure(processors=[closed], wrapper_class=structlog.BoundLogger)
    yield
    structlog.configure(**before)


def test_a_log_that_cannot_be_written_stops_nothing(
    broken_log: None, hand: Hand, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of the log stands between a step and its commands: it must not come between them."""
    hand.effects.open()
    call = hand.load("A")
    assert isinstance(answer_of(call), Loaded)
    nonsense: Any = object()
    hand.owner.pump(nonsense)
    assert isinstance(answer_of(hand.load("B")), Loaded)
    assert "BrokenPipeError" in capsys.readouterr().err


# --------------------------------------------------------------------------- facts out of nowhere


def test_a_fact_that_cannot_be_digested_changes_nothing(hand: Hand, failures: list[Entry]) -> None:
    hand.load("A")
    before = hand.owner.snapshot
    call = hand.owner.call()
    broken: Any = LoadRequested(call.ticket, None, 0.0)  # type: ignore[arg-type]
    hand.owner.ask(call, broken)
    hand.turn()
    assert category_of(call) == "internal"
    assert hand.owner.snapshot == before
    unknown: Any = type("Unknown", (), {"trigger": "dance"})()
    hand.owner.pump(unknown)
    assert hand.owner.snapshot == before
    assert logged(failures) == ["owner.failed", "owner.failed"]


def test_the_lock_is_given_back_when_the_step_fails(hand: Hand, failures: list[Entry]) -> None:
    """Otherwise the slot would be occupied by nobody until the process ends."""
    hand.load("A")
    hand.let_through("kill")
    nonsense: Any = Fetched(Generation(1), 0.0, None)  # type: ignore[arg-type]
    hand.owner._machine = None  # type: ignore[assignment]
    hand.owner.pump(nonsense)
    assert hand.effects.os.lock is None
    assert logged(failures) == ["owner.failed"]


def test_callers_that_leave_before_they_ask_are_forgotten(hand: Hand) -> None:
    call = hand.owner.call()
    call.settled.cancel()
    hand.turn()
    assert hand.state is State.IDLE
    request = target(LoadRequest(model_path="A"))
    hand.owner.ask(call, LoadRequested(call.ticket, request, hand.clock()))
    hand.turn()
    assert not hand.owner.snapshot.ctx.wanted
    hand.let_through("kill")
    assert hand.state is State.IDLE
    assert not hand.owner._calls


def test_a_load_nobody_waits_for_goes_on_where_the_policy_says_so() -> None:
    """Its outcome is kept, though nobody was told."""
    for is_ready in (True, False):
        hand = Hand(policy=Policy(abandoned_load="continue"))
        call = hand.load("A")
        call.settled.cancel()
        hand.turn()
        hand.let_through("kill", "download", "spawn")
        probe = hand.effects.wait_for("probe")
        probe.succeed() if is_ready else probe.fail()
        hand.turn()
        if not is_ready:
            assert Generation(1) not in outcomes(hand.owner), "its server is not dead yet"
            hand.let_through("kill")
        outcome = outcomes(hand.owner)[Generation(1)]
        if is_ready:
            assert isinstance(outcome, Loaded)
            assert hand.state is State.HEALTHY
        else:
            assert isinstance(outcome, Problem)
            assert outcome.category == "server_start_failed"
            assert outcome.story == hand.owner.snapshot.story


# --------------------------------------------------------------------------------------- its thread


def test_every_call_is_answered_by_whoever_is_there_at_the_end() -> None:
    """Asked before, during or after the end: `shutting_down`, and never silence."""
    owner = Owner(GatedEffects)
    owner.start("test")
    asked: list[Call] = []
    some, has_stopped = threading.Barrier(5), threading.Event()

    def ask() -> None:
        for number in range(200):
            call = owner.call()
            asked.append(call)
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
    answers = [call.settled.result(PATIENCE_S) for call in asked]
    refused = [answer for answer in answers if isinstance(answer, Problem)]
    assert {answer.category for answer in refused} == {"shutting_down"}
    assert 4 * 49 <= len(refused) < len(asked) == 800
    assert not owner._calls
    assert owner.events.is_closed


def test_facts_are_processed_by_one_thread_in_the_order_they_were_posted() -> None:
    """`post` may be called from anywhere; nothing else may step the machine."""
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
