"""Loads end: superseded, cancelled, timed out, failed or abandoned. Waiters get their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.base.tokens import CancelReason
from orchestrator.errors import Problem
from orchestrator.machine import facts
from orchestrator.machine.actions.working import MAX_REMEMBERED, Step, require, superseded
from orchestrator.machine.commands import CancelAnswer, Done, Settle, Timings, Unloaded
from orchestrator.machine.context import Caller, Job
from orchestrator.machine.guards import (
    EARLY_CANCEL_S,
    cancels,
    find,
    is_looked_up_as,
    is_meant,
    is_named,
    look_up_of,
    unloaded_look_ups,
)


def supersede_queue(s: Step[facts.LoadRequested]) -> None:
    """End the queued loads that were called before this one."""
    older = [job for job in s.ctx.queue if all(c.ticket < s.fact.ticket for c in job.callers)]
    s.drop(older, CancelReason.SUPERSEDED)
    for job in older:
        s.end(job, superseded(s.fact, job.generation), "now")


def supersede_all(s: Step[facts.LoadRequested]) -> None:
    supersede_queue(s)
    if (job := s.ctx.loading) is not None:
        problem = superseded(s.fact, job.generation)
        s.end(job, problem, "now")
        s.put(last_error=problem)
        s.interrupt(CancelReason.SUPERSEDED)


def cancel_all(s: Step[facts.UnloadRequested | facts.ShutdownRequested]) -> None:
    """End every load of a shutdown, or those an unload names; answer when the slot is empty."""
    if s.ctx.is_shutting_down:
        reason, category, by = CancelReason.SHUTDOWN, "shutting_down", "the shutdown"
    else:
        reason, category, by = CancelReason.USER, "cancelled", "an unload"
    ended = [job for job in s.ctx.wanted if is_named(job.target, s.fact.model)]
    for job in ended:
        problem = _cancelled(job, by, category)
        s.end(job, problem)
        if job is s.ctx.job:
            s.put(last_error=problem)
            s.interrupt(reason)
    s.drop(ended, reason)
    if s.ctx.is_shutting_down:
        prefetches = s.ctx.prefetches
        s.drop(prefetches, reason)
        for job in prefetches:
            s.settle(job.callers, _cancelled(job, by, category))


def cancel_queued(s: Step[facts.UnloadRequested]) -> None:
    ended = [job for job in s.ctx.queue if is_named(job.target, s.fact.model)]
    s.drop(ended)
    for job in ended:
        s.end(job, _cancelled(job, "an unload"), "now")


def latch_shutdown(s: Step[facts.Fact]) -> None:
    problem = _cancelled(None, "the shutdown", "shutting_down")
    s.end_look_ups(s.ctx.look_ups, problem)
    s.emit(*(Settle(ticket, problem) for ticket in s.ctx.lease_waiters))
    s.put(is_shutting_down=True, previous=None, recovery=None, lease_waiters=())


def answer_unchanged(s: Step[facts.UnloadRequested]) -> None:
    """The model is not there; a load of it that was called before still ends when it arrives."""
    _record_unload(s)
    s.answer(Unloaded(changed=False))


def answer_unloaded(s: Step[facts.UnloadRequested]) -> None:
    _record_unload(s)
    s.answer(Unloaded())


def wait_for_empty(s: Step[facts.UnloadRequested]) -> None:
    _record_unload(s)
    s.answer_when_empty(Unloaded())


def wait_for_shutdown(s: Step[facts.ShutdownRequested]) -> None:
    s.answer_when_empty(Done())


def answer_kept(s: Step[facts.ShutdownRequested]) -> None:
    """The server goes on, with its keeper, for the next owner."""
    s.answer(Done(is_kept=True))


def _record_unload(s: Step[facts.UnloadRequested]) -> None:
    fact = s.fact
    s.end_look_ups(unloaded_look_ups(s.ctx, fact), _cancelled(None, "an unload"))
    others = tuple(unload for unload in s.ctx.unloads if unload[0] != fact.model)
    s.put(unloads=(*others, (fact.model, fact.ticket))[-MAX_REMEMBERED:])
    if s.ctx.previous is not None and is_named(s.ctx.previous, fact.model):
        s.put(previous=None)
    if s.ctx.recovery is not None and is_named(s.ctx.recovery.target, fact.model):
        s.put(recovery=None)


def cancel_job(s: Step[facts.Fact]) -> None:
    job = require(s.ctx.job)
    problem = _cancelled(job)
    s.end(job, problem, "effect_ended")
    s.put(last_error=problem, recovery=None)
    s.interrupt(CancelReason.USER)


def cancel_callers(s: Step[facts.CancelRequested]) -> None:
    """Cancel for the callers that the cancel names, and drop queued loads without any other.

    Several calls may share one id, and several may have joined one load.
    """
    fact = s.fact
    named = [look_up for look_up in s.ctx.look_ups if is_looked_up_as(look_up, fact)]
    s.end_look_ups(named, _cancelled(None))
    for job in (*s.ctx.wanted, *s.ctx.prefetches):
        meant = (caller for caller in job.callers if is_meant(job, caller, fact))
        s.settle(meant, _cancelled(job))
    ended = [job for job in (*s.ctx.queue, *s.ctx.prefetches) if cancels(job, fact)]
    for job in ended:
        if job in s.ctx.queue:
            s.conclude(job, _cancelled(job))
    s.drop(ended)
    _keep_callers(s, lambda job, caller: not is_meant(job, caller, fact))


def answer_cancelled(s: Step[facts.CancelRequested]) -> None:
    s.answer(CancelAnswer(cancelled=True))


def wait_for_cancel(s: Step[facts.CancelRequested]) -> None:
    """Answer the cancel when its load has ended: now, if that only waited for leases."""
    if s.ctx.effect is None:
        answer_cancelled(s)
    else:
        s.answer_when_empty(CancelAnswer(cancelled=True))


def remember_cancel(s: Step[facts.CancelRequested]) -> None:
    """There is nothing to cancel; a load of an unknown id may arrive later."""
    fact = s.fact
    if fact.request_id is not None and fact.request_id not in s.ctx.seen_ids:
        recent = tuple(id_ for id_ in s.ctx.cancelled_ids if fact.at - id_[1] <= EARLY_CANCEL_S)
        s.put(cancelled_ids=(*recent, (fact.request_id, fact.at))[-MAX_REMEMBERED:])
    s.answer(CancelAnswer(cancelled=False))


def forget_ticket(s: Step[facts.Withdrawn]) -> None:
    """The caller has gone away: it gets no answer, and loads without another caller end."""
    gone, cancels_abandoned = s.fact.ticket, s.ctx.policy.abandoned_load == "cancel"
    if gone == s.ctx.newest_load and cancels_abandoned:
        for job in s.ctx.wanted:
            tickets = {caller.ticket for caller in job.callers}
            if gone in tickets:
                s.put(newest_load=max({job.newest_before} | (tickets - {gone})))
    _keep_callers(s, lambda _, caller: caller.ticket != gone)
    if (called := look_up_of(s.ctx, gone)) is not None:
        if cancels_abandoned or called.purpose == "prefetch":
            s.drop_look_up(gone)
        else:
            left = replace(called, has_caller=False)
            s.put(look_ups=tuple(left if o is called else o for o in s.ctx.look_ups))
    s.put(
        waiters=tuple(w for w in s.ctx.waiters if w.ticket != gone),
        lease_waiters=tuple(t for t in s.ctx.lease_waiters if t != gone),
    )
    abandoned = [job for job in s.ctx.prefetches if not job.callers]
    if cancels_abandoned:
        for job in s.ctx.queue:
            if not job.callers and not job.is_own:
                abandoned.append(job)
                message = "cancelled because its last caller went away"
                s.conclude(job, _problem(job, "cancelled", message))
    s.drop(abandoned)


def time_out_job(s: Step[facts.Fact]) -> None:
    job = require(s.ctx.job)
    s.fail(job, _deadline(job), "effect_ended")
    s.interrupt(CancelReason.DEADLINE)


def time_out_queued(s: Step[facts.TimerFired]) -> None:
    job = require(find(s.ctx.queue, s.fact.generation))
    s.drop((job,), CancelReason.DEADLINE)
    s.fail(job, _deadline(job), "now")


def _deadline(job: Job, goal: str = "Healthy") -> Problem:
    message = f"the model is not {goal} after deadline_s = {job.target.request.deadline_s} seconds"
    return _problem(job, "deadline", message, field="deadline_s")


def fail_queued(s: Step[facts.FetchFailed]) -> None:
    job = require(find(s.ctx.queue, s.fact.generation))
    s.drop((job,))
    s.fail(job, s.fact.problem, "now")


def fail_prefetch(s: Step[facts.FetchFailed | facts.TimerFired]) -> None:
    job = require(find(s.ctx.prefetches, s.fact.generation))
    if isinstance(s.fact, facts.TimerFired):
        s.drop((job,), CancelReason.DEADLINE)
        s.settle(job.callers, _deadline(job, "on disk"))
    else:
        s.drop((job,))
        s.settle(job.callers, s.fact.problem)


def fail_job(s: Step[facts.FetchFailed | facts.SpawnFailed | facts.NotReady]) -> None:
    """Callers are answered when the slot is empty, or when the previous model is back."""
    _fail_job(s, s.fact.problem)


def give_up_adoption(s: Step[facts.BecameReady | facts.NotReady]) -> None:
    """The server that was found is not to be believed: it ends, and who joined gets another."""
    job = require(s.ctx.job)
    if job.callers:
        again = replace(job, is_adoption=False, timings=Timings())
        s.put(job=None, queue=(again, *s.ctx.queue))
        return
    problem = Problem("server_exited", "the server that was found has ended since")
    if isinstance(s.fact, facts.NotReady):
        problem = s.fact.problem
    problem = replace(problem, generation=job.generation)
    s.conclude(job, problem)
    s.put(job=None, last_error=problem)


def fail_job_exited(s: Step[facts.Fact]) -> None:
    message = "the server exited just after it became ready: see its output"
    _fail_job(s, Problem("server_start_failed", message, reason="exited"))


def fail_job_slot_occupied(s: Step[facts.Fetched]) -> None:
    message = f"the slot is not empty ({s.fact.slot.reason}): unload to empty it"
    _fail_job(s, Problem("slot_occupied", message))


def _fail_job(s: Step[facts.Fact], problem: Problem) -> None:
    job = require(s.ctx.job)
    if job.token is None:
        s.fail(job, problem)
    s.put(job=None)


def fail_all(s: Step[facts.KillFailed]) -> None:
    """No load can start beside what is still alive in the slot."""
    for job in s.ctx.wanted:
        s.end(job, replace(s.fact.problem, generation=job.generation))
    s.drop(s.ctx.queue)
    s.put(job=None, running=None, effect=None, recovery=None, last_error=s.fact.problem)


def answer_waiters(s: Step[facts.Fact]) -> None:
    s.emit(*s.ctx.ending, *s.ctx.waiters)
    s.put(waiters=(), ending=())


def answer_waiters_occupied(s: Step[facts.KillFailed]) -> None:
    """Unloads and shutdowns get the reason why the slot is not empty."""
    for waiter in s.ctx.waiters:
        wanted_empty = isinstance(waiter.answer, Unloaded | Done)
        s.emit(replace(waiter, answer=s.fact.problem) if wanted_empty else waiter)
    s.emit(*s.ctx.ending)
    s.put(waiters=(), ending=())


def _cancelled(job: Job | None, by: str = "the caller", category: str = "cancelled") -> Problem:
    """Return why a load has ended, or a call without one."""
    return _problem(job, category, f"cancelled by {by}")


def _problem(job: Job | None, category: str, message: str, field: str | None = None) -> Problem:
    number = job.generation if job is not None and job.generation > 0 else None  # not a prefetch's
    return Problem(category, message, field=field, generation=number)


def _keep_callers(s: Step[facts.Fact], keep: Callable[[Job, Caller], bool]) -> None:
    def kept(job: Job) -> Job:
        return replace(job, callers=tuple(c for c in job.callers if keep(job, c)))

    s.put(
        job=kept(s.ctx.job) if s.ctx.job else None,
        queue=tuple(map(kept, s.ctx.queue)),
        prefetches=tuple(map(kept, s.ctx.prefetches)),
    )
