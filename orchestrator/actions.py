"""Named actions of the table: each replaces the frozen context and appends commands. No I/O.

An action takes the step under way. Its order inside a row matters and is part of the row: first
what ends (supersede, cancel, fail), then what follows (`take_next`), then the new effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from orchestrator.context import Caller, Context, EffectInFlight, Job, Running, Waiter
from orchestrator.errors import Problem, Restored
from orchestrator.guards import (
    EARLY_CANCEL_S,
    awaited_by,
    cancels,
    fetches_the_same,
    find,
    is_meant,
    is_named,
    restores_previous,
)
from orchestrator.messages import (
    Accept,
    Answer,
    BecameReady,
    CancelAnswer,
    CancelRequested,
    Child,
    Command,
    Completion,
    Concluded,
    Done,
    Download,
    Emptied,
    Exited,
    Fact,
    Fence,
    Fetched,
    Kill,
    LeaseGranted,
    Loaded,
    LoadRequested,
    NotReady,
    Post,
    Prefetched,
    PrefetchRequested,
    Probe,
    Promoted,
    Resolve,
    Resolved,
    ServerEnded,
    SetTimer,
    Settle,
    SetToken,
    Spawn,
    Spawned,
    TimerFired,
    Timings,
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
    was_due: bool = field(init=False)

    def __post_init__(self) -> None:
        self.was_due = self.ctx.is_due

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


def refuse_full(s: Step) -> None:
    """The queue or the prefetches have their bound, for every caller together."""
    fact = cast("LoadRequested | PrefetchRequested", s.fact)
    if isinstance(fact, LoadRequested) and not fact.target.request.prefetch:
        message, field_ = f"{s.ctx.policy.max_waiting} loads wait already", "on_busy"
    else:
        message = f"{s.ctx.policy.max_prefetches} models are being fetched already"
        field_ = "prefetch"
    s.emit(Settle(fact.ticket, Problem("busy", f"{message}: try again later", field=field_)))


def enqueue(s: Step) -> None:
    """Accept the load: it gets its generation now and waits its turn, and for what it awaits."""
    fact = cast("LoadRequested", s.fact)
    job = _accepted(s, fact)
    s.put(queue=(*s.ctx.queue, job))
    _note_load(s, fact)
    s.emit(Accept(fact.ticket, job.generation, joined=False))
    _set_deadline(s, job)
    _begin_waiting(s, job)


def begin_prefetch(s: Step) -> None:
    fact = cast("PrefetchRequested", s.fact)
    job = _accepted(s, fact)
    s.put(prefetches=(*s.ctx.prefetches, job))
    _note_id(s, fact)
    _set_deadline(s, job)
    s.emit(Download(job.generation, job.target))


def join_prefetch(s: Step) -> None:
    fact = cast("PrefetchRequested", s.fact)
    job = cast("Job", fetches_the_same(s.ctx, fact.target))
    joined = replace(job, callers=(*job.callers, _caller(fact, joined=True)))
    s.put(prefetches=tuple(joined if j is job else j for j in s.ctx.prefetches))
    _note_id(s, fact)


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
    _conclude(s, first, running.loaded(already=True))
    s.put(queue=tuple(rest))
    _promote_next(s)


# --------------------------------------------------------------------------- loads that await


def note_answer(s: Step) -> None:
    """The Hub has said which files the load is of; now it waits for these, or for its turn."""
    fact = cast("Resolved | Fetched", s.fact)
    job = cast("Job", find(s.ctx.queue, fact.generation))
    target = replace(job.target, model=fact.model)
    now = replace(job, target=target, awaits=awaited_by(target))
    s.put(queue=tuple(now if j is job else j for j in s.ctx.queue))
    _begin_waiting(s, now)


def follow_queue(s: Step) -> None:
    """The queue has changed: the next load may be due by that, and nobody waits for a lease in
    vain.
    """
    if s.ctx.job is None and not s.was_due:
        _promote_next(s)
    if not s.ctx.wanted and s.ctx.job is None:
        _refuse_waiting_leases(s)


def fail_awaiting(s: Step) -> None:
    """What it would have replaced, or what loads meanwhile, goes on."""
    fact = cast("TimerFired", s.fact)  # or a FetchFailed
    job = cast("Job", find(s.ctx.queue, fact.generation))
    _drop(s, (job,))
    _fail(s, job, s.problem, _end)


def answer_prefetched(s: Step) -> None:
    """The model is on disk: found there by the call, or fetched for it."""
    fact = cast("PrefetchRequested | Fetched", s.fact)
    if isinstance(fact, PrefetchRequested):
        s.emit(Settle(fact.ticket, Prefetched(fact.target.model)))
        return
    job = cast("Job", find(s.ctx.prefetches, fact.generation))
    s.put(prefetches=tuple(j for j in s.ctx.prefetches if j is not job))
    s.settle(job.callers, Prefetched(fact.model))


def fail_prefetch(s: Step) -> None:
    fact = cast("TimerFired", s.fact)  # or a FetchFailed
    job = cast("Job", find(s.ctx.prefetches, fact.generation))
    problem = _deadline(job) if isinstance(s.fact, TimerFired) else s.problem
    _drop(s, (job,))
    s.settle(job.callers, problem)


# ---------------------------------------------------------------------------------- ending loads


def supersede_queue(s: Step) -> None:
    """Older loads in the queue give way; one that was asked for later stays."""
    older = [job for job in s.ctx.queue if all(c.ticket < s.ticket for c in job.callers)]
    _drop(s, older)
    for job in older:
        _end(s, job, _superseded(s, job))


def supersede_all(s: Step) -> None:
    """Whatever is older gives way; its callers hear so at once."""
    supersede_queue(s)
    if s.ctx.job is not None and s.ctx.job.token is None:
        problem = _superseded(s, s.ctx.job)
        _end(s, s.ctx.job, problem)
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
        _end_when_empty(s, job, problem)
        if job is s.ctx.job:
            s.put(last_error=problem)
            _interrupt(s, reason)
    _drop(s, ended, reason)
    if s.ctx.is_shutting_down:
        fetching = s.ctx.prefetches
        _drop(s, fetching, reason)
        for job in fetching:
            s.settle(job.callers, Problem(category, f"ended by {by}"))


def cancel_queued(s: Step) -> None:
    """Nothing of what waits runs yet: it ends at once."""
    ended = _named(s, s.ctx.queue)
    _drop(s, ended)
    for job in ended:
        _end(s, job, Problem("cancelled", "ended by an unload", generation=job.generation))


def cancel_job(s: Step) -> None:
    job = cast("Job", s.ctx.job)
    problem = _cancelled(job)
    _end_at_the_end(s, job, problem)
    s.put(last_error=problem, recovery=None)
    _interrupt(s, CancelReason.USER)


def time_out_job(s: Step) -> None:
    """A failure like any other, but for its effect, which still has to end."""
    job = cast("Job", s.ctx.job)
    _fail(s, job, _deadline(job), _end_at_the_end)
    _interrupt(s, CancelReason.DEADLINE)


def time_out_queued(s: Step) -> None:
    job = cast("Job", find(s.ctx.queue, cast("TimerFired", s.fact).generation))
    _drop(s, (job,), CancelReason.DEADLINE)
    _fail(s, job, _deadline(job), _end)


def cancel_callers(s: Step) -> None:
    """Everybody else the cancel means leaves; a queued load all of whose callers leave is dropped.

    One id may be that of several calls, and several calls may have joined one load.
    """
    fact = cast("CancelRequested", s.fact)
    for job in (*s.ctx.wanted, *s.ctx.prefetches):
        problem = _cancelled(job)
        s.settle((caller for caller in job.callers if is_meant(job, caller, fact)), problem)
    ended = [job for job in (*s.ctx.queue, *s.ctx.prefetches) if cancels(job, fact)]
    for job in ended:
        if job in s.ctx.queue:
            _conclude(s, job, _cancelled(job))
    _drop(s, ended)
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
    abandoned = [job for job in s.ctx.prefetches if not job.callers]
    if s.ctx.policy.abandoned_load == "cancel":
        for job in s.ctx.queue:
            if not job.callers and job.after is None:
                abandoned.append(job)
                message = "its last caller has gone away"
                _conclude(s, job, Problem("cancelled", message, generation=job.generation))
    _drop(s, abandoned)


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
        _end_when_empty(s, job, replace(s.problem, generation=job.generation))
    _drop(s, s.ctx.queue)
    s.put(job=None, running=None, effect=None, recovery=None, last_error=s.problem)


# ----------------------------------------------------------------------------- what comes after


def take_next(s: Step) -> None:
    """The oldest load in the queue becomes the one in flight, unless one is wanted already, or it
    still awaits something.

    What it inherits is decided now, after everything before it has been committed or has failed.
    """
    if s.ctx.job is not None and s.ctx.job.token is None:
        return
    first, *rest = s.ctx.queue if s.ctx.is_due else (None, *s.ctx.queue)
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
    """As `_end_at_the_end`, for the call that has ended it."""
    if s.ctx.effect is None:
        answer_cancelled(s)
    else:
        s.put(waiters=(*s.ctx.waiters, Waiter(s.ticket, CancelAnswer(cancelled=True))))


def wait_for_shutdown(s: Step) -> None:
    s.put(waiters=(*s.ctx.waiters, Waiter(s.ticket, Done())))


def answer_waiters(s: Step) -> None:
    """The slot is verified empty: answer everyone who waited for that."""
    s.emit(*s.ctx.ending, *(Settle(waiter.ticket, waiter.answer) for waiter in s.ctx.waiters))
    s.put(waiters=(), ending=())


def answer_waiters_occupied(s: Step) -> None:
    """The slot is not empty: who asked for that gets the reason instead."""
    for waiter in s.ctx.waiters:
        wanted_empty = isinstance(waiter.answer, Unloaded | Done)
        s.emit(Settle(waiter.ticket, s.problem if wanted_empty else waiter.answer))
    s.emit(*s.ctx.ending)
    s.put(waiters=(), ending=())


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
    if s.ctx.child is not None and s.ctx.end_is_known != "told":
        by_itself = s.ctx.end_is_known == "found"
        how = _how(exit_.returncode if exit_ else None) if by_itself else "stopped"
        s.emit(ServerEnded(s.ctx.child.pid, how))
    s.put(child=None, end_is_known=None, running=None, effect=None)
    s.put(last_exit=exit_ or s.ctx.last_exit)


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
    _conclude(s, job, running.loaded())
    for caller in job.callers:
        s.settle((caller,), running.loaded(joined=caller.joined))
    _promote_next(s)


def record_exit(s: Step) -> None:
    s.put(last_exit=cast("Exited", s.fact).exit)


def tell_exit(s: Step) -> None:
    """It has ended by itself, and is told once, whoever notices it first."""
    exit_ = cast("Exited", s.fact).exit
    if s.ctx.end_is_known != "told":
        s.emit(ServerEnded(exit_.pid, _how(exit_.returncode)))
        s.put(end_is_known="told")


def note_death(s: Step) -> None:
    """Whoever waits for its health may see that it is dead before its exit is noticed."""
    fact = cast("BecameReady | NotReady", s.fact)
    if isinstance(fact, BecameReady):
        is_dead = not fact.child_is_alive
    else:
        is_dead = fact.problem.category == "server_start_failed"
    if is_dead and s.ctx.end_is_known is None:
        s.put(end_is_known="found")


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
    if policy is None or s.ctx.is_due:
        what = "something else is loaded" if s.ctx.is_due else "load the model again"
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
    _enqueue_own(s, recovery.target, (), recovery.problem, None)
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
    """Nothing is under way in the slot: there is nothing to go back to, and no lease to wait for
    unless a load awaits its model or a restart is planned.
    """
    recovery = s.ctx.recovery
    if recovery is not None and recovery.phase == "trying":
        recovery = None
    s.put(previous=None, recovery=recovery)
    if not s.ctx.wanted:
        _refuse_waiting_leases(s)


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


def _refuse_waiting_leases(s: Step) -> None:
    """Nothing is on its way, but perhaps a restart."""
    recovery = s.ctx.recovery
    if recovery is None or recovery.phase == "cooling_down":
        why = _NOT_LOADED if recovery is None else _cooling_down(recovery, s.fact.at)
        s.emit(*(Settle(ticket, why) for ticket in s.ctx.lease_waiters))
        s.put(lease_waiters=())


_NOT_LOADED = Problem("not_loaded", "no model is loaded: load one first")


def _accepted(s: Step, fact: LoadRequested | PrefetchRequested) -> Job:
    """Give a call its generation; prefetches are counted downwards, so that loads are from 1."""
    callers = (_caller(fact, joined=False),)
    if isinstance(fact, PrefetchRequested):
        generation = Generation(s.ctx.last_prefetch - 1)
        s.put(last_prefetch=generation)
        return Job(generation, fact.target, callers, fact.at, fact.at, awaits="files")
    generation = Generation(s.ctx.generation + 1)
    s.put(generation=generation)
    awaits = awaited_by(fact.target)
    return Job(generation, fact.target, callers, fact.at, fact.at, awaits=awaits)


def _begin_waiting(s: Step, job: Job) -> None:
    """Begin what a load in the queue awaits; the state stays, and so does what runs."""
    if job.awaits is not None:
        kind = Resolve if job.awaits == "answer" else Download
        s.emit(kind(job.generation, job.target))


def _drop(s: Step, jobs: Iterable[Job], reason: CancelReason = CancelReason.USER) -> None:
    """Take loads out of the queue, and prefetches; what was begun for them ends by itself."""
    gone = {job.generation for job in jobs}
    for job in (*s.ctx.queue, *s.ctx.prefetches):
        if job.generation in gone and job.awaits is not None:
            s.emit(SetToken(job.generation, reason))
    s.put(
        queue=tuple(job for job in s.ctx.queue if job.generation not in gone),
        prefetches=tuple(job for job in s.ctx.prefetches if job.generation not in gone),
    )


def _caller(fact: LoadRequested | PrefetchRequested, *, joined: bool) -> Caller:
    return Caller(fact.ticket, fact.target.request.load_request_id, joined)


def _set_deadline(s: Step, job: Job) -> None:
    if (deadline_s := job.target.request.deadline_s) is not None:
        s.emit(SetTimer(job.generation, "deadline", deadline_s))


def _note_load(s: Step, fact: LoadRequested) -> None:
    """Every accepted load counts, also one that joins or finds its model loaded."""
    s.put(newest_load=max(s.ctx.newest_load, fact.ticket))
    _note_id(s, fact)


def _note_id(s: Step, fact: LoadRequested | PrefetchRequested) -> None:
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

    s.put(
        job=kept(s.ctx.job) if s.ctx.job else None,
        queue=tuple(map(kept, s.ctx.queue)),
        prefetches=tuple(map(kept, s.ctx.prefetches)),
    )


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


def _end(s: Step, job: Job, answer: Loaded | Problem) -> None:
    """A load has ended, and its callers hear so now."""
    s.settle(job.callers, answer)
    _conclude(s, job, answer)


def _end_when_empty(s: Step, job: Job, answer: Problem) -> None:
    """A load has ended, and its callers hear so when the slot is verified empty."""
    _wait(s, job.callers, answer)
    s.put(ending=(*s.ctx.ending, *_conclusions(s, job, answer)))


def _end_at_the_end(s: Step, job: Job, answer: Problem) -> None:
    """As `_end_when_empty`; but now, if the old server is only drained: a load that waits for
    leases has nothing under way that its end would have to wait for.
    """
    (_end if s.ctx.effect is None else _end_when_empty)(s, job, answer)


def _conclude(s: Step, job: Job, answer: Loaded | Problem) -> None:
    s.emit(*_conclusions(s, job, answer))


def _conclusions(s: Step, job: Job, answer: Loaded | Problem) -> tuple[Concluded, ...]:
    """What is said of a load that ends, and of the failed one that it was to make good."""
    own = Concluded(job.generation, job.target, job.accepted_at, _spent(s, job), answer)
    if job.failed is None or not isinstance(job.failed.answer, Problem):
        return (own,)
    problem = answer if isinstance(answer, Problem) else None
    return own, replace(job.failed, answer=_restored(job.failed.answer, problem))


def _spent(s: Step, job: Job) -> Timings:
    """The timings of a load, the phase in which it ends among them."""
    current = s.ctx.job
    if current is None or current.generation != job.generation or job.token is not None:
        return job.timings
    kind = s.ctx.effect.kind if s.ctx.effect else "kill"  # none: it waits for leases
    return job.spent("health" if kind == "probe" else kind, s.fact.at)


def _fail(
    s: Step,
    job: Job,
    problem: Problem,
    tell: Callable[[Step, Job, Problem], None] = _end_when_empty,
) -> None:
    """A load has failed: what follows, and when its callers hear of it. Only the one in flight may
    have replaced anything.
    """
    problem = replace(problem, generation=job.generation)
    if job is s.ctx.job and restores_previous(s.ctx, cast("Completion | TimerFired", s.fact)):
        _enqueue_previous(s, job, problem)
        return
    tell(s, job, problem)
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
    target = cast("Target", s.ctx.previous)
    _enqueue_own(s, target, failed.callers, problem, failed)
    s.put(previous=None)


def _enqueue_own(
    s: Step, target: Target, callers: tuple[Caller, ...], failure: Problem, failed: Job | None
) -> None:
    """It goes before whatever awaits its model."""
    generation = Generation(s.ctx.generation + 1)
    restored = Restored(generation, target.request.model_path, target.model.variant)
    failure = replace(failure, restored=restored)
    callers = tuple(replace(c, failure=c.failure or failure) for c in callers)
    concluded = None
    if failed is not None:
        accepted_at, spent = failed.accepted_at, _spent(s, failed)
        concluded = Concluded(failed.generation, failed.target, accepted_at, spent, failure)
    job = Job(generation, target, callers, s.fact.at, s.fact.at, after=failure, failed=concluded)
    queue = s.ctx.queue
    at = next((i for i, other in enumerate(queue) if other.awaits), len(queue))
    s.put(generation=generation, queue=(*queue[:at], job, *queue[at:]), last_error=failure)
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
    if s.ctx.is_due:
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


def _cancelled(job: Job) -> Problem:
    return Problem("cancelled", "cancelled by the caller", generation=job.generation)


def _deadline(job: Job) -> Problem:
    message = f"not healthy within deadline_s = {job.target.request.deadline_s}"
    return Problem("deadline", message, field="deadline_s", generation=job.generation)


def _occupied(reason: str) -> Problem:
    return Problem("slot_occupied", f"the slot is not empty: {reason}; unload to try again")


def _how(returncode: int | None) -> Literal["exit", "signal", "unknown"]:
    if returncode is None:
        return "unknown"
    return "signal" if returncode < 0 else "exit"


def _how_it_ended(returncode: int) -> str:
    return f"by signal {-returncode}" if returncode < 0 else f"with exit status {returncode}"
