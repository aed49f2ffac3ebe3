"""Loads end: superseded, cancelled, timed out, failed, left; and who waits for an empty slot.

The order inside a row is: first what ends, then what follows (`take_next`), then the new effect.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.base.tokens import CancelReason
from orchestrator.errors import Problem
from orchestrator.machine.actions.outcomes import (
    conclude,
    end,
    end_at_the_end,
    end_when_empty,
    fail,
    interrupt,
)
from orchestrator.machine.actions.working import (
    MAX_REMEMBERED_IDS,
    Step,
    drop,
    keep_callers,
    known,
    named_by,
    note_unload,
)
from orchestrator.machine.commands import CancelAnswer, Done, Settle, Unloaded
from orchestrator.machine.context import Job, Waiter
from orchestrator.machine.facts import (
    CancelRequested,
    Fact,
    Fetched,
    FetchFailed,
    KillFailed,
    LoadRequested,
    NotReady,
    ShutdownRequested,
    SpawnFailed,
    TimerFired,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.machine.guards import EARLY_CANCEL_S, cancels, find, is_meant


def fail_awaiting(s: Step[FetchFailed]) -> None:
    """What it would have replaced, or what loads meanwhile, goes on."""
    job = known(find(s.ctx.queue, s.fact.generation))
    drop(s, (job,))
    fail(s, job, s.fact.problem, end)


def fail_prefetch(s: Step[FetchFailed | TimerFired]) -> None:
    job = known(find(s.ctx.prefetches, s.fact.generation))
    if isinstance(s.fact, TimerFired):
        message = f"not on disk within deadline_s = {job.target.request.deadline_s}"
        problem = Problem("deadline", message, field="deadline_s")
    else:
        problem = s.fact.problem
    drop(s, (job,))
    s.settle(job.callers, problem)


def supersede_queue(s: Step[LoadRequested]) -> None:
    """Older loads in the queue give way; one that was asked for later stays."""
    older = [job for job in s.ctx.queue if all(c.ticket < s.fact.ticket for c in job.callers)]
    drop(s, older)
    for job in older:
        end(s, job, superseded(s, job))


def supersede_all(s: Step[LoadRequested]) -> None:
    """Whatever is older gives way; its callers hear so at once."""
    supersede_queue(s)
    if s.ctx.job is not None and s.ctx.job.token is None:
        problem = superseded(s, s.ctx.job)
        end(s, s.ctx.job, problem)
        s.put(last_error=problem)
        interrupt(s, CancelReason.SUPERSEDED)


def cancel_all(s: Step[UnloadRequested | ShutdownRequested]) -> None:
    """A shutdown ends every load, an unload those it names; their callers hear so when the slot
    is empty.
    """
    ended = named_by(s, s.ctx.wanted)
    if s.ctx.is_shutting_down:
        reason, category, by = CancelReason.SHUTDOWN, "shutting_down", "the shutdown"
    else:
        reason, category, by = CancelReason.USER, "cancelled", "an unload"
    for job in ended:
        problem = Problem(category, f"ended by {by}", generation=job.generation)
        end_when_empty(s, job, problem)
        if job is s.ctx.job:
            s.put(last_error=problem)
            interrupt(s, reason)
    drop(s, ended, reason)
    if s.ctx.is_shutting_down:
        fetching = s.ctx.prefetches
        drop(s, fetching, reason)
        for job in fetching:
            s.settle(job.callers, Problem(category, f"ended by {by}"))


def cancel_queued(s: Step[UnloadRequested]) -> None:
    """Nothing of what waits runs yet: it ends at once."""
    ended = named_by(s, s.ctx.queue)
    drop(s, ended)
    for job in ended:
        end(s, job, Problem("cancelled", "ended by an unload", generation=job.generation))


def cancel_job(s: Step[Fact]) -> None:
    job = known(s.ctx.job)
    problem = cancelled(job)
    end_at_the_end(s, job, problem)
    s.put(last_error=problem, recovery=None)
    interrupt(s, CancelReason.USER)


def time_out_job(s: Step[Fact]) -> None:
    """A failure like any other, but for its effect, which still has to end."""
    job = known(s.ctx.job)
    fail(s, job, deadline(job), end_at_the_end)
    interrupt(s, CancelReason.DEADLINE)


def time_out_queued(s: Step[TimerFired]) -> None:
    job = known(find(s.ctx.queue, s.fact.generation))
    drop(s, (job,), CancelReason.DEADLINE)
    fail(s, job, deadline(job), end)


def cancel_callers(s: Step[CancelRequested]) -> None:
    """Everybody else the cancel means leaves; a queued load all of whose callers leave is dropped.

    One id may be that of several calls, and several calls may have joined one load.
    """
    fact = s.fact
    for job in (*s.ctx.wanted, *s.ctx.prefetches):
        problem = cancelled(job)
        s.settle((caller for caller in job.callers if is_meant(job, caller, fact)), problem)
    ended = [job for job in (*s.ctx.queue, *s.ctx.prefetches) if cancels(job, fact)]
    for job in ended:
        if job in s.ctx.queue:
            conclude(s, job, cancelled(job))
    drop(s, ended)
    if fact.request_id is not None:
        keep_callers(s, lambda caller: caller.request_id != fact.request_id)


def answer_cancelled(s: Step[CancelRequested]) -> None:
    s.emit(Settle(s.fact.ticket, CancelAnswer(cancelled=True)))


def remember_cancel(s: Step[CancelRequested]) -> None:
    """Nothing to cancel. An id never seen may belong to a load still on its way."""
    fact = s.fact
    if fact.request_id is not None and fact.request_id not in s.ctx.seen_ids:
        recent = tuple(
            known for known in s.ctx.cancelled_ids if fact.at - known[1] <= EARLY_CANCEL_S
        )
        s.put(cancelled_ids=(*recent, (fact.request_id, fact.at))[-MAX_REMEMBERED_IDS:])
    s.emit(Settle(fact.ticket, CancelAnswer(cancelled=False)))


def forget_ticket(s: Step[Withdrawn]) -> None:
    """The caller has gone: nothing is owed to it any more."""
    gone = s.fact.ticket
    if gone == s.ctx.newest_load and s.ctx.policy.abandoned_load == "cancel":
        for job in s.ctx.wanted:
            tickets = {caller.ticket for caller in job.callers}
            if gone in tickets:
                s.put(newest_load=max({job.newest_before} | (tickets - {gone})))
    keep_callers(s, lambda caller: caller.ticket != gone)
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
                conclude(s, job, Problem("cancelled", message, generation=job.generation))
    drop(s, abandoned)


def fail_job(s: Step[FetchFailed | SpawnFailed | NotReady]) -> None:
    """The load in flight has failed; its callers hear why when the slot is empty again, or when
    what ran before is back.
    """
    job = known(s.ctx.job)
    if job.token is None:
        fail(s, job, s.fact.problem)
    s.put(job=None)


def fail_job_exited(s: Step[Fact]) -> None:
    job = known(s.ctx.job)
    if job.token is None:
        message = "the server ended in the moment it became ready; see its output"
        fail(s, job, Problem("server_start_failed", message, reason="exited"))
    s.put(job=None)


def fail_job_slot_occupied(s: Step[Fetched]) -> None:
    job = known(s.ctx.job)
    if job.token is None:
        fail(s, job, occupied(s.fact.slot.reason))
    s.put(job=None)


def fail_all(s: Step[KillFailed]) -> None:
    """The slot could not be emptied: no load can start beside what is still alive."""
    for job in s.ctx.wanted:
        end_when_empty(s, job, replace(s.fact.problem, generation=job.generation))
    drop(s, s.ctx.queue)
    s.put(job=None, running=None, effect=None, recovery=None, last_error=s.fact.problem)


def wait_for_empty(s: Step[UnloadRequested]) -> None:
    note_unload(s)
    s.put(waiters=(*s.ctx.waiters, Waiter(s.fact.ticket, Unloaded())))


def wait_for_end(s: Step[CancelRequested]) -> None:
    """As `end_at_the_end`, for the call that has ended it."""
    if s.ctx.effect is None:
        answer_cancelled(s)
    else:
        s.put(waiters=(*s.ctx.waiters, Waiter(s.fact.ticket, CancelAnswer(cancelled=True))))


def wait_for_shutdown(s: Step[ShutdownRequested]) -> None:
    s.put(waiters=(*s.ctx.waiters, Waiter(s.fact.ticket, Done())))


def answer_waiters(s: Step[Fact]) -> None:
    """The slot is verified empty: answer everyone who waited for that."""
    s.emit(*s.ctx.ending, *(Settle(waiter.ticket, waiter.answer) for waiter in s.ctx.waiters))
    s.put(waiters=(), ending=())


def answer_waiters_occupied(s: Step[KillFailed]) -> None:
    """The slot is not empty: who asked for that gets the reason instead."""
    for waiter in s.ctx.waiters:
        wanted_empty = isinstance(waiter.answer, Unloaded | Done)
        s.emit(Settle(waiter.ticket, s.fact.problem if wanted_empty else waiter.answer))
    s.emit(*s.ctx.ending)
    s.put(waiters=(), ending=())


def answer_unchanged(s: Step[UnloadRequested]) -> None:
    """Not that model. A load of it may still be on its way: it was asked for first, and ends."""
    note_unload(s)
    s.emit(Settle(s.fact.ticket, Unloaded(changed=False)))


def answer_unloaded(s: Step[UnloadRequested]) -> None:
    note_unload(s)
    s.emit(Settle(s.fact.ticket, Unloaded()))


def latch_shutdown(s: Step[Fact]) -> None:
    s.put(is_shutting_down=True, previous=None, recovery=None)


def superseded(s: Step[LoadRequested], job: Job) -> Problem:
    newer = s.fact.target.request.model_path
    message = f"superseded by a newer load of {newer}"
    return Problem("superseded", message, generation=job.generation)


def cancelled(job: Job) -> Problem:
    number = job.generation if job.generation > 0 else None  # a prefetch has none that is shown
    return Problem("cancelled", "cancelled by the caller", generation=number)


def deadline(job: Job) -> Problem:
    message = f"not healthy within deadline_s = {job.target.request.deadline_s}"
    return Problem("deadline", message, field="deadline_s", generation=job.generation)


def occupied(reason: str) -> Problem:
    return Problem("slot_occupied", f"the slot is not empty: {reason}; unload to try again")
