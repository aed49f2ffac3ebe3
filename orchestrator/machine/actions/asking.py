"""A load or a prefetch is requested: refused, joined, answered, or accepted into the queue."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine import facts
from orchestrator.machine.actions.working import Step, cooling_down, require, superseded
from orchestrator.machine.commands import Accept, Download, Prefetched, Resolve, Warm
from orchestrator.machine.context import Caller, Job, Running
from orchestrator.machine.guards import (
    awaited_by,
    find,
    look_up_of,
    older_look_ups,
    prefetch_of,
    wanted_by,
)
from orchestrator.settings.target import ReloadReason, Target, differences


def refuse_shutting_down(s: Step[facts.LookUpRequested | facts.LeaseRequested]) -> None:
    s.answer(Problem("shutting_down", "the orchestrator is shutting down"))


def refuse_cancelled(s: Step[facts.Request]) -> None:
    s.answer(Problem("cancelled", "this load was cancelled before it arrived"))


def refuse_superseded(s: Step[facts.Request]) -> None:
    s.answer(Problem("superseded", "superseded by a newer load"))


def refuse_cooling_down(s: Step[facts.Request]) -> None:
    s.answer(cooling_down(require(s.ctx.recovery), s.fact.at))


def refuse_busy(s: Step[facts.Request]) -> None:
    newest = s.ctx.wanted[-1]
    message = (
        f"load {newest.generation} of {newest.target.request.model_path} is in flight: "
        'wait for it, cancel it, or set on_busy to "supersede" or "queue"'
    )
    s.answer(Problem("busy", message, field="on_busy", generation=newest.generation))


def refuse_full(s: Step[facts.ModelRequested]) -> None:
    fact, policy = s.fact, s.ctx.policy
    if isinstance(fact, facts.LoadRequested) and not fact.target.request.prefetch:
        limit, field_ = f"{policy.max_waiting} queued loads", "on_busy"
    else:
        limit, field_ = f"{policy.max_prefetches} prefetches at a time", "prefetch"
    message = f"the limit of {limit} is reached: try again later"
    s.answer(Problem("busy", message, field=field_))


def enqueue(s: Step[facts.LoadRequested]) -> None:
    """Give the load its generation, and begin what it must wait for in the queue."""
    fact, called = s.fact, require(look_up_of(s.ctx, s.fact.ticket))
    target = wanted_by(s.ctx, fact)
    job = Job(
        Generation(s.ctx.generation + 1),
        target,
        (_caller(fact),) if called.has_caller else (),
        called.at,
        newest_before=s.ctx.newest_load,
        awaits=awaited_by(target),
    )
    s.put(generation=job.generation, queue=(*s.ctx.queue, job))
    _record_load(s)
    s.emit(Accept(fact.ticket, job.generation))
    s.set_deadline(job)
    _begin_waiting(s, job)


def begin_prefetch(s: Step[facts.PrefetchRequested]) -> None:
    """Prefetches are counted downwards from -1, so that the loads' generations have no gaps."""
    fact, called = s.fact, require(look_up_of(s.ctx, s.fact.ticket))
    generation = Generation(s.ctx.last_prefetch - 1)
    job = Job(generation, fact.target, (_caller(fact),), called.at, awaits="files")
    s.put(last_prefetch=generation, prefetches=(*s.ctx.prefetches, job))
    s.drop_look_up(fact.ticket)
    s.set_deadline(job)
    s.emit(Download(generation, job.target))


def _begin_waiting(s: Step[facts.Fact], job: Job) -> None:
    if job.awaits is not None:
        effect = Resolve if job.awaits == "answer" else Download
        s.emit(effect(job.generation, job.target))


def _caller(fact: facts.ModelRequested, *, joined: bool = False) -> Caller:
    return Caller(fact.ticket, fact.target.request.load_request_id, joined)


def _record_load(s: Step[facts.LoadRequested]) -> None:
    """Every accepted load counts, even if it joins another or finds its model loaded.

    An older load of another model can only be superseded then: its caller does not wait for the
    look-up. One of the same model may still join.
    """
    fact, model = s.fact, s.fact.target.request.model_path.lower()
    s.put(newest_load=max(s.ctx.newest_load, fact.ticket))
    s.drop_look_up(fact.ticket)
    ended = [
        older
        for older in older_look_ups(s.ctx, fact.ticket)
        if older.request.on_busy == "supersede" and older.request.model_path.lower() != model
    ]
    s.end_look_ups(ended, superseded(fact))


def join_newest(s: Step[facts.LoadRequested]) -> None:
    _join(s, s.ctx.wanted[-1])


def join_loading(s: Step[facts.LoadRequested]) -> None:
    _join(s, require(s.ctx.job))


def _join(s: Step[facts.LoadRequested], job: Job) -> None:
    fact = s.fact
    target = job.target.with_retention(fact.target.request)
    if fact.target.request.force_reload and job is not s.ctx.job:
        # the queued load must not be answered by a server that runs when its turn comes
        target = replace(target, request=replace(target.request, force_reload=True))
    called = require(look_up_of(s.ctx, fact.ticket))
    callers = (*job.callers, _caller(fact, joined=True)) if called.has_caller else job.callers
    joined = replace(job, target=target, callers=callers)
    _record_load(s)
    s.put(
        job=joined if s.ctx.job is job else s.ctx.job,
        queue=tuple(joined if other is job else other for other in s.ctx.queue),
    )
    s.emit(Accept(fact.ticket, job.generation, joined=True))


def join_prefetch(s: Step[facts.PrefetchRequested]) -> None:
    job = require(prefetch_of(s.ctx, s.fact.target))
    joined = replace(job, callers=(*job.callers, _caller(s.fact)))
    s.put(prefetches=tuple(joined if j is job else j for j in s.ctx.prefetches))
    s.drop_look_up(s.fact.ticket)


def answer_already_loaded(s: Step[facts.LoadRequested]) -> None:
    running = _keep_as(s, s.fact.target)
    _record_load(s)
    s.emit(Accept(s.fact.ticket, running.generation))
    s.answer(running.loaded(already=True))


def answer_next_already_loaded(s: Step[facts.Fact]) -> None:
    first, *rest = s.ctx.queue
    answer = _keep_as(s, first.target).loaded(already=True)
    s.settle(first.callers, answer)
    s.conclude(first, answer)
    s.put(queue=tuple(rest))
    s.promote_next()


def _keep_as(s: Step[facts.Fact], wanted: Target) -> Running:
    """The newest load that finds the model running decides how long it stays."""
    running = require(s.ctx.running)
    running = replace(running, target=running.target.with_retention(wanted.request))
    s.put(running=running)
    return running


def answer_on_disk(s: Step[facts.PrefetchRequested]) -> None:
    s.answer(Prefetched(s.fact.target.model))


def answer_prefetched(s: Step[facts.Fetched]) -> None:
    job = require(find(s.ctx.prefetches, s.fact.generation))
    s.put(prefetches=tuple(j for j in s.ctx.prefetches if j is not job))
    s.settle(job.callers, Prefetched(s.fact.model))


def record_model(s: Step[facts.Resolved | facts.Fetched]) -> None:
    """A queued load has its model resolved or downloaded; it waits for the files, or its turn."""
    job = require(find(s.ctx.queue, s.fact.generation))
    target = replace(job.target, model=s.fact.model)
    now = replace(job, target=target, awaits=awaited_by(target))
    s.put(queue=tuple(now if j is job else j for j in s.ctx.queue))
    _begin_waiting(s, now)


def advance_queue(s: Step[facts.Fact]) -> None:
    """The queue has changed: promote a load that has become due, or refuse waiting leases."""
    if s.ctx.job is None and not s.was_due:
        s.promote_next()
    if not s.ctx.wanted and s.ctx.job is None:
        s.refuse_waiting_leases()


def take_next(s: Step[facts.Fact]) -> None:
    """The oldest queued load becomes the one in flight, if it is due and no other is wanted.

    What it inherits is decided here, after everything before it was committed or has failed.
    """
    if s.ctx.loading is not None:
        return
    first, *rest = s.ctx.queue if s.ctx.is_due else (None, *s.ctx.queue)
    if first is not None:
        target = first.target.inheriting(dict(s.ctx.committed_args))
        first = replace(first, target=target, phase_at=s.fact.at)
        if first.after is None:
            first = replace(first, reload_reasons=_reload_reasons(s, first))
            before = s.ctx.running.target if s.ctx.running else s.ctx.previous
            s.put(previous=before, recovery=None)
        if s.ctx.policy.warms and s.ctx.child is not None and target.model.is_on_disk:
            s.emit(Warm(first.generation, target))
    s.put(job=first, queue=tuple(rest))


def _reload_reasons(s: Step[facts.Fact], job: Job) -> tuple[ReloadReason, ...]:
    if s.ctx.running is None:
        return ()
    reasons = differences(s.ctx.running.target, job.target)
    if job.target.request.force_reload:
        reasons = (*reasons, ReloadReason("force_reload", running=False, requested=True))
    return reasons or (ReloadReason("server", running="exited", requested="alive"),)
