"""The step under way, and what several actions do with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    Accept,
    Answer,
    Command,
    Download,
    LeaseGranted,
    Post,
    Resolve,
    SetTimer,
    Settle,
    SetToken,
)
from orchestrator.machine.context import Caller, Context, Job, Running
from orchestrator.machine.facts import (
    Fact,
    LoadRequested,
    PrefetchRequested,
    Promoted,
    ShutdownRequested,
    UnloadRequested,
)
from orchestrator.machine.guards import awaited_by, is_named
from orchestrator.machine.recovery import Recovery
from orchestrator.settings.target import ReloadReason, Target, differences

MAX_REMEMBERED_IDS = 256
MAX_REMEMBERED_SOURCES = 256


_T = TypeVar("_T")
F_co = TypeVar("F_co", bound=Fact, covariant=True)


@dataclass(slots=True)
class Step(Generic[F_co]):
    """One fact being processed: the context so far and the commands so far.

    An action says by the type of its step which facts it is for; a test holds the table to that.
    """

    ctx: Context
    fact: F_co
    commands: list[Command] = field(default_factory=list)
    was_due: bool = field(init=False)

    def __post_init__(self) -> None:
        self.was_due = self.ctx.is_due

    def put(self, **changes: Any) -> None:
        self.ctx = self.ctx.having(**changes)

    def emit(self, *commands: Command) -> None:
        self.commands.extend(commands)

    def settle(self, callers: Iterable[Caller], answer: Answer) -> None:
        self.emit(*(Settle(caller.ticket, told_to(caller, answer)) for caller in callers))


def known(value: _T | None) -> _T:
    """Return what the guards of the row have found to be there.

    Raises:
        LookupError: they have not (a broken table).
    """
    if value is None:
        raise LookupError("nothing of the kind is there, and no guard has looked")
    return value


def refuse_waiting_leases(s: Step[Fact]) -> None:
    """Nothing is on its way, but perhaps a restart."""
    recovery = s.ctx.recovery
    if recovery is None or recovery.phase == "cooling_down":
        why = NOT_LOADED if recovery is None else cooling_down(recovery, s.fact.at)
        s.emit(*(Settle(ticket, why) for ticket in s.ctx.lease_waiters))
        s.put(lease_waiters=())


NOT_LOADED = Problem("not_loaded", "no model is loaded: load one first")


def accepted(s: Step[Fact], fact: LoadRequested | PrefetchRequested) -> Job:
    """Give a call its generation; prefetches are counted downwards, so that loads are from 1."""
    callers = (caller_of(fact, joined=False),)
    if isinstance(fact, PrefetchRequested):
        generation = Generation(s.ctx.last_prefetch - 1)
        s.put(last_prefetch=generation)
        return Job(generation, fact.target, callers, fact.at, fact.at, awaits="files")
    generation = Generation(s.ctx.generation + 1)
    s.put(generation=generation)
    return Job(
        generation,
        fact.target,
        callers,
        fact.at,
        fact.at,
        newest_before=s.ctx.newest_load,
        awaits=awaited_by(fact.target),
    )


def begin_waiting(s: Step[Fact], job: Job) -> None:
    """Begin what a load in the queue awaits; the state stays, and so does what runs."""
    if job.awaits is not None:
        kind = Resolve if job.awaits == "answer" else Download
        s.emit(kind(job.generation, job.target))


def drop(s: Step[Fact], jobs: Iterable[Job], reason: CancelReason = CancelReason.USER) -> None:
    """Take loads out of the queue, and prefetches; what was begun for them ends by itself."""
    gone = {job.generation for job in jobs}
    for job in (*s.ctx.queue, *s.ctx.prefetches):
        if job.generation in gone and job.awaits is not None:
            s.emit(SetToken(job.generation, reason))
    s.put(
        queue=tuple(job for job in s.ctx.queue if job.generation not in gone),
        prefetches=tuple(job for job in s.ctx.prefetches if job.generation not in gone),
    )


def caller_of(fact: LoadRequested | PrefetchRequested, *, joined: bool) -> Caller:
    return Caller(fact.ticket, fact.target.request.load_request_id, joined)


def set_deadline(s: Step[Fact], job: Job) -> None:
    if (deadline_s := job.target.request.deadline_s) is not None:
        s.emit(SetTimer(job.generation, "deadline", deadline_s))


def note_load(s: Step[LoadRequested]) -> None:
    """Every accepted load counts, also one that joins or finds its model loaded."""
    s.put(newest_load=max(s.ctx.newest_load, s.fact.ticket))
    note_id(s, s.fact)


def note_id(s: Step[Fact], fact: LoadRequested | PrefetchRequested) -> None:
    name = fact.target.request.load_request_id
    if name is not None:
        others = tuple(known for known in s.ctx.seen_ids if known != name)
        s.put(seen_ids=(*others, name)[-MAX_REMEMBERED_IDS:])


def named_by(s: Step[UnloadRequested | ShutdownRequested], jobs: Iterable[Job]) -> list[Job]:
    model = s.fact.model if isinstance(s.fact, UnloadRequested) else None  # a shutdown means any
    return [job for job in jobs if is_named(job.target, model)]


def note_unload(s: Step[UnloadRequested]) -> None:
    fact = s.fact
    others = tuple(known for known in s.ctx.unloads if known[0] != fact.model)
    s.put(unloads=(*others, (fact.model, fact.ticket))[-MAX_REMEMBERED_IDS:])
    if s.ctx.previous is not None and is_named(s.ctx.previous, fact.model):
        s.put(previous=None)
    if s.ctx.recovery is not None and is_named(s.ctx.recovery.target, fact.model):
        s.put(recovery=None)


def join(s: Step[LoadRequested], job: Job) -> None:
    fact = s.fact
    target = job.target.kept_as(fact.target.request)
    if fact.target.request.force_reload and job is not s.ctx.job:
        request = replace(target.request, force_reload=True)  # what runs then will not do
        target = replace(target, request=request)
    joined = replace(job, target=target, callers=(*job.callers, caller_of(fact, joined=True)))
    note_load(s)
    s.put(
        job=joined if s.ctx.job is job else s.ctx.job,
        queue=tuple(joined if other is job else other for other in s.ctx.queue),
    )
    s.emit(Accept(fact.ticket, job.generation, joined=True))


def keep_callers(s: Step[Fact], keep: Any) -> None:
    def kept(job: Job) -> Job:
        return replace(job, callers=tuple(caller for caller in job.callers if keep(caller)))

    s.put(
        job=kept(s.ctx.job) if s.ctx.job else None,
        queue=tuple(map(kept, s.ctx.queue)),
        prefetches=tuple(map(kept, s.ctx.prefetches)),
    )


def next_phase(s: Step[Fact], ended: str) -> Job:
    """Book the phase that has just ended and return the load in flight."""
    job = known(s.ctx.job)
    job = replace(job, phase_at=s.fact.at, timings=job.spent(ended, s.fact.at))
    s.put(job=job)
    return job


def promote_next(s: Step[Fact]) -> None:
    if s.ctx.is_due:
        s.emit(Post(Promoted(s.ctx.queue[0].generation, s.fact.at)))


def grant(s: Step[Fact], ticket: Ticket) -> None:
    stop_at(s, None)
    running = known(s.ctx.running)
    s.put(leases=s.ctx.leases | {ticket})
    s.emit(Settle(ticket, LeaseGranted(ticket, running.target, running.child, running.server)))


def kept_as(s: Step[Fact], wanted: Target) -> Running:
    """What runs stays for as long as the newest load that finds it running says."""
    running = known(s.ctx.running)
    running = replace(running, target=running.target.kept_as(wanted.request))
    s.put(running=running)
    return running


def stop_at(s: Step[Fact], at: float | None) -> None:
    running = known(s.ctx.running)
    if running.idle_at != at:
        s.put(running=replace(running, idle_at=at))


def reasons(s: Step[Fact], job: Job) -> tuple[ReloadReason, ...]:
    if s.ctx.running is None:
        return ()
    reasons = differences(s.ctx.running.target, job.target)
    if job.target.request.force_reload:
        reasons = (*reasons, ReloadReason("force_reload", running=False, requested=True))
    return reasons or (ReloadReason("server", running="exited", requested="alive"),)


def cooling_down(recovery: Recovery, now: float) -> Problem:
    left_s = max(0.0, recovery.until - now)
    message = (
        f"{recovery.target.request.model_path} failed {recovery.failures} times in a row and is "
        f"not started for another {left_s:.0f} s: change what fails, or set force_reload"
    )
    return Problem(
        "server_start_failed",
        message,
        generation=recovery.generation,
        log_tail=recovery.problem.log_tail,
        reason="cooling_down",
        retry_after_s=left_s,
    )


def told_to(caller: Caller, answer: Answer) -> Answer:
    """Return what a caller hears: of its own failure too, if this load was to make that good."""
    if caller.failure is None:
        return answer
    return restored_with(caller.failure, answer if isinstance(answer, Problem) else None)


def restored_with(failure: Problem, problem: Problem | None) -> Problem:
    restored = known(failure.restored)
    return replace(failure, restored=replace(restored, problem=problem))
