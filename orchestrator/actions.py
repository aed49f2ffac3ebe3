"""Named actions of the table: each replaces the frozen context and appends commands. No I/O.

An action takes the step under way. Its order inside a row matters and is part of the row: first
what ends (supersede, cancel, fail), then what follows (`take_next`), then the new effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from orchestrator.context import Caller, Context, EffectInFlight, Job, Running, Waiter
from orchestrator.errors import Problem, Restored
from orchestrator.guards import EARLY_CANCEL_S, cancels, is_meant, is_named, restores_previous
from orchestrator.messages import (
    Accept,
    Answer,
    BecameReady,
    CancelAnswer,
    CancelRequested,
    Child,
    Command,
    Completion,
    Done,
    Download,
    Emptied,
    Exited,
    Fact,
    Fence,
    Fetched,
    Kill,
    LeaseGranted,
    LoadRequested,
    Post,
    Probe,
    Promoted,
    SetTimer,
    Settle,
    SetToken,
    Spawn,
    Spawned,
    TimerFired,
    Unloaded,
    UnloadRequested,
)
from orchestrator.recovery import Recovery, RestartPolicy, after_exit, after_failed_restart
from orchestrator.request import ReloadReason, Target, differences
from orchestrator.tokens import CancelReason, Generation, Ticket

MAX_REMEMBERED_IDS = 256
MAX_REMEMBERED_SOURCES = 256


@dataclass(slots=True)
class Step:
    """One fact being processed: the context so far and the commands so far."""

    ctx: Context
    fact: Fact
    commands: list[Command] = field(default_factory=list)

    def put(self, **changes: Any) -> None:
        self.ctx = self.ctx.having(**changes)

    def emit(self, *commands: Command) -> None:
        self.commands.extend(commands)

    def settle(self, callers: Iterable[Caller], answer: Answer) -> None:
        self.emit(*(Settle(caller.ticket, _told(caller, answer)) for caller in callers))

    @property
    def ticket(self) -> Ticket:
        return cast("LoadRequested", self.fact).ticket

    @property
    def problem(self) -> Problem:
        return cast("Problem", getattr(self.fact, "problem", None))


# ------------------------------------------------------------------------------ asking for a load


def refuse_shutting_down(s: Step) -> None:
    s.emit(Settle(s.ticket, Problem("shutting_down", "the orchestrator is shutting down")))


def refuse_cancelled(s: Step) -> None:
    problem = Problem("cancelled", "this load was cancelled before it arrived")
    s.emit(Settle(s.ticket, problem))


def refuse_superseded(s: Step) -> None:
    problem = Problem("superseded", "superseded by a load that was asked for later")
    s.emit(Settle(s.ticket, problem))


def refuse_cooling_down(s: Step) -> None:
    s.emit(Settle(s.ticket, _cooling_down(cast("Recovery", s.ctx.recovery), s.fact.at)))


def refuse_busy(s: Step) -> None:
    newest = s.ctx.wanted[-1]
    message = (
        f"load {newest.generation} of {newest.target.request.model_path} is in flight: "
        "wait for it, cancel it, or use on_busy supersede or queue"
    )
    problem = Problem("busy", message, field="on_busy", generation=newest.generation)
    s.emit(Settle(s.ticket, problem))


def enqueue(s: Step) -> None:
    """Accept the load: it gets its generation now and waits its turn."""
    fact = cast("LoadRequested", s.fact)
    generation = Generation(s.ctx.generation + 1)
    target = fact.target
    job = Job(generation, target, (_caller(fact, joined=False),), fact.at, fact.at)
    s.put(generation=generation, queue=(*s.ctx.queue, job))
    _note_load(s, fact)
    s.emit(Accept(fact.ticket, generation, joined=False))
    _set_deadline(s, job)


def join_newest(s: Step) -> None:
    _join(s, s.ctx.wanted[-1])


def join_loading(s: Step) -> None:
    _join(s, cast("Job", s.ctx.job))


def answer_already_loaded(s: Step) -> None:
    fact = cast("LoadRequested", s.fact)
    running = _kept_as(s, fact.target)
    _note_load(s, fact)
    s.emit(
        Accept(fact.ticket, running.generation, joined=False),
        Settle(fact.ticket, running.loaded(already=True)),
    )


def answer_next_already_loaded(s: Step) -> None:
    first, *rest = s.ctx.queue
    running = _kept_as(s, first.target)
    for caller in first.callers:
        s.settle((caller,), running.loaded(already=True, joined=caller.joined))
    s.put(queue=tuple(rest))
    _promote_next(s)


# ---------------------------------------------------------------------------------- ending loads


def supersede_queue(s: Step) -> None:
    """Older loads in the queue give way; one that was asked for later stays."""
    newer = tuple(job for job in s.ctx.queue if any(c.ticket > s.ticket for c in job.callers))
    for job in s.ctx.queue:
        if job not in newer:
            s.settle(job.callers, _superseded(s, job))
    s.put(queue=newer)


def supersede_all(s: Step) -> None:
    """Whatever is older gives way; its callers hear so at once."""
    supersede_queue(s)
    if s.ctx.job is not None and s.ctx.job.token is None:
        problem = _superseded(s, s.ctx.job)
        s.settle(s.ctx.job.callers, problem)
        s.put(last_error=problem)
        _interrupt(s, CancelReason.SUPERSEDED)


def cancel_all(s: Step) -> None:
    """A shutdown ends every load, an unload those it names; their callers hear so when the slot
    is empty.
    """
    ended = _named(s, s.ctx.wanted)
    if s.ctx.is_shutting_down:
        reason, category, by = CancelReason.SHUTDOWN, "shutting_down", "the shutdown"
    else:
        reason, category, by = CancelReason.USER, "cancelled", "an unload"
    for job in ended:
        problem = Problem(category, f"ended by {by}", generation=job.generation)
        _wait(s, job.callers, problem)
        if job is s.ctx.job:
            s.put(last_error=problem)
            _interrupt(s, reason)
    s.put(queue=tuple(job for job in s.ctx.queue if job not in ended))


def cancel_queued(s: Step) -> None:
    """Nothing of what waits runs yet: it ends at once."""
    for job in (ended := _named(s, s.ctx.queue)):
        problem = Problem("cancelled", "ended by an unload", generation=job.generation)
        s.settle(job.callers, problem)
    s.put(queue=tuple(job for job in s.ctx.queue if job not in ended))


def cancel_job(s: Step) -> None:
    job = cast("Job", s.ctx.job)
    problem = Problem("cancelled", "cancelled by the caller", generation=job.generation)
    _answer_at_the_end(s, job.callers, problem)
    s.put(last_error=problem, recovery=None)
    _interrupt(s, CancelReason.USER)


def time_out_job(s: Step) -> None:
    """A failure like any other, but for its effect, which still has to end."""
    job = cast("Job", s.ctx.job)
    _fail(s, job, _deadline(job), _answer_at_the_end)
    _interrupt(s, CancelReason.DEADLINE)


def time_out_queued(s: Step) -> None:
    late = cast("TimerFired", s.fact).generation
    job = next(job for job in s.ctx.queue if job.generation == late)
    s.put(queue=tuple(other for other in s.ctx.queue if other is not job))
    _fail(s, job, _deadline(job), Step.settle)


def cancel_callers(s: Step) -> None:
    """Everybody else the cancel means leaves; a queued load all of whose callers leave is dropped.

    One id may be that of several calls, and several calls may have joined one load.
    """
    fact = cast("CancelRequested", s.fact)
    for job in s.ctx.wanted:
        problem = Problem("cancelled", "cancelled by the caller", generation=job.generation)
        s.settle((caller for caller in job.callers if is_meant(job, caller, fact)), problem)
    s.put(queue=tuple(job for job in s.ctx.queue if not cancels(job, fact)))
    if fact.request_id is not None:
        _keep_callers(s, lambda caller: caller.request_id != fact.request_id)


def answer_cancelled(s: Step) -> None:
    s.emit(Settle(s.ticket, CancelAnswer(cancelled=True)))


def remember_cancel(s: Step) -> None:
    """Nothing to cancel. An id never seen may belong to a load still on its way."""
    fact = cast("CancelRequested", s.fact)
    if fact.request_id is not None and fact.request_id not in s.ctx.seen_ids:
        recent = tuple(
            known for known in s.ctx.cancelled_ids if fact.at - known[1] <= EARLY_CANCEL_S
        )
        s.put(cancelled_ids=(*recent, (fact.request_id, fact.at))[-MAX_REMEMBERED_IDS:])
    s.emit(Settle(fact.ticket, CancelAnswer(cancelled=False)))


def forget_ticket(s: Step) -> None:
    """The caller has gone: nothing is owed to it any more."""
    gone = s.ticket
    _keep_callers(s, lambda caller: caller.ticket != gone)
    s.put(
        waiters=tuple(w for w in s.ctx.waiters if w.ticket != gone),
        lease_waiters=tuple(t for t in s.ctx.lease_waiters if t != gone),
        leases=s.ctx.leases - {gone},
    )
    if s.ctx.policy.abandoned_load == "cancel":
        s.put(queue=tuple(job for job in s.ctx.queue if job.callers or job.after))


def fail_job(s: Step) -> None:
    """The load in flight has failed; its callers hear why when the slot is empty again, or when
    what ran before is back.
    """
    job = cast("Job", s.ctx.job)
    if job.token is None:
        _fail(s, job, s.problem)
    s.put(job=None)


def fail_job_exited(s: Step) -> None:
    job = cast("Job", s.ctx.job)
    if job.token is None:
        message = "the server ended in the moment it became ready; see its output"
        _fail(s, job, Problem("server_start_failed", message, reason="exited"))
    s.put(job=None)


def fail_job_slot_occupied(s: Step) -> None:
    job = cast("Job", s.ctx.job)
    if job.token is None:
        _fail(s, job, _occupied(cast("Fetched", s.fact).slot.reason))
    s.put(job=None)


def fail_all(s: Step) -> None:
    """The slot could not be emptied: no load can start beside what is still alive."""
    for job in s.ctx.wanted:
        _wait(s, job.callers, replace(s.problem, generation=job.generation))
    s.put(job=None, queue=(), running=None, effect=None, recovery=None, last_error=s.problem)


# ----------------------------------------------------------------------------- what comes after


def take_next(s: Step) -> None:
    """The oldest load in the queue becomes the one in flight, unless one is wanted already.

    What it inherits is decided now, after everything before it has been committed or has failed.
    """
    if s.ctx.job is not None and s.ctx.job.token is None:
        return
    first, *rest = s.ctx.queue or (None,)
    if first is not None:
        target = first.target.inheriting(dict(s.ctx.committed_args))
        first = replace(first, target=target, phase_at=s.fact.at)
        if first.after is None:
            first = replace(first, reload_reasons=_reasons(s, first))
            before = s.ctx.running.target if s.ctx.running else s.ctx.previous
            s.put(previous=before, recovery=None)
    s.put(job=first, queue=tuple(rest))


def wait_for_empty(s: Step) -> None:
    _note_unload(s)
    s.put(waiters=(*s.ctx.waiters, Waiter(s.ticket, Unloaded())))


def wait_for_end(s: Step) -> None:
    _answer_at_the_end(s, (Caller(s.ticket, None, joined=False),), CancelAnswer(cancelled=True))


def wait_for_shutdown(s: Step) -> None:
    s.put(waiters=(*s.ctx.waiters, Waiter(s.ticket, Done())))


def answer_waiters(s: Step) -> None:
    """The slot is verified empty: everybody who waited for that may know."""
    s.emit(*(Settle(waiter.ticket, waiter.answer) for waiter in s.ctx.waiters))
    s.put(waiters=())


def answer_waiters_occupied(s: Step) -> None:
    """The slot is not empty: who asked for that gets the reason instead."""
    for waiter in s.ctx.waiters:
        wanted_empty = isinstance(waiter.answer, Unloaded | Done)
        s.emit(Settle(waiter.ticket, s.problem if wanted_empty else waiter.answer))
    s.put(waiters=())


def answer_unchanged(s: Step) -> None:
    """Not that model. A load of it may still be on its way: it was asked for first, and ends."""
    _note_unload(s)
    s.emit(Settle(s.ticket, Unloaded(changed=False)))


def answer_unloaded(s: Step) -> None:
    _note_unload(s)
    s.emit(Settle(s.ticket, Unloaded()))


def latch_shutdown(s: Step) -> None:
    s.put(is_shutting_down=True, previous=None, recovery=None)


# --------------------------------------------------------------------------------------- effects


def begin_kill(s: Step) -> None:
    """Empty the slot: at once, or when the leases are given back or their time is over."""
    if s.ctx.leases and s.ctx.child is not None:
        s.emit(SetTimer(s.ctx.child.generation, "drain", s.ctx.policy.drain_timeout_s))
    else:
        kill_when_drained(s)


def kill_when_drained(s: Step) -> None:
    if s.ctx.effect is None and not s.ctx.leases:
        generation = s.ctx.job.generation if s.ctx.job else s.ctx.generation
        s.put(effect=EffectInFlight("kill", generation))
        s.emit(Kill(generation, s.ctx.child))


def begin_download(s: Step) -> None:
    job = _next_phase(s, "kill")
    s.put(effect=EffectInFlight("download", job.generation))
    s.emit(Download(job.generation, job.target))


def begin_spawn(s: Step) -> None:
    fact = cast("Fetched", s.fact)
    job = _next_phase(s, "download")
    target = replace(job.target, model=fact.model).inheriting(dict(s.ctx.committed_args))
    job = replace(job, target=target)
    s.put(job=job, effect=EffectInFlight("spawn", job.generation))
    s.emit(Spawn(job.generation, job.target))


def begin_probe(s: Step) -> None:
    job = _next_phase(s, "spawn")
    s.put(effect=EffectInFlight("probe", job.generation))
    s.emit(
        Probe(
            job.generation,
            cast("Child", s.ctx.child),
            job.target.request.stall_timeout_s,
            job.target.model.size_bytes,
            job.target.extra_args,
        )
    )


def record_child(s: Step) -> None:
    """From here on the slot holds this process until its exit is confirmed."""
    s.put(child=cast("Spawned", s.fact).child, effect=None)


def end_effect(s: Step) -> None:
    s.put(effect=None)


def count_attempt(s: Step) -> None:
    job = cast("Job", s.ctx.job)
    s.put(job=replace(job, attempts=job.attempts + 1, phase_at=s.fact.at))


def forget_child(s: Step) -> None:
    """The exit of everything in the slot is confirmed: the only place where a pid is dropped."""
    exit_ = cast("Emptied", s.fact).exit
    s.put(child=None, running=None, effect=None, last_exit=exit_ or s.ctx.last_exit)


def commit(s: Step) -> None:
    """The linearization point of a load: it holds, and its settings are kept for later ones."""
    fact = cast("BecameReady", s.fact)
    job = _next_phase(s, "health")
    timings = replace(job.timings, total=fact.at - job.accepted_at)
    child = cast("Child", s.ctx.child)
    running = Running(
        job.generation, job.target, child, fact.server, timings, job.reload_reasons, fact.at
    )
    others = tuple(kept for kept in s.ctx.committed_args if kept[0] != job.target.source)
    committed = (*others, (job.target.source, job.target.extra_args))[-MAX_REMEMBERED_SOURCES:]
    s.put(job=None, running=running, effect=None, committed_args=committed)
    s.put(previous=None, last_error=job.after)  # what a load made good is still worth knowing
    for caller in job.callers:
        s.settle((caller,), running.loaded(joined=caller.joined))
    _promote_next(s)


def record_exit(s: Step) -> None:
    s.put(last_exit=cast("Exited", s.fact).exit)


def lose_server(s: Step) -> None:
    """The healthy server has ended by itself: it is not loaded any more, and it says why.

    If the policy says so, and nothing else is wanted, it is to be started again.
    """
    exit_, running = cast("Exited", s.fact).exit, cast("Running", s.ctx.running)
    how = "with an unknown status" if exit_.returncode is None else _how_it_ended(exit_.returncode)
    problem = Problem(
        "server_exited",
        f"the server ended by itself {how}",
        generation=running.generation,
        log_tail=exit_.log_tail,
    )
    policy, at = s.ctx.policy.restart, s.fact.at
    if policy is None or s.ctx.queue:
        what = "something else is loaded" if s.ctx.queue else "load the model again"
        s.put(recovery=None, last_error=replace(problem, message=f"{problem.message}: {what}"))
        return
    recovery = after_exit(
        policy,
        s.ctx.recovery,
        target=running.target,
        generation=running.generation,
        ran_s=at - running.at,
        at=at,
        problem=problem,
    )
    _plan_restart(s, recovery)


def enqueue_restart(s: Step) -> None:
    """Nobody asked for this load; it has a generation like any other."""
    recovery = cast("Recovery", s.ctx.recovery).trying()
    _enqueue_own(s, recovery.target, (), recovery.problem)
    s.put(recovery=recovery)


def fence(s: Step) -> None:
    s.emit(Fence(cast("Completion", s.fact).generation, s.fact.trigger))


# ---------------------------------------------------------------------------------------- leases


def grant_lease(s: Step) -> None:
    _grant(s, s.ticket)


def grant_waiting_leases(s: Step) -> None:
    for ticket in s.ctx.lease_waiters:
        _grant(s, ticket)
    s.put(lease_waiters=())


def wait_for_lease(s: Step) -> None:
    s.put(lease_waiters=(*s.ctx.lease_waiters, s.ticket))


def refuse_lease(s: Step) -> None:
    s.emit(Settle(s.ticket, _NOT_LOADED))


def rest(s: Step) -> None:
    """Nothing is under way any more: there is nothing to go back to, and no lease to wait for
    unless a restart is planned.
    """
    recovery = s.ctx.recovery
    if recovery is not None and recovery.phase == "trying":
        recovery = None
    s.put(previous=None, recovery=recovery)
    if recovery is None or recovery.phase != "waiting":
        why = _NOT_LOADED if recovery is None else _cooling_down(recovery, s.fact.at)
        s.emit(*(Settle(ticket, why) for ticket in s.ctx.lease_waiters))
        s.put(lease_waiters=())


def drop_lease(s: Step) -> None:
    s.put(leases=s.ctx.leases - {s.ticket})


def revoke_leases(s: Step) -> None:
    s.put(leases=frozenset())


def await_idle(s: Step) -> None:
    """From now on nobody uses the server: it has its whole time before it is stopped for that."""
    running = cast("Running", s.ctx.running)
    request = running.target.request
    ttl_s = s.ctx.policy.idle_ttl_s if request.idle_ttl_s is None else request.idle_ttl_s
    if ttl_s is None or request.pinned or s.ctx.leases:
        _stop_at(s, None)
    else:
        _stop_at(s, s.fact.at + ttl_s)
        s.emit(SetTimer(running.generation, "idle", ttl_s))


# ---------------------------------------------------------------------- shared, not named in rows

_NOT_LOADED = Problem("not_loaded", "no model is loaded: load one first")


def _caller(fact: LoadRequested, *, joined: bool) -> Caller:
    return Caller(fact.ticket, fact.target.request.load_request_id, joined)


def _set_deadline(s: Step, job: Job) -> None:
    if (deadline_s := job.target.request.deadline_s) is not None:
        s.emit(SetTimer(job.generation, "deadline", deadline_s))


def _note_load(s: Step, fact: LoadRequested) -> None:
    """Every accepted load counts, also one that joins or finds its model loaded."""
    s.put(newest_load=max(s.ctx.newest_load, fact.ticket))
    name = fact.target.request.load_request_id
    if name is not None:
        others = tuple(known for known in s.ctx.seen_ids if known != name)
        s.put(seen_ids=(*others, name)[-MAX_REMEMBERED_IDS:])


def _named(s: Step, jobs: Iterable[Job]) -> list[Job]:
    model = getattr(s.fact, "model", None)  # a shutdown means any
    return [job for job in jobs if is_named(job.target, model)]


def _note_unload(s: Step) -> None:
    fact = cast("UnloadRequested", s.fact)
    others = tuple(known for known in s.ctx.unloads if known[0] != fact.model)
    s.put(unloads=(*others, (fact.model, fact.ticket))[-MAX_REMEMBERED_IDS:])
    if s.ctx.previous is not None and is_named(s.ctx.previous, fact.model):
        s.put(previous=None)
    if s.ctx.recovery is not None and is_named(s.ctx.recovery.target, fact.model):
        s.put(recovery=None)


def _join(s: Step, job: Job) -> None:
    fact = cast("LoadRequested", s.fact)
    target = job.target.kept_as(fact.target.request)
    if fact.target.request.force_reload and job is not s.ctx.job:
        request = replace(target.request, force_reload=True)  # what runs then will not do
        target = replace(target, request=request)
    joined = replace(job, target=target, callers=(*job.callers, _caller(fact, joined=True)))
    _note_load(s, fact)
    s.put(
        job=joined if s.ctx.job is job else s.ctx.job,
        queue=tuple(joined if other is job else other for other in s.ctx.queue),
    )
    s.emit(Accept(fact.ticket, job.generation, joined=True))


def _keep_callers(s: Step, keep: Any) -> None:
    def kept(job: Job) -> Job:
        return replace(job, callers=tuple(caller for caller in job.callers if keep(caller)))

    s.put(job=kept(s.ctx.job) if s.ctx.job else None, queue=tuple(map(kept, s.ctx.queue)))


def _interrupt(s: Step, reason: CancelReason) -> None:
    """Set the token of the load in flight; its effect still has to end by itself."""
    job = cast("Job", s.ctx.job)
    s.put(job=replace(job, token=reason, callers=()))
    s.emit(SetToken(job.generation, reason))


def _wait(s: Step, callers: tuple[Caller, ...], answer: Answer) -> None:
    waiters = (Waiter(caller.ticket, _told(caller, answer)) for caller in callers)
    s.put(waiters=(*s.ctx.waiters, *waiters))


def _told(caller: Caller, answer: Answer) -> Answer:
    """Return what a caller hears: of its own failure too, if this load was to make that good."""
    if caller.failure is None:
        return answer
    return _restored(caller.failure, answer if isinstance(answer, Problem) else None)


def _restored(failure: Problem, problem: Problem | None) -> Problem:
    restored = cast("Restored", failure.restored)
    return replace(failure, restored=replace(restored, problem=problem))


def _answer_at_the_end(s: Step, callers: tuple[Caller, ...], answer: Answer) -> None:
    """Answer when the effect in flight has ended; now, if the old server is only drained: a load
    that waits for leases has nothing under way that its end would have to wait for.
    """
    if s.ctx.effect is None:
        s.settle(callers, answer)
    else:
        _wait(s, callers, answer)


def _fail(
    s: Step,
    job: Job,
    problem: Problem,
    tell: Callable[[Step, tuple[Caller, ...], Answer], None] = _wait,
) -> None:
    """A load has failed: what follows, and when its callers hear of it. Only the one in flight may
    have replaced anything.
    """
    problem = replace(problem, generation=job.generation)
    if job is s.ctx.job and restores_previous(s.ctx, cast("Completion | TimerFired", s.fact)):
        _enqueue_previous(s, job, problem)
        return
    tell(s, job.callers, problem)
    recovery = s.ctx.recovery
    if job.after is not None and recovery is None:
        s.put(last_error=_restored(job.after, problem))
    elif job.after is None or recovery is None or s.ctx.queue:
        s.put(last_error=problem)
    else:
        policy, at = cast("RestartPolicy", s.ctx.policy.restart), s.fact.at
        again = after_failed_restart(
            policy, recovery, at=at, generation=job.generation, problem=problem
        )
        _plan_restart(s, again)


def _enqueue_previous(s: Step, failed: Job, problem: Problem) -> None:
    """What ran before comes back; who asked for what failed hears of both when that is settled."""
    _enqueue_own(s, cast("Target", s.ctx.previous), failed.callers, problem)
    s.put(previous=None)


def _enqueue_own(s: Step, target: Target, callers: tuple[Caller, ...], failure: Problem) -> None:
    generation = Generation(s.ctx.generation + 1)
    restored = Restored(generation, target.request.model_path, target.model.variant)
    failure = replace(failure, restored=restored)
    callers = tuple(replace(c, failure=c.failure or failure) for c in callers)
    job = Job(generation, target, callers, s.fact.at, s.fact.at, after=failure)
    s.put(generation=generation, queue=(*s.ctx.queue, job), last_error=failure)
    _set_deadline(s, job)


def _plan_restart(s: Step, recovery: Recovery) -> None:
    """Wait for the restart, or cool down; the last error says which."""
    limit = cast("RestartPolicy", s.ctx.policy.restart).limit
    wait_s = recovery.until - s.fact.at
    if recovery.phase == "waiting":
        s.emit(SetTimer(recovery.generation, "restart", wait_s))
        what = f"restart {recovery.failures} of {limit} follows within {wait_s:.3g} s"
    else:
        what = f"that was restart {limit} of {limit}: nothing is started for {wait_s:.3g} s"
    message = f"{recovery.problem.message}; {what}"
    s.put(recovery=recovery, last_error=replace(recovery.problem, message=message))


def _next_phase(s: Step, ended: str) -> Job:
    """Book the phase that has just ended and return the load in flight."""
    job = cast("Job", s.ctx.job)
    job = replace(job, phase_at=s.fact.at, timings=job.spent(ended, s.fact.at))
    s.put(job=job)
    return job


def _promote_next(s: Step) -> None:
    if s.ctx.queue:
        s.emit(Post(Promoted(s.ctx.queue[0].generation, s.fact.at)))


def _grant(s: Step, ticket: Ticket) -> None:
    _stop_at(s, None)
    running = cast("Running", s.ctx.running)
    s.put(leases=s.ctx.leases | {ticket})
    s.emit(Settle(ticket, LeaseGranted(ticket, running.child, running.server)))


def _kept_as(s: Step, wanted: Target) -> Running:
    """What runs stays for as long as the newest load that finds it running says."""
    running = cast("Running", s.ctx.running)
    running = replace(running, target=running.target.kept_as(wanted.request))
    s.put(running=running)
    return running


def _stop_at(s: Step, at: float | None) -> None:
    running = cast("Running", s.ctx.running)
    if running.idle_at != at:
        s.put(running=replace(running, idle_at=at))


def _reasons(s: Step, job: Job) -> tuple[ReloadReason, ...]:
    if s.ctx.running is None:
        return ()
    reasons = differences(s.ctx.running.target, job.target)
    if job.target.request.force_reload:
        reasons = (*reasons, ReloadReason("force_reload", running=False, requested=True))
    return reasons or (ReloadReason("server", running="exited", requested="alive"),)


def _cooling_down(recovery: Recovery, now: float) -> Problem:
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


def _superseded(s: Step, job: Job) -> Problem:
    newer = cast("LoadRequested", s.fact).target.request.model_path
    message = f"superseded by a newer load of {newer}"
    return Problem("superseded", message, generation=job.generation)


def _deadline(job: Job) -> Problem:
    message = f"not healthy within deadline_s = {job.target.request.deadline_s}"
    return Problem("deadline", message, field="deadline_s", generation=job.generation)


def _occupied(reason: str) -> Problem:
    return Problem("slot_occupied", f"the slot is not empty: {reason}; unload to try again")


def _how_it_ended(returncode: int) -> str:
    return f"by signal {-returncode}" if returncode < 0 else f"with exit status {returncode}"
