"""What the callers are promised, whatever else happens: the contract as `inv_*` predicates.

Each returns None, or one sentence that says which promise was broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    Accept,
    CancelAnswer,
    Done,
    DropStale,
    LeaseGranted,
    Loaded,
    Settle,
    Unloaded,
)
from orchestrator.machine.facts import (
    Exited,
    LeaseRequested,
    LoadRequested,
    ShutdownRequested,
    TimerFired,
    UnloadRequested,
)
from orchestrator.machine.states import State
from orchestrator.settings.target import Target, differences
from tests.kit.machine.observed import Edge, World, answers, category, has_changed, is_known

# ------------------------------------------------------------------------------ in every world


def inv_every_load_has_a_caller(world: World) -> str | None:
    """A load goes on while anyone, or the policy, still wants it; no longer."""
    if world.ctx.policy.abandoned_load == "cancel":
        for job in world.ctx.wanted:
            if not job.callers and job.after is None:
                return f"load {job.generation} goes on, and nobody wants it"
    for job in world.ctx.prefetches:
        if not job.callers:
            return f"prefetch {job.generation} goes on, and nobody wants it"
    return None


def inv_a_lease_has_a_holder(world: World) -> str | None:
    """A lease that was given back, or whose holder went away, holds up no drain."""
    left = world.ctx.leases - world.holding
    return f"the lease of call {min(left)} counts, but nobody holds it" if left else None


def inv_after_a_shutdown_nothing_is_wanted(world: World) -> str | None:
    """The latch: no load and no lease, from the shutdown on."""
    if world.was_shut_down and (world.ctx.wanted or world.ctx.prefetches or world.ctx.leases):
        return "after the shutdown a load is wanted or a lease is held"
    return None


def inv_at_rest_all_are_answered(world: World) -> str | None:
    """Every call is answered in the end."""
    if world.is_quiescent and world.unanswered:
        return f"nothing more will happen, and call {min(world.unanswered)} has no answer"
    return None


# ------------------------------------------------------------------------------ at every step


def inv_answered_once(edge: Edge) -> str | None:
    """A call is answered once; a caller that has gone away is not answered any more."""
    tickets = [c.ticket for c in edge.commands if isinstance(c, Settle)]
    for ticket in tickets:
        is_own = ticket == getattr(edge.fact, "ticket", None)
        if tickets.count(ticket) > 1 or not (is_own or ticket in edge.before.unanswered):
            return f"call {ticket} is answered again"
    return None


def inv_an_end_before_the_commit_wins(edge: Edge) -> str | None:
    """A load that was cancelled, unloaded or withdrawn is never answered `loaded`."""
    for settle in edge.commands:
        if (
            isinstance(settle, Settle)
            and isinstance(settle.answer, Loaded)
            and settle.ticket in edge.before.ended
        ):
            return f"call {settle.ticket} was ended and is answered 'loaded'"
    return None


def inv_cancelled_only_if_asked(edge: Edge) -> str | None:
    """A cancel or an unload touches only what it means: nobody else hears `cancelled`."""
    for settle in edge.commands:
        if (
            isinstance(settle, Settle)
            and isinstance(settle.answer, Problem)
            and settle.answer.category == "cancelled"
            and settle.ticket not in edge.before.ended
        ):
            return f"call {settle.ticket} is answered 'cancelled', and nobody asked for that"
    return None


def inv_loaded_is_what_was_asked(edge: Edge) -> str | None:
    """`loaded` names a server that lives, runs what was asked, and is fresh if that was asked."""
    for settle in edge.commands:
        if not isinstance(settle, Settle) or not isinstance(settle.answer, Loaded):
            continue
        answer, asked = settle.answer, edge.after.asked[settle.ticket].request
        pids = {p.pid: p.model for p in edge.before.alive}
        if answer.child.pid not in pids:
            return f"call {settle.ticket} is answered with pid {answer.child.pid}, which is dead"
        if pids[answer.child.pid] != asked.model_path:
            return f"call {settle.ticket} asked for {asked.model_path} and got another model"
        if answer.already and asked.force_reload:
            return f"call {settle.ticket} asked for a reload and is told 'already loaded'"
    return None


def inv_an_older_call_never_wins(edge: Edge) -> str | None:
    """Tickets count the calls as they were made: one made earlier ends nothing made later, unless
    whoever made that has gone away.
    """
    fact, newer = edge.fact, _newer(edge)
    if not isinstance(fact, LoadRequested):
        return None
    said = answers(edge)
    if later := [ticket for ticket in said if ticket > fact.ticket]:
        return f"call {fact.ticket} ends the newer call {later[0]}"
    if category(said.get(fact.ticket)) == "superseded" and not newer:
        return f"call {fact.ticket} is the newest and is told that it was superseded"
    is_fresh = any(not is_known(c, edge.before) for c in edge.commands if isinstance(c, Accept))
    if edge.before.ctx.policy.abandoned_load == "cancel":
        newer = [ticket for ticket in newer if ticket not in edge.before.ended]  # left it
    if is_fresh and newer and fact.target.request.on_busy == "supersede":
        return f"call {fact.ticket} starts a load though call {max(newer)} came later"
    return None


def inv_superseded_at_once(edge: Edge) -> str | None:
    """A newer different load ends every older one, whose callers hear so in the same step."""
    fact = edge.fact
    accepts = [c for c in edge.commands if isinstance(c, Accept)]
    if not isinstance(fact, LoadRequested) or not accepts:
        return None
    if fact.target.request.on_busy != "supersede":
        return None
    said = answers(edge)
    is_fresh = not is_known(accepts[0], edge.before)
    for job in edge.before.ctx.wanted:
        is_newer = any(caller.ticket > fact.ticket for caller in job.callers)
        if is_newer or not (is_fresh or job.generation > accepts[0].generation):
            continue
        for caller in job.callers:
            said_to = said.get(caller.ticket)
            if isinstance(said_to, Problem) and caller.failure is not None and said_to.restored:
                said_to = said_to.restored.problem  # of its own load it knows already
            if category(said_to) != "superseded":
                return f"call {caller.ticket} is not told at once that it was superseded"
    if is_fresh and len(edge.after.ctx.wanted) != 1:
        return f"{len(edge.after.ctx.wanted)} loads are wanted after one superseded all others"
    return None


def inv_the_same_is_shared(edge: Edge) -> str | None:
    """The same as the newest wanted load, or as the one in flight, joins it; the same as what
    runs is already loaded.
    """
    fact, ctx = edge.fact, edge.before.ctx
    ended = {"cancelled", "shutting_down"}  # others judge that
    if not isinstance(fact, LoadRequested) or category(answers(edge).get(fact.ticket)) in ended:
        return None
    request = fact.target.request
    candidates = ctx.wanted[-1:]
    if request.on_busy == "supersede" and ctx.job in ctx.wanted:
        candidates = (*candidates, *ctx.wanted[:1])
    same = [job for job in candidates if not differences(job.target, fact.target)]
    if same:
        if Accept(fact.ticket, same[0].generation, joined=True) not in edge.commands:
            return f"call {fact.ticket} does not join load {same[0].generation}, the same one"
    elif not ctx.wanted and _runs(edge.before, fact.target) and not request.force_reload:
        own = answers(edge).get(fact.ticket)
        if not (isinstance(own, Loaded) and own.already):
            return f"call {fact.ticket} asks for what runs and is not told `already loaded`"
    return None


def inv_on_busy_is_honoured(edge: Edge) -> str | None:
    """`reject` and `queue` leave what is in flight alone; `busy` is said only where it is."""
    fact = edge.fact
    if not isinstance(fact, LoadRequested) or _is_turned_away(edge, fact):
        return None
    wanted, on_busy = edge.before.ctx.wanted, fact.target.request.on_busy
    is_busy = bool(wanted) and bool(differences(wanted[-1].target, fact.target))
    is_told_busy = category(answers(edge).get(fact.ticket)) == "busy"
    if is_told_busy and _is_full(edge.before, fact):
        return None
    if is_told_busy != (is_busy and on_busy == "reject"):
        return f"call {fact.ticket} said `{on_busy}` and is {'' if is_told_busy else 'not '}busy"
    left = {job.generation for job in edge.after.ctx.wanted}
    if is_busy and on_busy == "queue" and not left >= {job.generation for job in wanted}:
        return f"call {fact.ticket} said `queue` and ends another load"
    return None


def _is_full(world: World, fact: LoadRequested) -> bool:
    """The queue, or what is fetched beside it, has reached its bound."""
    ctx, request = world.ctx, fact.target.request
    waits = request.on_busy == "queue" and len(ctx.queue) >= ctx.policy.max_waiting
    fetching = [job for job in ctx.queue if job.awaits and job.target.request.prefetch]
    at_once = len(fetching) + len(ctx.prefetches)
    return waits or (request.prefetch and at_once >= ctx.policy.max_prefetches)


def inv_shutting_down_is_said_after_a_shutdown(edge: Edge) -> str | None:
    """And only then."""
    for ticket, answer in answers(edge).items():
        if category(answer) == "shutting_down" and not edge.after.was_shut_down:
            return f"call {ticket} is refused for a shutdown that nobody asked for"
    return None


def inv_a_lease_is_on_a_live_server(edge: Edge) -> str | None:
    """A lease on a corpse is a request that fails."""
    pids = {process.pid for process in edge.before.alive}
    for ticket, answer in answers(edge).items():
        if isinstance(answer, LeaseGranted) and answer.child.pid not in pids:
            return f"call {ticket} is given a lease on pid {answer.child.pid}, which is dead"
    return None


def inv_a_lease_is_granted_where_it_can_be(edge: Edge) -> str | None:
    """At once on a live Healthy server; refused only where no load is on its way."""
    fact, ctx = edge.fact, edge.before.ctx
    if not isinstance(fact, LeaseRequested):
        return None
    answer = answers(edge).get(fact.ticket)
    is_alive = any(ctx.child and process.pid == ctx.child.pid for process in edge.before.alive)
    if edge.before.state is State.HEALTHY and is_alive and not isinstance(answer, LeaseGranted):
        return f"call {fact.ticket} gets no lease on a server that is Healthy and alive"
    if ctx.wanted and isinstance(answer, Problem):
        return f"call {fact.ticket} gets no lease though a load is on its way"
    return None


def inv_a_cancel_waits_for_no_lease(edge: Edge) -> str | None:
    """A cancel settles within the kill ladder's own bound; a drain may take much longer."""
    ctx = edge.after.ctx
    if edge.after.state is State.KILLING and ctx.effect is None:
        for waiter in ctx.waiters:
            if isinstance(waiter.answer, CancelAnswer):
                return f"the cancel of call {waiter.ticket} waits until the leases are given back"
    return None


def inv_refused_changes_nothing(edge: Edge) -> str | None:
    """A fact that is fenced, or a request that is refused, leaves the world as it was."""
    refused = any(isinstance(c, DropStale) for c in edge.commands)
    if isinstance(edge.fact, LoadRequested):
        own = [c for c in edge.commands if isinstance(c, Settle) and c.ticket == edge.fact.ticket]
        refused = any(isinstance(c.answer, Problem) for c in own)
    if any(isinstance(c, Settle) and c.answer == Unloaded(changed=False) for c in edge.commands):
        now = edge.after.ctx  # it is remembered, and that model does not come back either
        before = replace(edge.before.ctx, unloads=now.unloads, previous=now.previous)
        refused = before != edge.after.ctx or edge.before.state is not edge.after.state
    if refused and (has_changed(edge) or len(edge.commands) != 1):
        return f"{edge.fact.trigger} is refused and changes something all the same"
    return None


def inv_unloaded_is_empty(edge: Edge) -> str | None:
    """`unloaded` and `done` are said when nothing of the slot is alive; of what waited behind
    another model, when nothing of it is.
    """
    fact = edge.fact
    for ticket, answer in answers(edge).items():
        if answer not in (Unloaded(), Done()):
            continue
        servers = [process for process in edge.before.alive if process.generation]
        if isinstance(fact, UnloadRequested) and fact.ticket == ticket and fact.model:
            servers = [process for process in servers if process.model == fact.model]
        if servers:
            alive = [process.pid for process in servers]
            return f"call {ticket} is told the slot is empty, but {alive} is alive"
    return None


def inv_an_unload_ends_only_what_it_names(edge: Edge) -> str | None:
    """Another model's load goes on, and another model's server serves on."""
    fact, running = edge.fact, edge.before.ctx.running
    if not isinstance(fact, UnloadRequested) or fact.model is None:
        return None
    left = {job.generation for job in edge.after.ctx.wanted}
    for job in edge.before.ctx.wanted:
        if job.generation not in left and not job.target.is_called(fact.model):
            return f"load {job.generation} is ended by an unload of {fact.model}"
    is_stopped = edge.before.state is State.HEALTHY is not edge.after.state
    if is_stopped and running is not None and not running.target.is_called(fact.model):
        return f"a healthy server is stopped by an unload of {fact.model}, which it is not"
    return None


def inv_a_server_is_stopped_for_a_reason(edge: Edge) -> str | None:
    """It serves until somebody says so, something else is wanted, it ends, or nobody uses it."""
    fact, is_stopped = edge.fact, edge.before.state is State.HEALTHY is not edge.after.state
    if not is_stopped or edge.after.ctx.job is not None:
        return None
    is_said = isinstance(fact, UnloadRequested | ShutdownRequested | Exited)
    if is_said or (isinstance(fact, TimerFired) and fact.kind == "idle"):
        return None
    return f"a healthy server is stopped by {fact.trigger}, and nobody wants another"


def inv_restored_is_what_runs(edge: Edge) -> str | None:
    """Who is told that the previous model is back is told so when it is Healthy."""
    for ticket, answer in answers(edge).items():
        if not isinstance(answer, Problem) or answer.restored is None or answer.restored.problem:
            continue
        running, model = edge.after.ctx.running, answer.restored.model_path
        if edge.after.state is not State.HEALTHY or running is None:
            return f"call {ticket} is told that {model} is back, in {edge.after.state}"
        models = {process.pid: process.model for process in edge.before.alive}
        if models.get(running.child.pid) != model:
            return f"call {ticket} is told that {model} is back, and something else runs"
    return None


def inv_what_ran_comes_back(edge: Edge) -> str | None:
    """A replacement that fails is followed by what it replaced, if that was asked for."""
    before, after, job = edge.before.ctx, edge.after.ctx, edge.before.ctx.job
    is_failure = edge.fact.trigger in {"fetch_failed", "spawn_failed", "not_ready"}
    is_failure = is_failure and edge.commands != (_fence(edge),)
    is_failure = is_failure or edge.fact.trigger == "deadline_expired"
    if job is None or job.token is not None or not is_failure:
        return None
    gone = after.job is None or after.job.generation != job.generation or after.job.token
    if not gone or not job.target.request.restore_previous or before.previous is None:
        return None
    follows = after.wanted[0] if after.wanted else None
    if before.is_due:
        is_next = follows is not None and follows.generation == before.queue[0].generation
        return None if is_next else "a queued load is passed over"
    if follows is None or differences(follows.target, before.previous):
        return f"load {job.generation} failed, and what ran before does not come back"
    return None


def inv_what_ran_comes_back_for_a_failure_only(edge: Edge) -> str | None:
    """A load that goes on is not to be replaced by what it replaces."""
    before, after = edge.before.ctx, edge.after.ctx
    known = {job.generation for job in (before.job, *before.queue) if job}
    own = [job for job in (after.job, *after.queue) if job and job.after is not None]
    if edge.fact.trigger == "restart_due" or all(job.generation in known for job in own):
        return None
    goes_on = before.job is not None and before.job.generation in {
        job.generation for job in after.wanted
    }
    return "what ran before comes back, and the load in flight goes on" if goes_on else None


def inv_nothing_comes_back_after_an_end(edge: Edge) -> str | None:
    """An unload or a shutdown means nothing runs: nothing is brought back or started again."""
    fact, ctx = edge.fact, edge.after.ctx
    is_end = isinstance(fact, ShutdownRequested) or (
        isinstance(fact, UnloadRequested) and fact.model is None
    )
    if is_end and (ctx.previous or ctx.recovery or ctx.wanted):
        return f"after the {fact.trigger} something is still to be started"
    return None


def inv_restarts_are_bounded(world: World) -> str | None:
    """By the policy, not beyond its limit, and never left planned with nobody to carry it out."""
    recovery, policy = world.ctx.recovery, world.ctx.policy.restart
    if recovery is None:
        return None
    if policy is None:
        return "a restart is planned, and the policy says never"
    if recovery.failures > policy.limit + (recovery.phase == "cooling_down"):
        return f"{recovery.failures} failures in a row, and it is {recovery.phase}"
    job = world.ctx.job
    is_loading = job is not None and job.token is None
    if recovery.phase == "waiting" and (world.is_quiescent or is_loading):
        return "a restart is planned, and nothing will carry it out"
    if recovery.phase == "trying" and world.state is State.IDLE:
        return "a restart is under way, and nothing is"
    return None


WORLD_PROMISES: tuple[Callable[[World], str | None], ...] = (
    inv_every_load_has_a_caller,
    inv_a_lease_has_a_holder,
    inv_after_a_shutdown_nothing_is_wanted,
    inv_at_rest_all_are_answered,
    inv_restarts_are_bounded,
)
STEP_PROMISES: tuple[Callable[[Edge], str | None], ...] = (
    inv_answered_once,
    inv_an_end_before_the_commit_wins,
    inv_cancelled_only_if_asked,
    inv_loaded_is_what_was_asked,
    inv_an_older_call_never_wins,
    inv_superseded_at_once,
    inv_the_same_is_shared,
    inv_on_busy_is_honoured,
    inv_shutting_down_is_said_after_a_shutdown,
    inv_a_lease_is_on_a_live_server,
    inv_a_lease_is_granted_where_it_can_be,
    inv_a_cancel_waits_for_no_lease,
    inv_refused_changes_nothing,
    inv_unloaded_is_empty,
    inv_an_unload_ends_only_what_it_names,
    inv_a_server_is_stopped_for_a_reason,
    inv_restored_is_what_runs,
    inv_what_ran_comes_back,
    inv_what_ran_comes_back_for_a_failure_only,
    inv_nothing_comes_back_after_an_end,
)


def _is_turned_away(edge: Edge, fact: LoadRequested) -> bool:
    """Ended on its way: by a cancel, an unload, a newer load or a shutdown. Others judge that."""
    own = category(answers(edge).get(fact.ticket))
    return own in {"cancelled", "superseded", "shutting_down"}


def _fence(edge: Edge) -> DropStale:
    return DropStale(getattr(edge.fact, "generation", Generation(0)), edge.fact.trigger)


def _newer(edge: Edge) -> list[Ticket]:
    own = getattr(edge.fact, "ticket", Ticket(0))
    return [ticket for ticket in edge.before.accepted if ticket > own]


def _runs(world: World, wanted: Target) -> bool:
    running = world.ctx.running
    return (
        world.state is State.HEALTHY
        and running is not None
        and any(process.pid == running.child.pid for process in world.alive)
        and not differences(running.target, wanted)
    )
