"""What must always hold: `inv_*` predicates shared by every layer of tests.

Each looks at one world, or at one step between two worlds (see `observed`), and returns None or a
sentence about what is wrong. Those of the machine and the slot are here, those of the callers in
`promises`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast, get_args

from orchestrator.base.tokens import Generation
from orchestrator.machine.commands import (
    Accept,
    Concluded,
    Download,
    DropStale,
    Loaded,
    Probe,
    Resolve,
    ServerEnded,
    SetToken,
    Spawn,
    Warm,
)
from orchestrator.machine.context import EffectInFlight, EffectKind
from orchestrator.machine.facts import BecameReady, Completion, Fetched, LookedUp, Sized, TimerFired
from orchestrator.machine.states import State
from tests.kit.machine.observed import Edge, Process, World, has_changed, is_known, is_owed, pids
from tests.kit.machine.promises import STEP_PROMISES, WORLD_PROMISES

__all__ = ["INVARIANTS", "Edge", "Process", "Violation", "World", "check_edge", "check_world"]

# ------------------------------------------------------------------------------ in every world

_AT_REST = {State.IDLE, State.HEALTHY}
_OWN_EFFECT: dict[State, EffectKind] = {
    State.KILLING: "kill",
    State.DOWNLOADING: "download",
    State.SPAWNING: "spawn",
    State.WAITING_HEALTH: "probe",
}


def inv_one_server(world: World) -> str | None:
    """At every instant at most one server process of a slot is alive."""
    if len(world.alive) > 1:
        return f"{len(world.alive)} servers are alive: {pids(world)}"
    return None


def inv_one_effect(world: World) -> str | None:
    """At most one effect is in flight; it belongs to the state, and the machine knows it."""
    real, own, known = world.in_flight, _OWN_EFFECT.get(world.state), world.ctx.effect
    if len(real) > 1:
        return f"{len(real)} effects are in flight: {', '.join(e.kind for e in real)}"
    if (real[0] if real else None) != known:
        return f"the machine records {known} as in flight, but it is {real[0] if real else None}"
    is_draining = world.state is State.KILLING and world.ctx.gate == "draining"
    if (known.kind if known else None) != own and not (known is None and is_draining):
        return f"in {world.state} the effect in flight is {known.kind if known else None}"
    return None


def inv_no_server_is_forgotten(world: World) -> str | None:
    """A live server is recorded, or its `Spawned` has not arrived yet.

    What a killed keeper has left is on record as its server, or is looked for by a kill. What a
    dead owner has left is about to be told.
    """
    if world.is_found:
        return None
    spawning = {effect.generation for effect in world.in_flight if effect.kind == "spawn"}
    is_looked_for = any(effect.kind == "kill" for effect in world.in_flight)
    for process in world.alive:
        is_known = _is_recorded(world, process) or process.generation in spawning
        if process.generation and not is_known and not (process.is_left and is_looked_for):
            return f"server {process.pid} is alive and not recorded"
    return None


def _is_recorded(world: World, process: Process) -> bool:
    child = world.ctx.child
    if child is None:
        return False
    return process.generation == child.generation if process.is_left else process.pid == child.pid


def inv_settled_holds_no_load(world: World) -> str | None:
    """Idle and Healthy have no load in flight; Healthy has the child running, Idle has nothing."""
    ctx = world.ctx
    if world.state in _AT_REST and ctx.job is not None:
        return f"{world.state} with load {ctx.job.generation} still in flight"
    if world.state is State.IDLE and ctx.running is not None:
        return f"Idle with server {ctx.running.child.pid} still running"
    if world.state is State.HEALTHY and (ctx.running is None or ctx.running.child != ctx.child):
        return f"Healthy with {ctx.running and ctx.running.child}, but the slot has {ctx.child}"
    return None


def inv_awaited_work_is_in_progress(world: World) -> str | None:
    """What a call, a queued load or a prefetch awaits is in progress."""
    for look_up in world.ctx.look_ups:
        if ("look_up", Generation(look_up.ticket)) not in world.beside:
            return f"call {look_up.ticket} awaits its look-up, which is not in progress"
    for job in (*world.ctx.queue, *world.ctx.prefetches):
        kind = {"answer": "resolve", "files": "prefetch"}.get(job.awaits or "")
        if kind is not None and (kind, job.generation) not in world.beside:
            return f"load {job.generation} awaits its {job.awaits}, which is not in progress"
    return None


def inv_at_rest_no_load_is_left(world: World) -> str | None:
    """Quiescent: no load is wanted, and every load has been concluded."""
    if not world.is_quiescent:
        return None
    if world.ctx.wanted or world.ctx.prefetches or world.ctx.ending:
        return "nothing more will happen, and a load is still wanted or not concluded"
    if left := set(world.accepted.values()) - world.concluded:
        return f"nothing more will happen, and load {min(left)} was never concluded"
    return None


def inv_nothing_is_on_record_before_a_spawn(world: World) -> str | None:
    """In Downloading and Spawning the slot was verified empty: no pid, and nothing running."""
    ctx = world.ctx
    if world.state in {State.DOWNLOADING, State.SPAWNING} and (ctx.child or ctx.running):
        return f"{world.state} with {ctx.child} recorded"
    return None


def inv_at_rest_is_settled(world: World) -> str | None:
    """Quiescent means Idle or Healthy: nothing is stopping for ever."""
    if world.is_quiescent and world.state not in _AT_REST:
        return f"nothing more will happen, and the state is {world.state}"
    return None


def inv_idle_at_rest_is_empty(world: World) -> str | None:
    """Quiescent Idle: nothing is alive, unless a kill failed and its pid is recorded."""
    is_at_rest = world.is_quiescent and world.state is State.IDLE
    if is_at_rest and any(p.generation and not _is_recorded(world, p) for p in world.alive):
        return f"Idle while {pids(world)} is alive and not recorded"
    return None


def inv_healthy_at_rest_is_alive(world: World) -> str | None:
    """Quiescent Healthy: exactly our server is alive."""
    if world.is_quiescent and world.state is State.HEALTHY:
        child = world.ctx.child
        if child is None or {p.pid for p in world.alive} != {child.pid}:
            return f"Healthy with {child}, but alive is {pids(world)}"
    return None


def inv_idle_server_is_stopped(world: World) -> str | None:
    """Quiescent Healthy: the server is leased or pinned, or has no idle time."""
    ctx = world.ctx
    has_idle_time = ctx.policy.idle_ttl_s is not None and not ctx.is_shutting_down
    if world.is_quiescent and world.state is State.HEALTHY and has_idle_time:
        is_pinned = ctx.running is not None and ctx.running.target.request.pinned
        if not is_pinned and not world.inside:
            return "the server is idle, and nothing will stop it"
    return None


# ------------------------------------------------------------------------------ at every step


def inv_spawning_is_verified(edge: Edge) -> str | None:
    """A server is started only in an empty slot, and for a load that has not ended."""
    spawns = [c for c in edge.commands if isinstance(c, Spawn)]
    enters = edge.after.state is State.SPAWNING and edge.before.state is not State.SPAWNING
    if not spawns and not enters:
        return None
    if not (enters and len(spawns) == 1 and isinstance(edge.fact, Fetched)):
        return f"{len(spawns)} servers are started by {edge.fact.trigger} in {edge.before.state}"
    if edge.before.alive:
        return f"a server is started beside {pids(edge.before)}"
    job = edge.after.ctx.job
    if job is None or job.token is not None or spawns[0].generation in edge.before.tokens:
        return f"a server is started for load {spawns[0].generation}, which was ended"
    return None


def inv_nothing_begins_for_an_ended_load(edge: Edge) -> str | None:
    """A cancel waits for the effect in flight, never for the next one."""
    begun = [c for c in edge.commands if isinstance(c, Resolve | Download | Spawn | Probe | Warm)]
    for effect in begun:
        if effect.generation in edge.after.tokens:
            kind = type(effect).__name__.lower()
            return f"a {kind} begins for load {effect.generation}, which was ended"
    return None


def inv_server_is_stopped_only_for_an_available_model(edge: Edge) -> str | None:
    """The server runs until the next model is resolved, and with `prefetch` downloaded."""
    job = edge.after.ctx.job
    if edge.before.state is not State.HEALTHY or edge.after.state is State.HEALTHY or job is None:
        return None
    model, request = job.target.model, job.target.request
    if not model.is_settled:
        return f"a healthy server is stopped for {request.model_path}, which is not resolved"
    if request.prefetch and not model.is_on_disk:
        return f"a healthy server is stopped for {request.model_path}, which is not on disk"
    return None


def inv_concluded_once(edge: Edge) -> str | None:
    """A load is concluded once, and as loaded only in Healthy."""
    ended = [c for c in edge.commands if isinstance(c, Concluded)]
    for number, command in enumerate(ended):
        again = [c.generation for c in ended[:number]]
        if command.generation in edge.before.concluded or command.generation in again:
            return f"load {command.generation} is concluded again"
        if isinstance(command.answer, Loaded) and edge.after.state is not State.HEALTHY:
            return f"load {command.generation} is concluded as loaded in {edge.after.state}"
    return None


def inv_a_server_ends_once(edge: Edge) -> str | None:
    """The end of a server is reported once, after it died and before its pid is cleared."""
    for command in edge.commands:
        if isinstance(command, ServerEnded):
            if command.pid in edge.before.reported_ended:
                return f"the end of server {command.pid} is reported again"
            if command.pid in {process.pid for process in edge.before.alive}:
                return f"server {command.pid} is reported to have ended, and is alive"
    child = edge.before.ctx.child
    is_cleared = child is not None and edge.after.ctx.child != child
    reported = {command.pid for command in edge.commands if isinstance(command, ServerEnded)}
    if child is not None and is_cleared and child.pid not in edge.before.reported_ended | reported:
        return f"server {child.pid} is cleared, and its end was not reported"
    return None


def inv_healthy_is_proven(edge: Edge) -> str | None:
    """Healthy: our child is alive, a probe of this load passed, and the load has not ended."""
    before, after, fact = edge.before, edge.after, edge.fact
    if after.state is not State.HEALTHY or before.state is State.HEALTHY:
        return None
    job, running = before.ctx.job, after.ctx.running
    if not isinstance(fact, BecameReady) or EffectInFlight("probe", fact.generation) not in (
        before.in_flight
    ):
        return f"Healthy by {fact.trigger}, without a probe of this load"
    if job is None or running is None or running.generation != job.generation:
        return "Healthy without a load"
    if job.generation in before.tokens:
        return f"Healthy with load {job.generation}, which was ended"
    found = [p for p in before.alive if running.child.pid == p.pid]
    if not found:
        return f"Healthy with pid {running.child.pid}, which is dead"
    if running.target != job.target or found[0].model != job.target.request.model_path:
        return f"Healthy with {found[0].model}, but {job.target.request.model_path} was requested"
    return None


def inv_stale_is_dropped(edge: Edge) -> str | None:
    """A completion of anything but the effect in flight is dropped."""
    fact = edge.fact
    if not isinstance(fact, get_args(Completion)):
        return None
    completion = cast("Completion", fact)
    if is_owed(completion, edge.before):
        return None
    if has_changed(edge):
        return f"{fact.trigger} of load {completion.generation} is stale and accepted"
    if edge.commands != (DropStale(completion.generation, completion.trigger),):
        return f"{fact.trigger} of load {completion.generation} is stale and not dropped"
    return None


def inv_memory_is_of_this_server(world: World) -> str | None:
    for load in (world.ctx.job, world.ctx.running):
        if load is not None and load.memory is not None and load.memory.mib != load.generation:
            return f"load {load.generation} has the memory of load {load.memory.mib}"
    return None


def inv_a_figure_is_recorded(edge: Edge) -> str | None:
    """Until a server is Healthy, its figure is; of anything else it is dropped."""
    fact, before, after = edge.fact, edge.before, edge.after
    if not isinstance(fact, Sized):
        return None
    job = before.ctx.loading
    is_due = job is not None and job.generation == fact.generation
    is_due = is_due and before.state in {State.SPAWNING, State.WAITING_HEALTH}
    if is_due and (after.ctx.job is None or after.ctx.job.memory != fact.memory):
        return f"the memory of load {fact.generation} is not recorded"
    is_dropped = edge.commands == (DropStale(fact.generation, fact.trigger),)
    if not is_due and (has_changed(edge) or not is_dropped):
        return f"the memory of load {fact.generation} is late and not dropped"
    return None


def inv_late_look_up_is_dropped(edge: Edge) -> str | None:
    """The answer to a look-up is dropped if its call has been answered, or its caller is gone."""
    fact = edge.fact
    if (
        not isinstance(fact, get_args(LookedUp))
        or edge.before.ctx.policy.abandoned_load != "cancel"
    ):
        return None
    ticket = cast("LookedUp", fact).ticket
    has_gone_early = any(look_up.ticket == ticket for look_up in edge.before.ctx.look_ups)
    if ticket in edge.before.unanswered or (has_gone_early and ticket in edge.before.ended):
        return None  # the owner reports a caller that left before its request once more
    if has_changed(edge) or edge.commands != (DropStale(Generation(0), fact.trigger),):
        return f"call {ticket} has ended, and its look-up is not dropped"
    return None


def inv_stale_timer_is_dropped(edge: Edge) -> str | None:
    """A deadline ends its load; a timer of something that is over changes nothing."""
    fact, ctx = edge.fact, edge.before.ctx
    if not isinstance(fact, TimerFired):
        return None
    if fact.kind == "restart":
        due = ctx.recovery.generation if ctx.recovery and ctx.recovery.phase == "waiting" else None
        is_due = fact.generation == due
    elif fact.kind == "idle":
        running = ctx.running
        is_due = (
            running is not None
            and running.generation == fact.generation
            and ctx.gate == "open"
            and running.idle_ttl_s is not None
            and not (ctx.is_due and fact.idle_in_s == 0.0)
        )
    elif fact.kind == "look_up":
        is_due = fact.generation in {Generation(call.ticket) for call in ctx.look_ups}
        if fact.generation in {Generation(call.ticket) for call in edge.after.ctx.look_ups}:
            return f"call {fact.generation} is looked up after its deadline"
    elif fact.kind == "deadline":
        is_due = fact.generation in {job.generation for job in (*ctx.wanted, *ctx.prefetches)}
        after = edge.after.ctx
        if fact.generation in {job.generation for job in (*after.wanted, *after.prefetches)}:
            return f"load {fact.generation} goes on after its deadline"
    else:
        is_draining = edge.before.state is State.KILLING and not edge.before.in_flight
        is_due = is_draining and ctx.child is not None and ctx.child.generation == fact.generation
    if not is_due and has_changed(edge):
        return f"the {fact.kind} timer of load {fact.generation} is late and accepted"
    if not is_due and edge.commands != (DropStale(fact.generation, fact.trigger),):
        return f"the {fact.kind} timer of load {fact.generation} is late and not dropped"
    return None


def inv_generations_grow(edge: Edge) -> str | None:
    """Generations never decrease, and a new load gets the next one."""
    before, after = edge.before.ctx.generation, edge.after.ctx.generation
    if after < before:
        return f"generation {before} is followed by {after}"
    for command in edge.commands:
        if not isinstance(command, Accept):
            continue
        if not is_known(command, edge.before) and not before < command.generation == after:
            return f"load {command.generation} is accepted, but the generation is {after}"
        if command.joined and command.generation in edge.before.tokens:
            return f"call {command.ticket} joins load {command.generation}, which was ended"
    return None


def inv_token_set_once(edge: Edge) -> str | None:
    """A token is set at most once, and the machine's mirror of it agrees."""
    tokens = [c.generation for c in edge.commands if isinstance(c, SetToken)]
    for generation in tokens:
        if generation in edge.before.tokens or tokens.count(generation) > 1:
            return f"the token of load {generation} is set again"
    for job in (edge.after.ctx.job, *edge.after.ctx.queue):
        if job and (job.token is not None) != (job.generation in edge.after.tokens):
            return f"load {job.generation}: its token and the machine's mirror of it differ"
    return None


# ------------------------------------------------------------------------------------ together

WORLD_INVARIANTS: tuple[Callable[[World], str | None], ...] = (
    inv_one_server,
    inv_one_effect,
    inv_no_server_is_forgotten,
    inv_settled_holds_no_load,
    inv_nothing_is_on_record_before_a_spawn,
    inv_at_rest_is_settled,
    inv_idle_at_rest_is_empty,
    inv_healthy_at_rest_is_alive,
    inv_idle_server_is_stopped,
    inv_memory_is_of_this_server,
    *WORLD_PROMISES,
    inv_awaited_work_is_in_progress,
    inv_at_rest_no_load_is_left,
)
STEP_INVARIANTS: tuple[Callable[[Edge], str | None], ...] = (
    inv_spawning_is_verified,
    inv_nothing_begins_for_an_ended_load,
    inv_server_is_stopped_only_for_an_available_model,
    inv_healthy_is_proven,
    inv_stale_is_dropped,
    inv_stale_timer_is_dropped,
    inv_late_look_up_is_dropped,
    inv_a_figure_is_recorded,
    inv_generations_grow,
    inv_token_set_once,
    *STEP_PROMISES,
    inv_concluded_once,
    inv_a_server_ends_once,
)
INVARIANTS = frozenset(inv.__name__ for inv in (*WORLD_INVARIANTS, *STEP_INVARIANTS))


class Violation(NamedTuple):
    """A broken invariant, and how it is broken."""

    invariant: str
    message: str


def check_world(world: World, without: frozenset[str] = frozenset()) -> Violation | None:
    """Return the first invariant this world breaks."""
    for inv in WORLD_INVARIANTS:
        if (message := inv(world)) is not None and inv.__name__ not in without:
            return Violation(inv.__name__, message)
    return None


def check_edge(edge: Edge, without: frozenset[str] = frozenset()) -> Violation | None:
    """Return the first invariant this step breaks."""
    for inv in STEP_INVARIANTS:
        if (message := inv(edge)) is not None and inv.__name__ not in without:
            return Violation(inv.__name__, message)
    return None
