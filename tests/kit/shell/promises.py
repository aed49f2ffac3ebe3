"""The promises of the owner: invariants that hold after every fact, and at rest.

The owner must carry out what the machine decides, once and in order, and publish it. A `promise_*`
function checks a stage after a fact has been processed, and returns None or one sentence that says
what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import Accept, SetTimer, Settle
from orchestrator.machine.facts import Fact
from orchestrator.machine.step import Stepped
from orchestrator.runtime.answers import LoadOutcome
from tests.kit.machine.invariants import Violation
from tests.kit.machine.world import Status
from tests.kit.shell.records import logged, outcomes

if TYPE_CHECKING:
    from tests.kit.shell.stage import Stage


@dataclass(frozen=True, slots=True)
class Done:
    """One fact that the owner has processed, and the step of the machine."""

    stage: Stage
    fact: Fact
    stepped: Stepped


def promise_every_fact_is_processed(done: Done) -> str | None:
    """The owner can process what the table can step."""
    for entry in logged():
        if entry["event"] != "effect.failed":  # that one is planned
            what = str(entry.get("exception", "")).strip().splitlines()[-1:]
            return f"{entry['event']} {' '.join(what)}"
    return None


def promise_the_snapshot_is_the_machine(done: Done) -> str | None:
    """The snapshot is the state of the machine."""
    shown, real = done.stage.owner.snapshot, done.stepped
    if shown.state is not real.state or shown.ctx is not real.ctx:
        return f"the snapshot shows {shown.state}, the machine is in {real.state}"
    if shown.story and not shown.story[-1].split(" on ")[0].endswith(f"-> {shown.state}"):
        return f"the story ends with {shown.story[-1]!r} in {shown.state}"
    return None


def promise_the_snapshot_comes_first(done: Done) -> str | None:
    """The snapshot is published before calls are answered and effects are started."""
    for seen in done.stage.published:
        if seen.ctx is not done.stepped.ctx or seen.state is not done.stepped.state:
            return f"a call or an effect still found the snapshot of {seen.state}"
    return None


def promise_the_lock_is_not_kept(done: Done) -> str | None:
    """The slot's lock is handed to a server or released in the step that took it."""
    if done.stage.effects.os.lock is not None:
        return "the slot's lock is still held after the step"
    return None


def promise_a_token_belongs_to_one_load(done: Done) -> str | None:
    """A load has one token, given to its effects only, and set when the load is cancelled."""
    stage = done.stage
    first: dict[int, object] = {}
    for generation, token in stage.tokens:
        if token.generation != generation:
            return f"an effect of load {generation} was given the token of {token.generation}"
        if first.setdefault(generation, token) is not token:
            return f"load {generation} has two tokens"
    job = stage.owner.snapshot.ctx.job
    for generation, token in stage.tokens:
        wanted = job is not None and job.generation == generation and job.token is None
        if wanted and token.is_set():
            return f"load {generation} is wanted, and its token is set"
        if job is not None and job.generation == generation and job.token and not token.is_set():
            return f"load {generation} was cancelled, and its token is not set"
    return None


def promise_answers_arrive(done: Done) -> str | None:
    """Every answer of the machine reaches its caller unchanged in the same step."""
    for command in done.stepped.commands:
        caller = done.stage.ledger.caller(getattr(command, "ticket", None))
        if caller is None or caller.call is None:
            continue
        if isinstance(command, Settle) and caller.answer != "gone":
            if _plain(caller.answer) != _plain(command.answer):
                return f"call {command.ticket} got {caller.answer} instead of {command.answer}"
            if isinstance(caller.answer, Problem) and (
                caller.answer.story != done.stage.owner.snapshot.story
            ):
                return f"call {command.ticket} got an error without its story"
        if isinstance(command, Accept) and caller.answer != "gone":
            accepted = caller.call.accepted
            if not accepted.done() or accepted.result() != command.generation:
                return f"call {command.ticket} did not get its generation {command.generation}"
    return None


def promise_no_answer_is_invented(done: Done) -> str | None:
    """A call that the machine has not answered has no answer."""
    for caller in done.stage.ledger.callers:
        if caller.status in (Status.WAITING, Status.ENDED) and caller.answer not in (None, "gone"):
            return f"call {caller.ticket} got {caller.answer}, which the machine never said"
    return None


def promise_a_lease_is_counted(done: Done) -> str | None:
    """Whoever holds a lease of this server is inside its gate."""
    stage, gate = done.stage, done.stage.owner.gate
    for caller in stage.ledger.open_calls:
        is_holding = caller.status is Status.HELD and caller.answer != "gone"
        is_inside = caller.ticket in stage.counted or stage.has_left(caller)
        is_of_this = caller.call is not None and caller.call.gate in (None, gate)
        if is_holding and is_of_this and not is_inside:
            return f"call {caller.ticket} holds a lease, and the gate does not count it"
    return None


def promise_timers_are_kept(done: Done) -> str | None:
    """Every timer of the machine is set and is due at its time."""
    for command in done.stepped.commands:
        if isinstance(command, SetTimer):
            due = done.stage.clock() + command.after_s
            if done.stage.owner._timers.get((command.kind, command.generation)) != due:
                return f"the {command.kind} timer of load {command.generation} is not set"
    return None


def promise_the_outcome_is_the_loads(done: Done) -> str | None:
    """A load is in flight or has an outcome, never both; it is that of the load, not of a call."""
    owner, ctx = done.stage.owner, done.stage.owner.snapshot.ctx
    waiting = (
        c for c in done.stage.ledger.open_calls if c.status in (Status.WAITING, Status.ENDED)
    )
    unsettled = {job.generation for job in ctx.wanted} | {c.generation for c in ctx.ending}
    unsettled |= {job.failed.generation for job in ctx.wanted if job.failed is not None}
    unsettled |= {c.generation for c in waiting}
    for number in map(Generation, range(done.stage.first_generation, ctx.generation + 1)):
        outcome = outcomes(owner).get(number)
        if number in unsettled and outcome is not None:
            return f"load {number} is in flight, and its outcome is {outcome}"
        if number not in unsettled and outcome is None:
            return f"load {number} has ended without an outcome"
        ran = outcome.generation if isinstance(outcome, LoadOutcome) else None
        if ran is not None and ran not in done.stage.healthy:  # its own, or one it found running
            return f"load {ran} did not become Healthy, and the outcome of {number} says so"
        if number in done.stage.healthy and ran != number:
            return f"load {number} became Healthy, and its outcome is {outcome}"
    return None


def promise_every_transition_is_an_event(done: Done) -> str | None:
    """One event for each change of state, no more and no less."""
    if done.stage.owner.events.last_id != done.stage.transitions:
        return f"{done.stage.transitions} transitions, {done.stage.owner.events.last_id} events"
    return None


STEP_PROMISES: tuple[Callable[[Done], str | None], ...] = (
    promise_every_fact_is_processed,
    promise_the_snapshot_is_the_machine,
    promise_the_snapshot_comes_first,
    promise_the_lock_is_not_kept,
    promise_a_token_belongs_to_one_load,
    promise_answers_arrive,
    promise_no_answer_is_invented,
    promise_a_lease_is_counted,
    promise_timers_are_kept,
    promise_the_outcome_is_the_loads,
    promise_every_transition_is_an_event,
)


def promise_every_call_is_answered(stage: Stage) -> str | None:
    """At rest every call has its answer or was withdrawn."""
    for caller in stage.ledger.callers:
        if caller.call is not None and not caller.call.settled.done():
            return f"at rest, call {caller.ticket} has no answer"
    return None


def promise_no_call_is_retained(stage: Stage) -> str | None:
    """At rest the owner has no call: it would retain it for ever."""
    if stage.owner._calls:
        return f"at rest, the owner still has the calls {sorted(stage.owner._calls)}"
    return None


REST_PROMISES: tuple[Callable[[Stage], str | None], ...] = (
    promise_every_call_is_answered,
    promise_no_call_is_retained,
)
PROMISES = frozenset(promise.__name__ for promise in (*STEP_PROMISES, *REST_PROMISES))


def check_step(stage: Stage, fact: Fact, stepped: Stepped | None) -> Violation | None:
    """Return the first promise that the last fact has broken."""
    if stepped is None:
        return Violation(STEP_PROMISES[0].__name__, f"{fact.trigger} was not stepped")
    done = Done(stage, fact, stepped)
    for promise in STEP_PROMISES:
        if (message := promise(done)) is not None:
            return Violation(promise.__name__, message)
    return None


def check_rest(stage: Stage) -> Violation | None:
    """Return the first promise that is broken at rest."""
    for promise in REST_PROMISES:
        if (message := promise(stage)) is not None:
            return Violation(promise.__name__, message)
    return None


def _plain(answer: object) -> object:
    return replace(answer, story=()) if isinstance(answer, Problem) else answer
