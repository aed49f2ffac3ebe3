"""What callers are promised: the contract as `inv_*` predicates.

Each returns None or a sentence about the broken promise.
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
    Kill,
    LeaseGranted,
    Loaded,
    Settle,
    StopTimer,
    Unloaded,
)
from orchestrator.machine.facts import (
    Exited,
    Hung,
    LeaseRequested,
    LoadRequested,
    LookUpRequested,
    ShutdownRequested,
    TimerFired,
    UnloadRequested,
)
from orchestrator.machine.states import State
from orchestrator.settings.target import Target, differences, is_same_model
from tests.kit.machine.observed import Edge, World, answers, category, has_changed, is_known

# ------------------------------------------------------------------------------ in every world


def inv_every_load_has_a_caller(world: World) -> str | None:
    """A load goes on only as long as a caller, or the policy, wants it, or it is our own."""
    if world.ctx.policy.abandoned_load == "cancel":
        for job in world.ctx.wanted:
            if not job.callers and not job.is_own:
                return f"load {job.generation} goes on without a caller"
    for job in world.ctx.prefetches:
        if not job.callers:
            return f"prefetch {job.generation} goes on without a caller"
    return None


def inv_a_lease_has_a_holder(world: World) -> str | None:
    """A released lease, or one whose holder went away, does not delay a drain."""
    left = world.inside - world.holding
    return f"the lease of call {min(left)} counts, but is not held" if left else None


def inv_the_gate_is_as_the_machine_says(world: World) -> str | None:
    """It is open in Healthy, until the shutdown. While it drains, Killing waits for it only."""
    gate, state = world.ctx.gate, world.state
    if world.is_open is not (gate == "open"):
        return f"the gate is {'open' if world.is_open else 'closed'}, and should be {gate}"
    if (gate == "open") is not (state is State.HEALTHY and not world.ctx.is_shutting_down):
        return f"in {state} the gate is {gate}"
    if gate == "draining" and (state is not State.KILLING or world.ctx.effect is not None):
        return f"in {state} the server drains during {world.ctx.effect}"
    return None


def inv_nobody_is_let_in_late(world: World) -> str | None:
    """Nobody enters a gate that has been closed: its server is about to be stopped."""
    late = world.inside - world.let_in
    return f"call {min(late)} was let in after the gate was closed" if late else None


def inv_a_drain_ends_with_the_last(world: World) -> str | None:
    """Killing waits for somebody who is inside, or has just left."""
    if world.ctx.gate == "draining" and not (world.inside or world.is_told_drained):
        return "the server drains, and nobody is inside"
    return None


def inv_after_a_shutdown_nothing_is_wanted(world: World) -> str | None:
    """From a shutdown on there is no load and no lease."""
    if world.was_shut_down and (world.ctx.wanted or world.ctx.prefetches or world.ctx.gate):
        return "after the shutdown a load is wanted, or leases are granted or waited for"
    return None


def inv_at_rest_all_are_answered(world: World) -> str | None:
    """Every call is answered in the end."""
    if world.is_quiescent and world.unanswered:
        return f"nothing more will happen, and call {min(world.unanswered)} has no answer"
    return None


# ------------------------------------------------------------------------------ at every step


def inv_answered_once(edge: Edge) -> str | None:
    """A call is answered once, and not after its caller has gone away."""
    tickets = [c.ticket for c in edge.commands if isinstance(c, Settle)]
    for ticket in tickets:
        is_own = ticket == getattr(edge.fact, "ticket", None)
        if tickets.count(ticket) > 1 or not (is_own or ticket in edge.before.unanswered):
            return f"call {ticket} is answered again"
    return None


def inv_cancel_before_the_commit_wins(edge: Edge) -> str | None:
    """A load that was cancelled, unloaded or withdrawn is never answered `loaded`."""
    for settle in edge.commands:
        if (
            isinstance(settle, Settle)
            and isinstance(settle.answer, Loaded)
            and settle.ticket in edge.before.ended
        ):
            return f"call {settle.ticket} was ended and is answered 'loaded'"
    return None


def inv_only_meant_calls_are_cancelled(edge: Edge) -> str | None:
    """A cancel or an unload ends only what it names."""
    for settle in edge.commands:
        if (
            isinstance(settle, Settle)
            and isinstance(settle.answer, Problem)
            and settle.answer.category == "cancelled"
            and settle.ticket not in edge.before.ended
        ):
            return f"call {settle.ticket} is answered 'cancelled', and was not meant"
    return None


def inv_loaded_is_what_was_requested(edge: Edge) -> str | None:
    """`loaded` names a live server with the requested model, a new one for a forced reload."""
    for settle in edge.commands:
        if not isinstance(settle, Settle) or not isinstance(settle.answer, Loaded):
            continue
        answer, asked = settle.answer, edge.after.asked[settle.ticket].request
        pids = {p.pid: p.model for p in edge.before.alive}
        if answer.child.pid not in pids:
            return f"call {settle.ticket} is answered with pid {answer.child.pid}, which is dead"
        if pids[answer.child.pid] != asked.model_path:
            return f"call {settle.ticket} requested {asked.model_path} and got another model"
        if answer.already and asked.force_reload:
            return f"call {settle.ticket} requested a reload and is answered 'already loaded'"
    return None


def inv_an_older_call_never_wins(edge: Edge) -> str | None:
    """A call ends no newer call, unless the caller of that has gone away."""
    fact, newer = edge.fact, _newer(edge)
    if not isinstance(fact, LoadRequested):
        return None
    answered = answers(edge)
    if later := [ticket for ticket in answered if ticket > fact.ticket]:
        return f"call {fact.ticket} ends the newer call {later[0]}"
    if category(answered.get(fact.ticket)) == "superseded" and not newer:
        return f"call {fact.ticket} is the newest and is superseded"
    is_fresh = any(not is_known(c, edge.before) for c in edge.commands if isinstance(c, Accept))
    if edge.before.ctx.policy.abandoned_load == "cancel":
        newer = [ticket for ticket in newer if ticket not in edge.before.ended]  # left it
    if is_fresh and newer and fact.target.request.on_busy == "supersede":
        return f"call {fact.ticket} starts a load though call {max(newer)} is newer"
    return None


def inv_superseded_at_once(edge: Edge) -> str | None:
    """A newer different load ends every older one, and answers its callers in the same step."""
    fact = edge.fact
    accepts = [c for c in edge.commands if isinstance(c, Accept)]
    if not isinstance(fact, LoadRequested) or not accepts:
        return None
    if fact.target.request.on_busy != "supersede":
        return None
    answered = answers(edge)
    is_fresh = not is_known(accepts[0], edge.before)
    for job in edge.before.ctx.wanted:
        is_newer = any(caller.ticket > fact.ticket for caller in job.callers)
        if is_newer or not (is_fresh or job.generation > accepts[0].generation):
            continue
        for caller in job.callers:
            own_answer = answered.get(caller.ticket)
            if (
                isinstance(own_answer, Problem)
                and caller.failure is not None
                and own_answer.restored
            ):
                own_answer = own_answer.restored.problem  # the failure of its own load came first
            if category(own_answer) != "superseded":
                return f"call {caller.ticket} is not superseded at once"
    if is_fresh and len(edge.after.ctx.wanted) != 1:
        return f"{len(edge.after.ctx.wanted)} loads are wanted after one superseded all others"
    return None


def inv_superseded_during_its_look_up(edge: Edge) -> str | None:
    """A newer load that is accepted ends the look-ups of older ones at once."""
    fact = edge.fact
    is_accepted = any(isinstance(command, Accept) for command in edge.commands)
    if not isinstance(fact, LoadRequested) or not is_accepted:
        return None
    for look_up in edge.before.ctx.look_ups:
        other, answer = edge.before.asked[look_up.ticket], answers(edge).get(look_up.ticket)
        is_older = look_up.ticket < fact.ticket and look_up.purpose == "load"
        is_meant = is_older and look_up.request.on_busy == "supersede"
        has_ended = look_up not in edge.after.ctx.look_ups
        if look_up.ticket in edge.before.unanswered:
            has_ended = has_ended and category(answer) == "superseded"
        if is_meant and not has_ended and not is_same_model(other, fact.target):
            return f"call {look_up.ticket} is still looked up, and call {fact.ticket} is newer"
    return None


def inv_same_target_is_shared(edge: Edge) -> str | None:
    """A load of the same target joins the newest load or the one in flight, or answers at once."""
    fact, ctx = edge.fact, edge.before.ctx
    ended = {"cancelled", "shutting_down"}  # other invariants check these
    if not isinstance(fact, LoadRequested) or fact.ticket not in edge.before.unanswered:
        return None
    if category(answers(edge).get(fact.ticket)) in ended:
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
            return f"call {fact.ticket} requests the running target and is not already loaded"
    return None


def inv_on_busy_is_honoured(edge: Edge) -> str | None:
    """`reject` and `queue` end no other load; `busy` is answered only if another is in flight."""
    fact = edge.fact
    if not isinstance(fact, LoadRequested) or _was_ended_early(edge, fact):
        return None
    wanted, on_busy = edge.before.ctx.wanted, fact.target.request.on_busy
    is_busy = bool(wanted) and bool(differences(wanted[-1].target, fact.target))
    is_answered_busy = category(answers(edge).get(fact.ticket)) == "busy"
    if is_answered_busy and _is_full(edge.before, fact):
        return None
    if is_answered_busy != (is_busy and on_busy == "reject"):
        return f"call {fact.ticket} with `{on_busy}` is {'' if is_answered_busy else 'not '}busy"
    left = {job.generation for job in edge.after.ctx.wanted}
    if is_busy and on_busy == "queue" and not left >= {job.generation for job in wanted}:
        return f"call {fact.ticket} with `queue` ends another load"
    return None


def _is_full(world: World, fact: LoadRequested) -> bool:
    """Return whether the queue or the prefetches have reached their limit."""
    ctx, request = world.ctx, fact.target.request
    waits = request.on_busy == "queue" and len(ctx.queue) >= ctx.policy.max_waiting
    fetching = [job for job in ctx.queue if job.awaits and job.target.request.prefetch]
    at_once = len(fetching) + len(ctx.prefetches)
    return waits or (request.prefetch and at_once >= ctx.policy.max_prefetches)


def inv_shutting_down_only_after_a_shutdown(edge: Edge) -> str | None:
    for ticket, answer in answers(edge).items():
        if category(answer) == "shutting_down" and not edge.after.was_shut_down:
            return f"call {ticket} is refused without a shutdown"
    return None


def inv_a_lease_is_on_a_live_server(edge: Edge) -> str | None:
    pids = {process.pid for process in edge.before.alive}
    for ticket, answer in answers(edge).items():
        if isinstance(answer, LeaseGranted) and answer.child.pid not in pids:
            return f"call {ticket} is granted a lease on pid {answer.child.pid}, which is dead"
    return None


def inv_lease_is_granted_if_possible(edge: Edge) -> str | None:
    """A live Healthy server grants at once; a lease is refused only if no load is wanted."""
    fact, ctx = edge.fact, edge.before.ctx
    if not isinstance(fact, LeaseRequested) or ctx.is_shutting_down:
        return None
    answer = answers(edge).get(fact.ticket)
    is_alive = any(ctx.child and process.pid == ctx.child.pid for process in edge.before.alive)
    if edge.before.state is State.HEALTHY and is_alive and not isinstance(answer, LeaseGranted):
        return f"call {fact.ticket} gets no lease on a server that is Healthy and alive"
    if ctx.wanted and isinstance(answer, Problem):
        return f"call {fact.ticket} gets no lease though a load is wanted"
    return None


def inv_a_cancel_waits_for_no_lease(edge: Edge) -> str | None:
    """A cancel is as fast as the kill ladder; a drain may take much longer."""
    ctx = edge.after.ctx
    if edge.after.state is State.KILLING and ctx.effect is None:
        for waiter in ctx.waiters:
            if isinstance(waiter.answer, CancelAnswer):
                return f"the cancel of call {waiter.ticket} waits until the leases are released"
    return None


def inv_only_a_cut_ends_leases(edge: Edge) -> str | None:
    """An unload waits for the requests that use the server, unless it is told to cut them."""
    fact, before, after = edge.fact, edge.before.ctx, edge.after.ctx
    if not isinstance(fact, UnloadRequested):
        return None
    if not fact.cut and before.gate is not None and after.gate is None:
        return "an unload that waits for leases has ended them"
    is_waiting = any(waiter.ticket == fact.ticket for waiter in after.waiters)
    if fact.cut and is_waiting and after.gate is not None:
        return f"unload {fact.ticket} does not wait for leases, and has left some"
    return None


def inv_a_server_in_use_is_not_stopped(edge: Edge) -> str | None:
    """A lease keeps the server, until it is cut, the drain has lasted long enough, or all ends."""
    fact, ctx = edge.fact, edge.before.ctx
    is_cut = isinstance(fact, Exited | Hung | ShutdownRequested) or (
        fact.cut if isinstance(fact, UnloadRequested) else False
    )
    is_over = isinstance(fact, TimerFired) and fact.kind == "drain"
    kills = any(isinstance(command, Kill) for command in edge.commands)
    if kills and ctx.gate is not None and edge.before.inside and not (is_cut or is_over):
        return f"the server is stopped while call {min(edge.before.inside)} uses it"
    return None


def inv_refused_changes_nothing(edge: Edge) -> str | None:
    """A dropped fact or a refused request changes nothing."""
    refused = any(isinstance(c, DropStale) for c in edge.commands)
    if isinstance(edge.fact, LoadRequested | LookUpRequested):
        own = [c for c in edge.commands if isinstance(c, Settle) and c.ticket == edge.fact.ticket]
        refused = any(isinstance(c.answer, Problem) for c in own)
    if any(isinstance(c, Settle) and c.answer == Unloaded(changed=False) for c in edge.commands):
        now = edge.after.ctx  # the unload is recorded, and prevents a restore
        before = replace(edge.before.ctx, unloads=now.unloads, previous=now.previous)
        refused = before != edge.after.ctx or edge.before.state is not edge.after.state
    said = [c for c in edge.commands if not isinstance(c, StopTimer)]  # of the look-up
    if refused and (has_changed(edge) or len(said) != 1):
        return f"{edge.fact.trigger} is refused and changes something"
    return None


def inv_unloaded_is_empty(edge: Edge) -> str | None:
    """`Unloaded` and `Done` are answered when nothing is alive, or nothing of a queued model."""
    fact = edge.fact
    for ticket, answer in answers(edge).items():
        if answer not in (Unloaded(), Done()):
            continue
        servers = [process for process in edge.before.alive if process.generation]
        if isinstance(fact, UnloadRequested) and fact.ticket == ticket and fact.model:
            servers = [process for process in servers if process.model == fact.model]
        if servers:
            alive = [process.pid for process in servers]
            return f"call {ticket} is answered as for an empty slot, but {alive} is alive"
    return None


def inv_kept_is_our_server(edge: Edge) -> str | None:
    """A shutdown leaves our own Healthy server, where the policy says so, and nothing else."""
    fact, ctx, after = edge.fact, edge.before.ctx, edge.after
    if not isinstance(fact, ShutdownRequested):
        return None
    alive = {process.pid for process in edge.before.alive}
    is_ours = ctx.child is not None and alive == {ctx.child.pid}
    must_keep = edge.before.state is State.HEALTHY and is_ours and ctx.policy.keeps_server
    is_kept = answers(edge).get(fact.ticket) == Done(is_kept=True)
    if is_kept is not must_keep or (is_kept and after.state is not State.HEALTHY):
        return f"a shutdown leaves {sorted(alive) if is_kept else 'nothing'} in {after.state}"
    return None


def inv_an_unload_ends_only_what_it_names(edge: Edge) -> str | None:
    """The load and the server of another model go on."""
    fact, running = edge.fact, edge.before.ctx.running
    if not isinstance(fact, UnloadRequested) or fact.model is None:
        return None
    left = {job.generation for job in edge.after.ctx.wanted}
    for job in edge.before.ctx.wanted:
        if job.generation not in left and not job.target.is_called(fact.model):
            return f"load {job.generation} is ended by an unload of {fact.model}"
    is_stopped = edge.before.state is State.HEALTHY is not edge.after.state
    if is_stopped and running is not None and not running.target.is_called(fact.model):
        return f"a healthy server of another model is stopped by an unload of {fact.model}"
    return None


def inv_a_server_is_stopped_for_a_reason(edge: Edge) -> str | None:
    """An unload, a shutdown, another load, its exit, its idle time, or that it truly hangs."""
    fact, is_stopped = edge.fact, edge.before.state is State.HEALTHY is not edge.after.state
    if not is_stopped or edge.after.ctx.job is not None:
        return None
    is_allowed = isinstance(fact, UnloadRequested | ShutdownRequested | Exited)
    if isinstance(fact, Hung):
        is_allowed = all(p.pid != fact.exit.pid or p.is_hung for p in edge.before.alive)
    if is_allowed or (isinstance(fact, TimerFired) and fact.kind == "idle"):
        return None
    return f"a healthy server is stopped by {fact.trigger}, and no other load is wanted"


def inv_restored_model_is_running(edge: Edge) -> str | None:
    """A restored model is reported when it is Healthy."""
    for ticket, answer in answers(edge).items():
        if not isinstance(answer, Problem) or answer.restored is None or answer.restored.problem:
            continue
        running, model = edge.after.ctx.running, answer.restored.model_path
        if edge.after.state is not State.HEALTHY or running is None:
            return f"call {ticket} is answered that {model} is restored, in {edge.after.state}"
        models = {process.pid: process.model for process in edge.before.alive}
        if models.get(running.child.pid) != model:
            return f"call {ticket} is answered that {model} is restored, and another model runs"
    return None


def inv_previous_is_restored(edge: Edge) -> str | None:
    """A failed load with `restore_previous` is followed by the previous model."""
    before, after, job = edge.before.ctx, edge.after.ctx, edge.before.ctx.job
    is_failure = edge.fact.trigger in {"fetch_failed", "spawn_failed", "not_ready"}
    is_failure = is_failure and edge.commands != (_dropped(edge),)
    is_failure = is_failure or edge.fact.trigger == "deadline_expired"
    if job is None or job.token is not None or not is_failure:
        return None
    gone = after.job is None or after.job.generation != job.generation or after.job.token
    if not gone or not job.target.request.restore_previous or before.previous is None:
        return None
    follows = after.wanted[0] if after.wanted else None
    if before.is_due:
        is_next = follows is not None and follows.generation == before.queue[0].generation
        return None if is_next else "a queued load is skipped"
    if follows is None or differences(follows.target, before.previous):
        return f"load {job.generation} failed, and the previous model is not restored"
    return None


def inv_restore_only_after_a_failure(edge: Edge) -> str | None:
    """The previous model is not restored while the load that replaces it goes on."""
    before, after = edge.before.ctx, edge.after.ctx
    known = {job.generation for job in (before.job, *before.queue) if job}
    own = [job for job in (after.job, *after.queue) if job and job.after is not None]
    if edge.fact.trigger == "restart_due" or all(job.generation in known for job in own):
        return None
    goes_on = before.job is not None and before.job.generation in {
        job.generation for job in after.wanted
    }
    return "the previous model is restored, and the load in flight goes on" if goes_on else None


def inv_nothing_starts_after_an_unload(edge: Edge) -> str | None:
    """After an unload of everything, or a shutdown, nothing is restored or restarted."""
    fact, ctx = edge.fact, edge.after.ctx
    is_end = isinstance(fact, ShutdownRequested) or (
        isinstance(fact, UnloadRequested) and fact.model is None
    )
    if is_end and (ctx.previous or ctx.recovery or ctx.wanted):
        return f"after the {fact.trigger} something is still going to start"
    return None


def inv_restarts_are_bounded(world: World) -> str | None:
    """A restart follows the policy and its limit, and a planned one happens."""
    recovery, policy = world.ctx.recovery, world.ctx.policy.restart
    if recovery is None:
        return None
    if policy is None:
        return "a restart is planned without a policy"
    if recovery.failures > policy.limit + (recovery.phase == "cooling_down"):
        return f"{recovery.failures} failures in a row, and it is {recovery.phase}"
    job = world.ctx.job
    is_loading = job is not None and job.token is None
    if recovery.phase == "waiting" and (world.is_quiescent or is_loading):
        return "a restart is planned, and will not happen"
    if recovery.phase == "trying" and world.state is State.IDLE:
        return "a restart is in progress in Idle"
    return None


WORLD_PROMISES: tuple[Callable[[World], str | None], ...] = (
    inv_every_load_has_a_caller,
    inv_a_lease_has_a_holder,
    inv_the_gate_is_as_the_machine_says,
    inv_nobody_is_let_in_late,
    inv_a_drain_ends_with_the_last,
    inv_after_a_shutdown_nothing_is_wanted,
    inv_at_rest_all_are_answered,
    inv_restarts_are_bounded,
)
STEP_PROMISES: tuple[Callable[[Edge], str | None], ...] = (
    inv_answered_once,
    inv_cancel_before_the_commit_wins,
    inv_only_meant_calls_are_cancelled,
    inv_loaded_is_what_was_requested,
    inv_an_older_call_never_wins,
    inv_superseded_at_once,
    inv_superseded_during_its_look_up,
    inv_same_target_is_shared,
    inv_on_busy_is_honoured,
    inv_shutting_down_only_after_a_shutdown,
    inv_a_lease_is_on_a_live_server,
    inv_lease_is_granted_if_possible,
    inv_a_cancel_waits_for_no_lease,
    inv_only_a_cut_ends_leases,
    inv_a_server_in_use_is_not_stopped,
    inv_refused_changes_nothing,
    inv_unloaded_is_empty,
    inv_kept_is_our_server,
    inv_an_unload_ends_only_what_it_names,
    inv_a_server_is_stopped_for_a_reason,
    inv_restored_model_is_running,
    inv_previous_is_restored,
    inv_restore_only_after_a_failure,
    inv_nothing_starts_after_an_unload,
)


def _was_ended_early(edge: Edge, fact: LoadRequested) -> bool:
    """Return whether it was ended before it arrived, which other invariants check."""
    own = category(answers(edge).get(fact.ticket))
    return own in {"cancelled", "superseded", "shutting_down"}


def _dropped(edge: Edge) -> DropStale:
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
