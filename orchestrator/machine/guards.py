"""Guards of the table: pure predicates `(context, fact) -> bool`.

The annotation of `fact` lists the facts that a guard may be used with; a test compares it with the
table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.machine import facts
from orchestrator.machine.context import Caller, Context, Job, LookUp, Running
from orchestrator.machine.recovery import Recovery
from orchestrator.settings.target import Target, differences, is_same_model, keeps_commit

EARLY_CANCEL_S = 60.0  # how long a cancel that arrived before its load is remembered
MAX_VERIFICATIONS = 3  # how often a load empties an occupied slot again before it fails


# --------------------------------------------------------------------- completions and exits
def slot_is_empty(ctx: Context, fact: facts.Fetched) -> bool:
    return fact.slot.is_empty


def token_is_unset(ctx: Context, fact: facts.Completion) -> bool:
    """The load in flight has not been cancelled, superseded or timed out."""
    return ctx.loading is not None


def is_current(ctx: Context, fact: facts.Completion) -> bool:
    """It completes the effect in flight; any other completion is stale."""
    effect = ctx.effect
    return effect is not None and (effect.kind, effect.generation) == (fact.effect, fact.generation)


def child_is_alive(ctx: Context, fact: facts.WithChildEvidence) -> bool:
    return fact.child_is_alive


def may_verify_again(ctx: Context, fact: facts.Fetched) -> bool:
    return ctx.job is not None and ctx.job.attempts < MAX_VERIFICATIONS


def is_kept_for_us(ctx: Context, fact: facts.Found) -> bool:
    """Its keeper says what it was started with; the probe compares that with what is on disk."""
    return fact.child is not None and fact.target is not None


def is_adoption(ctx: Context, fact: facts.BecameReady | facts.NotReady) -> bool:
    """The server was found, and the load in flight has not been cancelled, superseded or ended."""
    return ctx.loading is not None and ctx.loading.is_adoption


def keeps_server(ctx: Context, fact: facts.ShutdownRequested) -> bool:
    return ctx.policy.keeps_server and fact.keep and fact.can_be_kept


def next_is_due(ctx: Context, fact: facts.Completion | facts.Promoted | facts.TimerFired) -> bool:
    return ctx.is_due


def is_awaited(ctx: Context, fact: facts.Resolved | facts.Fetched | facts.FetchFailed) -> bool:
    """A load in the queue waits for exactly this."""
    job = find(ctx.queue, fact.generation)
    awaits = job.awaits if job is not None else None
    if isinstance(fact, facts.FetchFailed):
        return awaits is not None
    return awaits == ("files" if isinstance(fact, facts.Fetched) else "answer")


def is_prefetch(ctx: Context, fact: facts.Fetched | facts.FetchFailed | facts.TimerFired) -> bool:
    return find(ctx.prefetches, fact.generation) is not None


def is_child(ctx: Context, fact: facts.Exited | facts.Hung) -> bool:
    return ctx.child is not None and ctx.child.pid == fact.exit.pid


def was_found_dead(ctx: Context, fact: facts.Exited) -> bool:
    """It was dead before the kill began."""
    return ctx.child_end == "found"


# ---------------------------------------------------------------------------------- requests
def is_shutting_down(ctx: Context, fact: facts.LookUpRequested | facts.LeaseRequested) -> bool:
    return ctx.is_shutting_down


def was_cancelled_early(ctx: Context, fact: facts.LookUpRequested) -> bool:
    """Its cancel arrived first."""
    name = fact.request.load_request_id
    return any(name == known and fact.at - at <= EARLY_CANCEL_S for known, at in ctx.cancelled_ids)


def look_ups_are_full(ctx: Context, fact: facts.LookUpRequested) -> bool:
    return len(ctx.look_ups) >= ctx.policy.max_looking


def is_looked_up(ctx: Context, fact: facts.LookUpFailed) -> bool:
    return look_up_of(ctx, fact.ticket) is not None


def look_up_has_ended(ctx: Context, fact: facts.ModelRequested) -> bool:
    """The call was cancelled, superseded or withdrawn, or its time was up, during the look-up."""
    return look_up_of(ctx, fact.ticket) is None


def look_up_is_late(ctx: Context, fact: facts.TimerFired) -> bool:
    return look_up_of(ctx, Ticket(fact.generation)) is not None


def model_is_local(ctx: Context, fact: facts.PrefetchRequested) -> bool:
    return fact.target.model.hub is None


def was_unloaded_since(ctx: Context, fact: facts.LoadRequested) -> bool:
    """An unload that was called after this load has been processed already.

    Tickets follow the order of calls, facts may arrive in another one. An unload that names a model
    in other words than the load does not end its look-up.
    """
    return any(fact.ticket < at and is_named(fact.target, model) for model, at in ctx.unloads)


def newer_load_was_accepted(ctx: Context, fact: facts.LoadRequested) -> bool:
    """A load that was called after this one has been accepted already, and the last call wins."""
    return fact.ticket < ctx.newest_load and fact.target.request.on_busy == "supersede"


def matches_newest(ctx: Context, fact: facts.LoadRequested) -> bool:
    return bool(ctx.wanted) and is_same(ctx, ctx.wanted[-1], wanted_by(ctx, fact))


def matches_job(ctx: Context, fact: facts.LoadRequested) -> bool:
    return ctx.loading is not None and is_same(ctx, ctx.loading, wanted_by(ctx, fact))


def matches_running(ctx: Context, fact: facts.LoadRequested) -> bool:
    return _matches(ctx, ctx.running, wanted_by(ctx, fact))


def rejects_when_busy(ctx: Context, fact: facts.LoadRequested) -> bool:
    return bool(ctx.wanted) and fact.target.request.on_busy == "reject"


def queues_when_busy(ctx: Context, fact: facts.LoadRequested) -> bool:
    return bool(ctx.wanted) and fact.target.request.on_busy == "queue"


def queue_is_full(ctx: Context, fact: facts.LoadRequested) -> bool:
    return fact.target.request.on_busy == "queue" and len(ctx.queue) >= ctx.policy.max_waiting


def prefetches_are_full(ctx: Context, fact: facts.ModelRequested) -> bool:
    """It needs one download too many, not counting those of the loads that it supersedes."""
    is_load = isinstance(fact, facts.LoadRequested)
    target = wanted_by(ctx, fact) if isinstance(fact, facts.LoadRequested) else fact.target
    request, model = target.request, target.model
    queued = () if is_load and request.on_busy == "supersede" else ctx.queue
    waiting = sum(job.awaits is not None and job.target.request.prefetch for job in queued)
    is_one_more = not is_load or (request.prefetch and not (model.is_settled and model.is_on_disk))
    return is_one_more and waiting + len(ctx.prefetches) >= ctx.policy.max_prefetches


def awaits_model(ctx: Context, fact: facts.LoadRequested) -> bool:
    """Its model must be resolved, or downloaded, before anything is stopped for it."""
    return awaited_by(wanted_by(ctx, fact)) is not None


def matches_prefetch(ctx: Context, fact: facts.PrefetchRequested) -> bool:
    return prefetch_of(ctx, fact.target) is not None


def next_is_running(ctx: Context, fact: facts.Promoted) -> bool:
    """By now the server runs what the next load requests."""
    return bool(ctx.queue) and _matches(ctx, ctx.running, ctx.queue[0].target)


def names_absent_model(ctx: Context, fact: facts.UnloadRequested) -> bool:
    """The unload names a model that is neither running, nor wanted, nor being looked up."""
    targets = [job.target for job in ctx.wanted]
    targets += [known.target for known in (ctx.running, ctx.recovery) if known is not None]
    return fact.model is not None and not (
        any(is_named(target, fact.model) for target in targets) or unloaded_look_ups(ctx, fact)
    )


def names_only_queued(ctx: Context, fact: facts.UnloadRequested) -> bool:
    """Another model loads or runs, and stays: this unload does not empty the slot."""
    if ctx.job is not None:
        return ctx.loading is not None and not is_named(ctx.job.target, fact.model)
    return ctx.running is not None and not is_named(ctx.running.target, fact.model)


def cancels_job(ctx: Context, fact: facts.CancelRequested) -> bool:
    """It cancels the load in flight for all its callers."""
    return ctx.job is not None and cancels(ctx.job, fact)


def cancels_callers(ctx: Context, fact: facts.CancelRequested) -> bool:
    """It cancels a queued load, a prefetch, a look-up, or some of the callers of any load."""
    return (
        any(is_looked_up_as(look_up, fact) for look_up in ctx.look_ups)
        or any(cancels(job, fact) for job in (*ctx.queue, *ctx.prefetches))
        or any(
            is_meant(job, caller, fact)
            for job in (*ctx.wanted, *ctx.prefetches)
            for caller in job.callers
        )
    )


def job_is_wanted(ctx: Context, fact: facts.Emptied) -> bool:
    return ctx.loading is not None


def load_is_wanted(ctx: Context, fact: facts.LeaseRequested) -> bool:
    return bool(ctx.wanted)


def abandons_job(ctx: Context, fact: facts.Withdrawn) -> bool:
    """The last caller of the load in flight has gone, and the policy is to cancel it."""
    return (
        ctx.policy.abandoned_load == "cancel"
        and ctx.job is not None
        and not ctx.job.is_own
        and tuple(caller.ticket for caller in ctx.job.callers) == (fact.ticket,)
    )


# ------------------------------------------------------------------------------------ timers
def is_current_drain(ctx: Context, fact: facts.TimerFired | facts.Drained) -> bool:
    """It is about the server being drained, not about an earlier one."""
    return (
        ctx.gate == "draining" and ctx.child is not None and ctx.child.generation == fact.generation
    )


def is_idle(ctx: Context, fact: facts.TimerFired) -> bool:
    """The server of this timer has not been used for its idle time, and no load is due."""
    return fact.idle_in_s == 0.0 and not ctx.is_due


def is_used(ctx: Context, fact: facts.TimerFired) -> bool:
    """The server of this timer is in use, or was until a moment ago."""
    return bool(fact.idle_in_s)


def is_job(ctx: Context, fact: facts.TimerFired | facts.Sized) -> bool:
    return ctx.loading is not None and ctx.loading.generation == fact.generation


def is_queued_job(ctx: Context, fact: facts.TimerFired) -> bool:
    return find(ctx.queue, fact.generation) is not None


# -------------------------------------------------------------------- restore and restart
def restores_previous(ctx: Context, fact: facts.Fact) -> bool:
    """The previous model is restored if the load in flight fails."""
    return (
        ctx.loading is not None
        and ctx.loading.target.request.restore_previous
        and ctx.previous is not None
        and not ctx.is_due
    )


def is_due_restart(ctx: Context, fact: facts.TimerFired) -> bool:
    """The restart of this timer is still planned."""
    known = ctx.recovery
    return known is not None and known.phase == "waiting" and known.generation == fact.generation


def restart_is_planned(ctx: Context, fact: facts.LeaseRequested) -> bool:
    return ctx.recovery is not None and ctx.recovery.phase == "waiting"


def is_cooling_down(ctx: Context, fact: facts.LoadRequested | facts.LeaseRequested) -> bool:
    recovery = ctx.recovery
    return recovery is not None and recovery.phase == "cooling_down" and fact.at < recovery.until


def matches_failing(ctx: Context, fact: facts.LoadRequested) -> bool:
    """It requests exactly what failed too often, and does not force it."""
    return _matches(ctx, ctx.recovery, wanted_by(ctx, fact))


def _matches(ctx: Context, known: Running | Recovery | None, wanted: Target) -> bool:
    if known is None or wanted.request.force_reload:
        return False
    return not differences(known.target, wanted.inheriting(dict(ctx.committed_args)))


# ------------------------------------------------------------- helpers, shared with actions
def find(jobs: Iterable[Job], generation: Generation) -> Job | None:
    return next((job for job in jobs if job.generation == generation), None)


def look_up_of(ctx: Context, ticket: Ticket) -> LookUp | None:
    return next((look_up for look_up in ctx.look_ups if look_up.ticket == ticket), None)


def older_look_ups(ctx: Context, ticket: Ticket) -> list[LookUp]:
    """Return the look-ups of loads that were called before this call."""
    return [one for one in ctx.look_ups if one.purpose == "load" and one.ticket < ticket]


def unloaded_look_ups(ctx: Context, unload: facts.UnloadRequested) -> list[LookUp]:
    """Return the look-ups of older loads that the unload names in the same words, or all."""
    older = older_look_ups(ctx, unload.ticket)
    return [one for one in older if unload.model in (None, one.request.model_path)]


def wanted_by(ctx: Context, load: facts.LoadRequested) -> Target:
    """Return the target of a load. What runs keeps its commit, as long as it runs."""
    running, kept = ctx.running, load.kept
    if (
        running is not None
        and kept is not None
        and kept.hub == running.target.model.hub
        and keeps_commit(running.target, load.target.request)
    ):
        return replace(load.target, model=kept)
    return load.target


def awaited_by(target: Target) -> Literal["answer", "files"] | None:
    """Return what a load must wait for in the queue."""
    if not target.model.is_settled:
        return "answer"
    return "files" if target.request.prefetch and not target.model.is_on_disk else None


def prefetch_of(ctx: Context, target: Target) -> Job | None:
    return next((job for job in ctx.prefetches if is_same_model(job.target, target)), None)


def is_same(ctx: Context, job: Job, target: Target) -> bool:
    """Return whether `target` would run exactly what `job` is about to run.

    Omitted extra args are inherited, so a duplicate may omit them.
    """
    committed = dict(ctx.committed_args)
    ours = job.target.inheriting(committed)
    return not differences(ours, target.inheriting({**committed, ours.source: ours.extra_args}))


def is_named(target: Target, model: str | None) -> bool:
    """Return whether an unload of `model` applies; None applies to any target."""
    return model is None or target.is_called(model)


def cancels(job: Job, fact: facts.CancelRequested) -> bool:
    """Return whether the cancel ends this load for all its callers."""
    if job.token is not None or job.is_adoption:  # a cancel ends no server that runs
        return False
    if fact.generation is not None:
        return job.generation == fact.generation
    is_all = bool(job.callers) and all(_is_meant_by_id(caller, fact) for caller in job.callers)
    return is_all and job.after is None


def is_looked_up_as(look_up: LookUp, fact: facts.CancelRequested) -> bool:
    """Return whether the cancel names the call of this look-up."""
    return fact.request_id is not None and look_up.request.load_request_id == fact.request_id


def is_meant(job: Job, caller: Caller, fact: facts.CancelRequested) -> bool:
    """Return whether the cancel names this load, or a caller of it that has no failure yet."""
    if fact.generation is not None:
        return job.generation == fact.generation
    return _is_meant_by_id(caller, fact)


def _is_meant_by_id(caller: Caller, fact: facts.CancelRequested) -> bool:
    is_same_id = fact.request_id is not None and caller.request_id == fact.request_id
    return is_same_id and caller.failure is None
