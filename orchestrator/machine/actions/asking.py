"""A load or a prefetch is asked for: refused, joined, answered, or accepted into the queue."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.errors import Problem
from orchestrator.machine.actions.outcomes import conclude
from orchestrator.machine.actions.working import (
    Step,
    accepted,
    begin_waiting,
    caller_of,
    cooling_down,
    join,
    kept_as,
    known,
    note_id,
    note_load,
    promote_next,
    reasons,
    refuse_waiting_leases,
    set_deadline,
)
from orchestrator.machine.commands import Accept, Download, Prefetched, Settle
from orchestrator.machine.facts import (
    Fact,
    Fetched,
    LoadRequested,
    PrefetchRequested,
    Request,
    Resolved,
)
from orchestrator.machine.guards import awaited_by, fetches_the_same, find


def refuse_shutting_down(s: Step[Request]) -> None:
    s.emit(Settle(s.fact.ticket, Problem("shutting_down", "the orchestrator is shutting down")))


def refuse_cancelled(s: Step[Request]) -> None:
    problem = Problem("cancelled", "this load was cancelled before it arrived")
    s.emit(Settle(s.fact.ticket, problem))


def refuse_superseded(s: Step[Request]) -> None:
    problem = Problem("superseded", "superseded by a load that was asked for later")
    s.emit(Settle(s.fact.ticket, problem))


def refuse_cooling_down(s: Step[Request]) -> None:
    s.emit(Settle(s.fact.ticket, cooling_down(known(s.ctx.recovery), s.fact.at)))


def refuse_busy(s: Step[Request]) -> None:
    newest = s.ctx.wanted[-1]
    message = (
        f"load {newest.generation} of {newest.target.request.model_path} is in flight: "
        "wait for it, cancel it, or use on_busy supersede or queue"
    )
    problem = Problem("busy", message, field="on_busy", generation=newest.generation)
    s.emit(Settle(s.fact.ticket, problem))


def refuse_full(s: Step[LoadRequested | PrefetchRequested]) -> None:
    """The queue or the prefetches have their bound, for every caller together."""
    fact = s.fact
    if isinstance(fact, LoadRequested) and not fact.target.request.prefetch:
        message, field_ = f"{s.ctx.policy.max_waiting} loads wait already", "on_busy"
    else:
        message = f"{s.ctx.policy.max_prefetches} models are being fetched already"
        field_ = "prefetch"
    s.emit(Settle(fact.ticket, Problem("busy", f"{message}: try again later", field=field_)))


def enqueue(s: Step[LoadRequested]) -> None:
    """Accept the load: it gets its generation now and waits its turn, and for what it awaits."""
    fact = s.fact
    job = accepted(s, fact)
    s.put(queue=(*s.ctx.queue, job))
    note_load(s)
    s.emit(Accept(fact.ticket, job.generation, joined=False))
    set_deadline(s, job)
    begin_waiting(s, job)


def begin_prefetch(s: Step[PrefetchRequested]) -> None:
    fact = s.fact
    job = accepted(s, fact)
    s.put(prefetches=(*s.ctx.prefetches, job))
    note_id(s, fact)
    set_deadline(s, job)
    s.emit(Download(job.generation, job.target))


def join_prefetch(s: Step[PrefetchRequested]) -> None:
    fact = s.fact
    job = known(fetches_the_same(s.ctx, fact.target))
    joined = replace(job, callers=(*job.callers, caller_of(fact, joined=True)))
    s.put(prefetches=tuple(joined if j is job else j for j in s.ctx.prefetches))
    note_id(s, fact)


def join_newest(s: Step[LoadRequested]) -> None:
    join(s, s.ctx.wanted[-1])


def join_loading(s: Step[LoadRequested]) -> None:
    join(s, known(s.ctx.job))


def answer_already_loaded(s: Step[LoadRequested]) -> None:
    fact = s.fact
    running = kept_as(s, fact.target)
    note_load(s)
    s.emit(
        Accept(fact.ticket, running.generation, joined=False),
        Settle(fact.ticket, running.loaded(already=True)),
    )


def answer_next_already_loaded(s: Step[Fact]) -> None:
    first, *rest = s.ctx.queue
    running = kept_as(s, first.target)
    for caller in first.callers:
        s.settle((caller,), running.loaded(already=True, joined=caller.joined))
    conclude(s, first, running.loaded(already=True))
    s.put(queue=tuple(rest))
    promote_next(s)


def note_answer(s: Step[Resolved | Fetched]) -> None:
    """The Hub has said which files the load is of; now it waits for these, or for its turn."""
    fact = s.fact
    job = known(find(s.ctx.queue, fact.generation))
    target = replace(job.target, model=fact.model)
    now = replace(job, target=target, awaits=awaited_by(target))
    s.put(queue=tuple(now if j is job else j for j in s.ctx.queue))
    begin_waiting(s, now)


def follow_queue(s: Step[Fact]) -> None:
    """The queue has changed: the next load may be due by that, and nobody waits for a lease in
    vain.
    """
    if s.ctx.job is None and not s.was_due:
        promote_next(s)
    if not s.ctx.wanted and s.ctx.job is None:
        refuse_waiting_leases(s)


def answer_prefetched(s: Step[Fetched]) -> None:
    fact = s.fact
    job = known(find(s.ctx.prefetches, fact.generation))
    s.put(prefetches=tuple(j for j in s.ctx.prefetches if j is not job))
    s.settle(job.callers, Prefetched(fact.model))


def take_next(s: Step[Fact]) -> None:
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
            first = replace(first, reload_reasons=reasons(s, first))
            before = s.ctx.running.target if s.ctx.running else s.ctx.previous
            s.put(previous=before, recovery=None)
    s.put(job=first, queue=tuple(rest))
