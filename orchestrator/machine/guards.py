"""Named predicates of the table: `(context, fact) -> bool`, pure, without memory of their own.

A guard's name reads as the sentence it checks. The type of its second argument is the fact (or
facts) it may be used with; a test holds the table to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from orchestrator.base.tokens import Generation
from orchestrator.machine.context import Caller, Context, Job, Running
from orchestrator.machine.facts import (
    BecameReady,
    CancelRequested,
    Completion,
    Exited,
    Fact,
    Fetched,
    FetchFailed,
    LeaseReleased,
    LeaseRequested,
    LoadRequested,
    PrefetchRequested,
    Promoted,
    Resolved,
    TimerFired,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.machine.recovery import Recovery
from orchestrator.settings.target import Target, differences, is_same_model

EARLY_CANCEL_S = 60.0
"""How long a cancel that came before its load is remembered."""

MAX_VERIFICATIONS = 3
"""How often a load looks for an empty slot again before it gives up."""

# ------------------------------------------------------------------------- the two that matter


def slot_is_empty(ctx: Context, fact: Fetched) -> bool:
    """The operating system said so in this very step."""
    return fact.slot.is_empty


def token_is_unset(ctx: Context, fact: Fetched | Completion) -> bool:
    """Nobody has cancelled, superseded or timed out this load."""
    return ctx.job is not None and ctx.job.token is None


# ------------------------------------------------------------------------------- completions


def is_current(ctx: Context, fact: Completion) -> bool:
    """It completes the one effect in flight; anything else is settled, never believed."""
    return (
        ctx.effect is not None
        and ctx.effect.kind == fact.effect
        and ctx.effect.generation == fact.generation
    )


def child_is_alive(
    ctx: Context, fact: BecameReady | LoadRequested | LeaseRequested | Promoted
) -> bool:
    """The operating system said so in this very step."""
    return fact.child_is_alive


def may_verify_again(ctx: Context, fact: Fetched) -> bool:
    return ctx.job is not None and ctx.job.attempts < MAX_VERIFICATIONS


def next_is_due(ctx: Context, fact: Completion | Promoted) -> bool:
    """The next load waits for its turn, and not for its model."""
    return ctx.is_due


def job_is_wanted(ctx: Context, fact: Completion) -> bool:
    return ctx.job is not None and ctx.job.token is None


def load_is_wanted(ctx: Context, fact: LeaseRequested) -> bool:
    return bool(ctx.wanted)


def is_awaited(ctx: Context, fact: Resolved | Fetched | FetchFailed) -> bool:
    """A load in the queue waits for just this."""
    job = find(ctx.queue, fact.generation)
    if job is None or job.awaits is None:
        return False
    return isinstance(fact, FetchFailed) or job.awaits == _AWAITED[type(fact)]


def is_prefetch(ctx: Context, fact: Fetched | FetchFailed | TimerFired) -> bool:
    """It is about a download that no load follows."""
    return find(ctx.prefetches, fact.generation) is not None


_AWAITED = {Resolved: "answer", Fetched: "files"}


def is_child(ctx: Context, fact: Exited) -> bool:
    return ctx.child is not None and ctx.child.pid == fact.exit.pid


def is_found_dead(ctx: Context, fact: Exited) -> bool:
    """It was dead before it was killed."""
    return ctx.end_is_known == "found"


# ---------------------------------------------------------------------------------- requests


def is_shutting_down(
    ctx: Context, fact: LoadRequested | PrefetchRequested | LeaseRequested
) -> bool:
    return ctx.is_shutting_down


def was_cancelled_early(ctx: Context, fact: LoadRequested | PrefetchRequested) -> bool:
    """Its cancel overtook it."""
    name = fact.target.request.load_request_id
    return any(name == known and fact.at - at <= EARLY_CANCEL_S for known, at in ctx.cancelled_ids)


def an_unload_came_after(ctx: Context, fact: LoadRequested) -> bool:
    """It was asked for before an unload that has been answered: the caller said stop last.

    Tickets count the calls in the order they were made; looking a model up on disk takes longer
    for one load than for another, so loads may arrive here in another order.
    """
    return any(fact.ticket < at and is_named(fact.target, model) for model, at in ctx.unloads)


def a_newer_load_came_first(ctx: Context, fact: LoadRequested) -> bool:
    """A load that was asked for later has been accepted already: the last Apply wins."""
    return fact.ticket < ctx.newest_load and fact.target.request.on_busy == "supersede"


def same_as_newest(ctx: Context, fact: LoadRequested) -> bool:
    """The newest load somebody wants is for the same target."""
    return bool(ctx.wanted) and is_same(ctx, ctx.wanted[-1], fact.target)


def same_as_loading(ctx: Context, fact: LoadRequested) -> bool:
    """The load in flight is for the same target, though newer ones wait behind it."""
    return ctx.job is not None and ctx.job.token is None and is_same(ctx, ctx.job, fact.target)


def same_as_running(ctx: Context, fact: LoadRequested) -> bool:
    return _is_this(ctx, ctx.running, fact.target)


def rejects_when_busy(ctx: Context, fact: LoadRequested) -> bool:
    return bool(ctx.wanted) and fact.target.request.on_busy == "reject"


def queues_when_busy(ctx: Context, fact: LoadRequested) -> bool:
    return bool(ctx.wanted) and fact.target.request.on_busy == "queue"


def too_many_wait(ctx: Context, fact: LoadRequested) -> bool:
    return fact.target.request.on_busy == "queue" and len(ctx.queue) >= ctx.policy.max_waiting


def too_many_prefetch(ctx: Context, fact: LoadRequested | PrefetchRequested) -> bool:
    """It would be one more download beside what loads or runs; what it supersedes makes room."""
    request = fact.target.request
    stays = () if isinstance(fact, LoadRequested) and request.on_busy == "supersede" else ctx.queue
    waiting = sum(job.awaits is not None and job.target.request.prefetch for job in stays)
    is_one_more = isinstance(fact, PrefetchRequested) or (
        request.prefetch and not (fact.target.model.is_settled and fact.target.model.is_on_disk)
    )
    return is_one_more and waiting + len(ctx.prefetches) >= ctx.policy.max_prefetches


def asks_first(ctx: Context, fact: LoadRequested) -> bool:
    """Nothing is stopped for it before the Hub has said that its model may be had."""
    return awaited_by(fact.target) is not None


def same_as_prefetch(ctx: Context, fact: PrefetchRequested) -> bool:
    """The same model is being fetched already."""
    return fetches_the_same(ctx, fact.target) is not None


def next_is_running(ctx: Context, fact: Promoted) -> bool:
    """The load that waited asks for what is running by now."""
    return bool(ctx.queue) and _is_this(ctx, ctx.running, ctx.queue[0].target)


def names_another_model(ctx: Context, fact: UnloadRequested) -> bool:
    """The unload is for a model that is neither running nor wanted."""
    targets = [job.target for job in ctx.wanted]
    targets += [known.target for known in (ctx.running, ctx.recovery) if known is not None]
    return fact.model is not None and not any(is_named(target, fact.model) for target in targets)


def names_only_what_waits(ctx: Context, fact: UnloadRequested) -> bool:
    """What loads or runs is another model and stays: the slot will not be empty for this unload."""
    if ctx.job is not None:
        return ctx.job.token is None and not is_named(ctx.job.target, fact.model)
    return ctx.running is not None and not is_named(ctx.running.target, fact.model)


def cancels_job(ctx: Context, fact: CancelRequested) -> bool:
    """It ends the load in flight for everybody who waits for it."""
    return ctx.job is not None and cancels(ctx.job, fact)


def cancels_callers(ctx: Context, fact: CancelRequested) -> bool:
    """It means a queued load or a prefetch, or some of those who joined one."""
    return any(cancels(job, fact) for job in (*ctx.queue, *ctx.prefetches)) or any(
        is_meant(job, caller, fact)
        for job in (*ctx.wanted, *ctx.prefetches)
        for caller in job.callers
    )


def abandons_job(ctx: Context, fact: Withdrawn) -> bool:
    """The last caller of the load in flight has gone, and nobody else wants it."""
    return (
        ctx.policy.abandoned_load == "cancel"
        and ctx.job is not None
        and ctx.job.after is None
        and tuple(caller.ticket for caller in ctx.job.callers) == (fact.ticket,)
    )


def gives_back_the_last_lease(ctx: Context, fact: LeaseReleased | Withdrawn) -> bool:
    return ctx.leases == {fact.ticket}


def is_draining_this(ctx: Context, fact: TimerFired) -> bool:
    """The timer belongs to the server that is being drained now, not to an earlier one."""
    return (
        ctx.effect is None
        and bool(ctx.leases)
        and ctx.child is not None
        and ctx.child.generation == fact.generation
    )


def is_idle(ctx: Context, fact: TimerFired) -> bool:
    """Nobody uses the server this timer was set for, no other is due, and it may be stopped for
    that.
    """
    return (
        ctx.running is not None
        and ctx.running.generation == fact.generation
        and ctx.running.idle_at is not None
        and not ctx.leases
        and not ctx.is_due
    )


def is_job(ctx: Context, fact: TimerFired) -> bool:
    return ctx.job is not None and ctx.job.token is None and ctx.job.generation == fact.generation


def is_queued_job(ctx: Context, fact: TimerFired) -> bool:
    return find(ctx.queue, fact.generation) is not None


# -------------------------------------------------------------------- making a failure good


def restores_previous(ctx: Context, fact: Fact) -> bool:
    """The load in flight has failed and is to be followed by what ran before it."""
    return (
        ctx.job is not None
        and ctx.job.token is None
        and ctx.job.target.request.restore_previous
        and ctx.previous is not None
        and not ctx.is_due
    )


def is_due_restart(ctx: Context, fact: TimerFired) -> bool:
    """The restart this timer was set for is still planned."""
    recovery = ctx.recovery
    return (
        recovery is not None
        and recovery.phase == "waiting"
        and recovery.generation == fact.generation
    )


def restart_is_planned(ctx: Context, fact: LeaseRequested) -> bool:
    return ctx.recovery is not None and ctx.recovery.phase == "waiting"


def is_cooling_down(ctx: Context, fact: LoadRequested | LeaseRequested) -> bool:
    """It has failed too often in a row: nothing is started by itself, nor as it was."""
    recovery = ctx.recovery
    return recovery is not None and recovery.phase == "cooling_down" and fact.at < recovery.until


def same_as_failing(ctx: Context, fact: LoadRequested) -> bool:
    """It asks for just what failed too often. Other settings may do better; force is force."""
    return _is_this(ctx, ctx.recovery, fact.target)


def _is_this(ctx: Context, known: Running | Recovery | None, wanted: Target) -> bool:
    """Does it want just what is known, and not anew?"""
    if known is None or wanted.request.force_reload:
        return False
    return not differences(known.target, wanted.inheriting(dict(ctx.committed_args)))


# ------------------------------------------------------------- shared with actions, not guards


def find(jobs: Iterable[Job], generation: Generation) -> Job | None:
    return next((job for job in jobs if job.generation == generation), None)


def awaited_by(target: Target) -> Literal["answer", "files"] | None:
    """What a load has to wait for before it may have its turn."""
    if not target.model.is_settled:
        return "answer"
    return "files" if target.request.prefetch and not target.model.is_on_disk else None


def fetches_the_same(ctx: Context, target: Target) -> Job | None:
    """Return the prefetch of the same files."""
    return next((job for job in ctx.prefetches if is_same_model(job.target, target)), None)


def is_same(ctx: Context, job: Job, target: Target) -> bool:
    """Would `target` run exactly what `job` is about to run?

    Omitted extra args mean "as they are", so a duplicate that omits them is still a duplicate.
    """
    committed = dict(ctx.committed_args)
    ours = job.target.inheriting(committed)
    return not differences(ours, target.inheriting({**committed, ours.source: ours.extra_args}))


def is_named(target: Target, model: str | None) -> bool:
    """Does an unload of `model` mean this target? None means any."""
    return model is None or target.is_called(model)


def cancels(job: Job, fact: CancelRequested) -> bool:
    """Does the cancel end this load, for everybody who waits for it?"""
    if job.token is not None:
        return False
    if fact.generation is not None:
        return job.generation == fact.generation
    is_all = bool(job.callers) and all(is_meant(job, caller, fact) for caller in job.callers)
    return is_all and job.after is None


def is_meant(job: Job, caller: Caller, fact: CancelRequested) -> bool:
    """Does the cancel name this load, or the id of this caller, whose own load has not ended?"""
    if fact.generation is not None:
        return job.generation == fact.generation
    is_named = fact.request_id is not None and caller.request_id == fact.request_id
    return is_named and caller.failure is None
