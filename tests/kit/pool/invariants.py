"""What must always hold in the pool: `inv_*` predicates over one step, or one world.

Each returns None or a sentence about what is wrong. A step is that of the real machine, before its
result is made canonical; a world also has the slots, the gates and the memory that servers take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from orchestrator.base.tokens import Ticket
from orchestrator.machine.recovery import backoff_s
from orchestrator.pool import facts
from orchestrator.pool.commands import (
    AnswerCancelled,
    AnswerEmptied,
    Command,
    GiveUp,
    Grant,
    Refuse,
    Start,
    Stop,
)
from orchestrator.pool.context import Context, Entry, Waiter
from orchestrator.pool.facts import Fact
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.states import State
from tests.kit.pool.world import Model, Scenario, World, admitted, amounts, name_of

_IN_SLOT: Final = {State.STARTING, State.RESIDENT, State.STOPPING, State.STUCK}
_OF_CALLERS: Final = {"reload", "unload", "removed", "stuck"}


class Violation(NamedTuple):
    invariant: str
    message: str


class Edge(NamedTuple):
    """One step of the pool."""

    before: Context
    fact: Fact
    after: Context
    commands: tuple[Command, ...]

    @property
    def name(self) -> str | None:
        return getattr(self.fact, "name", None)

    def of(self, kind: type) -> Iterator[Command]:
        return (command for command in self.commands if isinstance(command, kind))

    @property
    def stops(self) -> list[Stop]:
        return [command for command in self.commands if isinstance(command, Stop)]

    def entry(self, name: str) -> Entry | None:
        return self.before.find(name)


def _tickets(ctx: Context) -> Counter[Ticket]:
    waiting = Counter(one.ticket for one in ctx.waiting if one.ticket is not None)
    return waiting + Counter(ticket for entry in ctx.entries for ticket in entry.emptying)


def _is_overdue(edge: Edge, waiter: Waiter) -> bool:
    return edge.fact.at >= waiter.since + edge.before.policy.max_wait_s


# ----------------------------------------------------------------------------------- of one step
def inv_everybody_is_answered_once(edge: Edge) -> str | None:
    """Who waited or asked is answered, or goes on waiting; nobody else is."""
    expected = _tickets(edge.before)
    asked = facts.Wanted | facts.UnloadRequested | facts.CancelRequested | facts.Removed
    if isinstance(edge.fact, asked):
        expected += Counter([edge.fact.ticket] if edge.fact.ticket is not None else [])
    if isinstance(edge.fact, facts.Withdrawn):
        expected -= Counter([edge.fact.ticket])
    seen = _tickets(edge.after)
    for command in edge.commands:
        if isinstance(command, Grant | Refuse | AnswerEmptied | AnswerCancelled):
            seen[command.ticket] += 1
    if seen != expected:
        return f"forgotten: {dict(expected - seen)}, too often: {dict(seen - expected)}"
    return None


def inv_the_house_gets_an_end(edge: Edge) -> str | None:
    """What the house wants is loaded, given up, cancelled by hand, or goes on waiting."""
    hands = (
        *(facts.UnloadRequested, facts.CancelRequested),
        *(facts.Removed, facts.ShutdownRequested),
    )
    if isinstance(edge.fact, hands) or edge.fact.trigger in ("healthy", "adopted"):
        return None
    given_up = {(one.name, one.kind) for one in edge.commands if isinstance(one, GiveUp)}
    left = {(one.name, one.kind) for one in edge.after.waiting}
    for waiter in edge.before.waiting:
        if waiter.ticket is None and (waiter.name, waiter.kind) not in left | given_up:
            return f"the {waiter.kind} of {waiter.name} is forgotten"
    return None


def inv_a_refusal_has_its_reason(edge: Edge) -> str | None:
    for command in edge.commands:
        if isinstance(command, Refuse) and (why := _unfounded(edge, command)):
            return f"call {command.ticket} of {command.name}: {why}"
    return None


def _unfounded(edge: Edge, refusal: Refuse) -> str | None:
    fact, name, category = edge.fact, refusal.name, refusal.problem.category
    entry, is_its = edge.entry(name), edge.name == refusal.name
    match category:
        case "shutting_down":
            is_right = edge.after.is_shutting_down
        case "model_not_found":
            is_gone = entry is None or entry.is_removed or fact.trigger == "removed"
            is_right = is_its and is_gone
        case "cancelled":
            is_right = is_its and fact.trigger in ("unload", "cancel")
        case "too_many_waiting":
            callers = sum(one.ticket is not None for one in edge.before.waiting)
            is_right = callers >= edge.before.policy.max_waiting
        case "not_loaded":
            held = edge.before.policy.held_s
            is_right = any(
                w.name == name and fact.at >= w.since + held for w in edge.before.waiting
            )
        case "server_start_failed" if isinstance(fact, facts.Wanted):
            is_cool = entry is not None and (entry.cool_until or 0.0) > fact.at
            is_right = is_its and is_cool and fact.kind != "load"
        case "server_start_failed":
            was_starting = entry is not None and entry.state is State.STARTING
            is_right = is_its and (was_starting or fact.trigger == "measure_failed")
        case "too_large" | "slot_occupied":
            return _fits_after_all(edge, name, category)
        case _:
            return f"unknown category {category}"
    return None if is_right else f"{category} without a reason"


def _fits_after_all(edge: Edge, name: str, category: str) -> str | None:
    entry, after = edge.after.find(name), edge.after
    if category == "slot_occupied" and edge.fact.trigger == "stuck" and edge.name == name:
        return None
    if edge.fact.trigger == "healthy" and edge.name == name:
        return None  # it took more than it was to fit itself into
    claim = entry.claim if entry is not None else None
    if claim is None:
        return f"{category}, and its need is not known"
    pinned = {e.name for e in after.entries if e.state is State.RESIDENT and e.definition.is_pinned}
    stuck = {e.name for e in after.entries if e.state is State.STUCK}
    room = after.ledger.budget - after.ledger.total(pinned)
    if category == "slot_occupied" and claim.fits(room - after.ledger.total(stuck)):
        return "slot_occupied, but it fits"
    if category == "slot_occupied" and not stuck:
        return "slot_occupied, but nothing is stuck"
    if category == "too_large" and claim.fits(room):
        is_preload = any(w.kind == "preload" for w in edge.before.waiting if w.name == name)
        return None if is_preload else "too_large, but it fits"
    return None


def inv_a_server_is_stopped_for_a_reason(edge: Edge) -> str | None:
    for stop in edge.stops:
        entry = edge.after.find(stop.name)
        if entry is not None and entry.state is not State.STOPPING:
            return f"{stop.name} is stopped, and is {entry.state}"
        if why := _spared(edge, stop):
            return f"{stop.name} is stopped ({stop.reason}): {why}"
    return None


def _spared(edge: Edge, stop: Stop) -> str | None:
    entry, fact = edge.after.find(stop.name), edge.fact
    before = edge.entry(stop.name)
    if entry is None or before is None:
        return "it is not there"
    own = edge.name == stop.name
    match stop.reason:
        case "reload" | "unload" | "removed" | "stuck":
            return None if own and fact.trigger in ("wanted", "unload", "removed") else "not asked"
        case "figure":
            return None if own and fact.trigger in ("sized", "healthy") else "no figure"
        case "shutdown":
            return None if fact.trigger == "shutdown" else "no shutdown"
        case "withdrawn":
            return "somebody waits" if any(edge.after.waiters_of(stop.name)) else None
        case "idle":
            return _not_unused(edge, entry)
        case "budget":
            is_over = edge.before.ledger.free.debt or fact.trigger in ("configured", "adopted")
            is_victim = before.state is State.RESIDENT or own
            if not is_over or not is_victim:
                return "the budget is kept"
    return _not_a_victim(edge, stop, entry)


def _not_unused(edge: Edge, entry: Entry) -> str | None:
    ttl = entry.definition.idle_ttl_s
    use = next((use for use in edge.fact.uses if use.name == entry.name), None)
    if entry.definition.is_pinned or ttl is None or use is None or use.is_inside:
        return "it does not idle"
    since = entry.healthy_at if use.last_used_at is None else use.last_used_at
    return None if edge.fact.at >= since + ttl else "its idle time is not over"


def _not_a_victim(edge: Edge, stop: Stop, entry: Entry) -> str | None:
    use = next((use for use in edge.fact.uses if use.name == entry.name), None)
    loads = {waiter.ticket for waiter in edge.before.waiting if waiter.kind == "load"}
    granted = {c.ticket for c in edge.commands if isinstance(c, Grant) and c.name == stop.name}
    is_granted = bool(granted - loads)  # who only wanted it loaded is not inside
    if entry.definition.is_pinned:
        return "it is pinned"
    if use is None:
        return "its gate was not open"
    if stop.if_idle and (use.is_inside or is_granted):
        return "somebody is inside"
    return None if stop.reason == "budget" else _too_early(edge, stop, entry)


def _too_early(edge: Edge, stop: Stop, entry: Entry) -> str | None:
    if edge.fact.at < entry.healthy_at + edge.before.policy.min_resident_s:
        return "it is too young"
    before = edge.entry(stop.name)
    just_healthy = edge.fact.trigger in ("healthy", "adopted") and edge.name == stop.name
    if before is None or (before.state is not State.RESIDENT and not just_healthy):
        return "it was not resident"
    everybody = (*edge.before.waiting, *edge.after.waiting)
    waiters = [one for one in everybody if one.name == stop.room_for]
    if all(one.kind == "preload" for one in waiters):
        return f"nobody but the house at its start waits for {stop.room_for}"
    overdue = [one for one in waiters if _is_overdue(edge, one)]
    if not stop.if_idle and not overdue:
        return "somebody is inside, and nobody is overdue"
    first = min(overdue, key=lambda one: one.since, default=None)
    for one in edge.before.waiting:
        if one is first:
            break
        came_later = first is not None and one.since > first.since
        if one.name == stop.name and one in edge.after.waiting and not came_later:
            return "it has not served those who waited for it"
    return None


def inv_healthy_grants_all_who_waited(edge: Edge) -> str | None:
    if not isinstance(edge.fact, facts.BecameHealthy):
        return None
    before, after = edge.entry(edge.fact.name), edge.after.find(edge.fact.name)
    came = before is not None and before.state is State.STARTING
    if came and after is not None and after.state is State.RESIDENT:
        granted = {one.ticket for one in edge.commands if isinstance(one, Grant)}
        for waiter in edge.before.waiters_of(edge.fact.name):
            waits = waiter.kind == "request" and waiter.ticket not in edge.fact.admitted
            if waiter.ticket is not None and waiter.ticket not in granted and not waits:
                return f"call {waiter.ticket} is not granted in the step into Resident"
    return None


def inv_a_failure_is_told(edge: Edge) -> str | None:
    """After a failed start nobody goes on waiting, but for the one more try after out of memory."""
    if not isinstance(edge.fact, facts.Emptied):
        return None
    before, after = edge.entry(edge.fact.name), edge.after.find(edge.fact.name)
    if before is None or after is None or before.state is not State.STARTING:
        return None
    if before.generation != edge.fact.generation:
        return None
    left = [one for one in edge.after.waiters_of(edge.fact.name) if one.kind != "restart"]
    is_oom = edge.fact.problem is not None and edge.fact.problem.reason == "out_of_memory"
    if left and not (is_oom and after.retries):
        return "its waiters are not told"
    if is_oom and before.retries and left:
        return "it is tried a third time"
    return None


def inv_a_failed_start_cools_down(edge: Edge) -> str | None:
    """Requests get the same problem for some time, without a new start."""
    if not isinstance(edge.fact, facts.Wanted):
        return None
    entry = edge.entry(edge.fact.name)
    if entry is None or entry.cool_until is None or edge.fact.kind == "load":
        return None
    refused = any(isinstance(one, Refuse) for one in edge.commands)
    if edge.fact.at < entry.cool_until and not refused:
        return "a request during the cool-down is not refused"
    return None


def inv_a_cool_down_follows_a_failed_start(edge: Edge) -> str | None:
    before = edge.entry(edge.name) if edge.name else None
    after = edge.after.find(edge.name) if edge.name else None
    told = any(
        isinstance(one, Refuse) and one.problem.category == "server_start_failed"
        for one in edge.commands
    )
    if told and before and after and before.state is State.STARTING:
        until = after.cool_until
        return None if until is not None and until > edge.fact.at else "no cool-down"
    return None


def inv_an_unload_cancels(edge: Edge) -> str | None:
    hands = facts.UnloadRequested | facts.CancelRequested
    if not isinstance(edge.fact, hands):
        return None
    entry = edge.after.find(edge.fact.name)
    is_resident = entry is not None and entry.state is State.RESIDENT
    left = edge.after.waiters_of(edge.fact.name)
    if any(waiter.kind != "request" or not is_resident for waiter in left):
        return f"somebody still waits for what was ended by {edge.fact.trigger}"
    return None


def inv_a_cancel_says_whether_it_has_ended_anything(edge: Edge) -> str | None:
    """What is resident stays."""
    fact = edge.fact
    for command in edge.commands:
        if not isinstance(command, AnswerCancelled) or not isinstance(fact, facts.CancelRequested):
            continue
        before = edge.entry(fact.name)
        was_starting = before is not None and before.state is State.STARTING
        kinds = {waiter.kind for waiter in edge.before.waiters_of(fact.name)}
        if before is not None and before.state is State.RESIDENT:
            kinds -= {"request"}
        waited = bool(kinds)
        if command.is_cancelled is not (was_starting or waited):
            return f"the cancel of {fact.name} is answered {command.is_cancelled}"
    if isinstance(fact, facts.CancelRequested):
        before, after = edge.entry(fact.name), edge.after.find(fact.name)
        is_resident = before is not None and before.state is State.RESIDENT
        if is_resident and (after is None or after.state is not State.RESIDENT):
            return f"a cancel has stopped {fact.name}, which was resident"
    return None


def inv_a_start_reserves(edge: Edge) -> str | None:
    for start in edge.commands:
        if not isinstance(start, Start):
            continue
        before, after = edge.entry(start.name), edge.after.find(start.name)
        was_empty = before is not None and (
            before.state is State.ABSENT
            or (edge.fact.trigger == "emptied" and edge.name == start.name)
        )
        if not was_empty:
            return f"start of {start.name}, which is {before.state if before else 'not there'}"
        if after is None or after.is_removed or after.state is not State.STARTING:
            return f"start of {start.name}, which is not Starting then"
        if start.reserved != edge.after.ledger.of(start.name).of_devices():
            return f"{start.name} is started with {start.reserved}, not with its reservation"
        claim = after.claim
        if not start.is_fitted and claim is not None and start.reserved != claim.of_devices():
            return f"{start.name} is started with less than it needs"
    return None


def inv_a_fitted_server_holds_its_figure(edge: Edge) -> str | None:
    """What it has not taken is free for others."""
    if not isinstance(edge.fact, facts.BecameHealthy) or edge.fact.figure is None:
        return None
    entry = edge.after.find(edge.fact.name)
    if entry is None or entry.state is not State.RESIDENT or entry.basis != "fitted":
        return None
    held = edge.after.ledger.of(entry.name).of_devices()
    return None if held == edge.fact.figure else f"it took {edge.fact.figure}, and holds {held}"


def inv_a_declared_figure_is_believed(edge: Edge) -> str | None:
    entry = edge.entry(edge.fact.name) if isinstance(edge.fact, facts.Sized) else None
    is_heeded = edge.after.ledger != edge.before.ledger or bool(edge.stops)
    if entry is not None and entry.basis == "declared" and is_heeded:
        return "the server's own figure is believed, and not what was declared"
    return None


def inv_a_figure_fails_nobody(edge: Edge) -> str | None:
    """Only what can never fit is refused, with the true figure."""
    refused = {one.problem.category for one in edge.commands if isinstance(one, Refuse)}
    if isinstance(edge.fact, facts.Sized) and refused - {"too_large", "slot_occupied"}:
        return f"callers are refused: {refused}"
    return None


def inv_a_restart_is_bounded(edge: Edge) -> str | None:
    """It waits for its backoff, and there are so many in a row."""
    known = {one for one in edge.before.waiting if one.kind == "restart"}
    for waiter in edge.after.waiting:
        if waiter.kind != "restart" or waiter in known:
            continue
        entry, policy = edge.after.find(waiter.name), edge.before.policy.restart
        if entry is None or entry.restarts > policy.limit:
            return f"one restart too many of {waiter.name}"
        if waiter.since < edge.fact.at + backoff_s(policy, entry.restarts):
            return f"{waiter.name} is restarted without a wait"
    return None


STEP_INVARIANTS: Final[tuple[Callable[[Edge], str | None], ...]] = (
    inv_everybody_is_answered_once,
    inv_the_house_gets_an_end,
    inv_a_refusal_has_its_reason,
    inv_a_server_is_stopped_for_a_reason,
    inv_healthy_grants_all_who_waited,
    inv_a_failure_is_told,
    inv_a_failed_start_cools_down,
    inv_a_cool_down_follows_a_failed_start,
    inv_an_unload_cancels,
    inv_a_cancel_says_whether_it_has_ended_anything,
    inv_a_start_reserves,
    inv_a_fitted_server_holds_its_figure,
    inv_a_declared_figure_is_believed,
    inv_a_figure_fails_nobody,
    inv_a_restart_is_bounded,
)


# -------------------------------------------------------------------------------- of one context
def inv_paper_is_within_the_budget(ctx: Context, scenario: Scenario) -> str | None:
    """Unless the budget has become smaller, or an adopted server holds more."""
    if len(scenario.budgets) > 1 or scenario.adopted:
        return None
    if ctx.ledger.free.debt:
        return f"reserved is {ctx.ledger.free.debt} more than the budget"
    return None


def inv_reserved_until_verified_empty(ctx: Context, scenario: Scenario) -> str | None:
    held = {name for name, _ in ctx.ledger.reservations}
    for entry in ctx.entries:
        if (entry.state in _IN_SLOT) != (entry.name in held):
            return f"{entry.name} is {entry.state}, reserved is {ctx.ledger.of(entry.name)}"
    if held - {entry.name for entry in ctx.entries}:
        return "something is reserved for no entry"
    return None


def inv_a_group_has_one_server(ctx: Context, scenario: Scenario) -> str | None:
    groups = Counter(
        entry.definition.group
        for entry in ctx.entries
        if entry.state in _IN_SLOT and entry.definition.group is not None
    )
    if any(count > 1 for count in groups.values()):
        return f"{dict(groups)} servers of a group"
    return None


def inv_max_resident(ctx: Context, scenario: Scenario) -> str | None:
    servers = sum(entry.state in _IN_SLOT for entry in ctx.entries)
    if 0 < ctx.policy.max_resident < servers:
        return f"{servers} servers"
    return None


def inv_a_start_is_wanted(ctx: Context, scenario: Scenario) -> str | None:
    for entry in ctx.entries:
        if entry.state is State.STARTING and not any(ctx.waiters_of(entry.name)):
            return f"{entry.name} is Starting, and nobody waits for it"
    return None


def inv_only_the_catalogue_is_waited_for(ctx: Context, scenario: Scenario) -> str | None:
    for waiter in ctx.waiting:
        entry = ctx.find(waiter.name)
        if entry is None or entry.is_removed:
            return f"somebody waits for {waiter.name}, which was removed"
    return None


def inv_a_removed_entry_ends(ctx: Context, scenario: Scenario) -> str | None:
    for entry in ctx.entries:
        if entry.is_removed and entry.state not in (State.STOPPING, State.STUCK):
            return f"{entry.name} was removed, and is {entry.state}"
    return None


def inv_a_try_belongs_to_its_waiters(ctx: Context, scenario: Scenario) -> str | None:
    for entry in ctx.entries:
        is_wanted = entry.state is State.STARTING or any(ctx.waiters_of(entry.name))
        if entry.retries and not is_wanted:
            return f"the second try of {entry.name} has no waiters"
        if entry.after and entry.state is not State.ABSENT:
            return f"{entry.name} is {entry.state} before {set(entry.after)} are empty"
    return None


def inv_an_emptying_is_going_on(ctx: Context, scenario: Scenario) -> str | None:
    """Who waits for an empty slot waits for something that happens."""
    for entry in ctx.entries:
        if entry.emptying and entry.state is not State.STOPPING:
            return f"somebody waits until {entry.name} is empty, which is {entry.state}"
    return None


def inv_nobody_waits_after_the_shutdown(ctx: Context, scenario: Scenario) -> str | None:
    if ctx.is_shutting_down and ctx.waiting:
        return "somebody waits"
    if ctx.is_shutting_down and any(
        entry.state in (State.STARTING, State.RESIDENT) for entry in ctx.entries
    ):
        return "something is not stopped"
    return None


def inv_the_waiting_room_is_bounded(ctx: Context, scenario: Scenario) -> str | None:
    callers = sum(waiter.ticket is not None for waiter in ctx.waiting)
    return f"{callers} callers wait" if callers > ctx.policy.max_waiting else None


def inv_nobody_waits_too_long(ctx: Context, scenario: Scenario) -> str | None:
    """In ticks, while slots take none: only the policy lets anybody wait."""
    bound = scenario.bound
    for waiter in ctx.waiting:
        if bound is not None and -waiter.since > bound:
            return f"{waiter.name} has waited {-waiter.since:g} ticks, and {bound} are enough"
        if waiter.gets_in and -waiter.since >= ctx.policy.held_s:
            return f"a request for {waiter.name} has waited {-waiter.since:g} ticks"
    return None


CONTEXT_INVARIANTS: Final[tuple[Callable[[Context, Scenario], str | None], ...]] = (
    inv_paper_is_within_the_budget,
    inv_reserved_until_verified_empty,
    inv_a_group_has_one_server,
    inv_max_resident,
    inv_a_start_is_wanted,
    inv_only_the_catalogue_is_waited_for,
    inv_a_removed_entry_ends,
    inv_a_try_belongs_to_its_waiters,
    inv_an_emptying_is_going_on,
    inv_nobody_waits_after_the_shutdown,
    inv_the_waiting_room_is_bounded,
    inv_nobody_waits_too_long,
)


# ---------------------------------------------------------------------------------- of one world
def _has_its_way(model: Model) -> bool:
    """Whether its server may take more than was reserved: it was declared, or fits itself."""
    return model.is_declared or model.fits_to is not None


def inv_memory_is_within_the_budget(world: World, scenario: Scenario) -> str | None:
    """What servers really take; a declared figure may be wrong, and a budget may shrink."""
    models = scenario.models
    if len(scenario.budgets) > 1 or scenario.adopted or any(_has_its_way(m) for m in models):
        return None
    taken = Amounts.total(slot.takes for slot in world.slots)
    if not taken.fits(amounts(scenario.budgets[0])):
        return f"servers take {taken}"
    return None


def inv_memory_is_reserved(world: World, scenario: Scenario) -> str | None:
    for number, slot in enumerate(world.slots):
        held = world.core.ctx.ledger.of(name_of(number))
        if slot.has_server and not held:
            return f"{name_of(number)} has a server ({slot.phase}) and no reservation"
        if not _has_its_way(scenario.models[number]) and not slot.takes.fits(held):
            return f"{name_of(number)} takes {slot.takes}, and has reserved {held}"
    return None


def inv_only_residents_are_open(world: World, scenario: Scenario) -> str | None:
    """A victim is closed in the step that chooses it. A gate may be open before that is heard."""
    for number, slot in enumerate(world.slots):
        state = world.core.state(number)
        if slot.gate == "open" and state not in (State.STARTING, State.RESIDENT):
            return f"{name_of(number)} is {state}, and its gate is open"
    return None


def inv_a_smaller_budget_is_kept(world: World, scenario: Scenario) -> str | None:
    """When there is too little, whatever can go is going: nothing waits for time or for traffic."""
    ctx = world.core.ctx
    going = {entry.name for entry in ctx.entries if entry.state is State.STOPPING}
    debt = (ctx.ledger.free + ctx.ledger.total(going)).debt
    for number, slot in enumerate(world.slots):
        entry = world.core.by_model[number]
        if entry is None or entry.state is not State.RESIDENT or slot.gate != "open":
            continue
        held = ctx.ledger.of(entry.name)
        if not entry.definition.is_pinned and any(held[account] for account, _ in debt.by_account):
            return f"{debt} too much is reserved, and {entry.name} stays"
    return None


def inv_absent_is_empty(world: World, scenario: Scenario) -> str | None:
    for number, slot in enumerate(world.slots):
        is_absent = world.core.state(number) is State.ABSENT
        if is_absent and (slot.has_server or slot.reports):
            return f"{name_of(number)} is Absent, and its slot is {slot.phase}"
    return None


def inv_a_resident_has_no_waiters(world: World, scenario: Scenario) -> str | None:
    """But for requests that have no place, and one that has ended, which is about to be heard."""
    for number, slot in enumerate(world.slots):
        name = name_of(number)
        if world.core.state(number) is not State.RESIDENT or slot.gate != "open":
            continue
        others = [w for w in world.core.ctx.waiters_of(name) if w.kind != "request"]
        if others or admitted(scenario, world, number):
            return f"somebody waits for {name}, which is Resident and open"
    return None


def inv_a_server_has_as_many_requests_as_places(world: World, scenario: Scenario) -> str | None:
    for number, slot in enumerate(world.slots):
        places = scenario.models[number].places
        if places is not None and slot.inside > places:
            return f"{slot.inside} requests are at {name_of(number)}"
    return None


WORLD_INVARIANTS: Final[tuple[Callable[[World, Scenario], str | None], ...]] = (
    inv_memory_is_within_the_budget,
    inv_memory_is_reserved,
    inv_only_residents_are_open,
    inv_a_smaller_budget_is_kept,
    inv_absent_is_empty,
    inv_a_resident_has_no_waiters,
    inv_a_server_has_as_many_requests_as_places,
)
IN_THE_CHECKER: Final = {
    "looking_again_does_nothing",
    "a_grant_enters_an_open_gate",
    "one_model_one_slot",
    "an_empty_slot_is_empty",
    "a_stop_has_a_server",
    "late_reports_are_dropped",
    "everything_comes_to_rest",
    "nobody_starves",
    "step_raised",
}
"""What the checker itself looks at: more than one step, or what commands do to slots."""
INVARIANTS: Final = IN_THE_CHECKER | {
    invariant.__name__
    for invariants in (STEP_INVARIANTS, CONTEXT_INVARIANTS, WORLD_INVARIANTS)
    for invariant in invariants
}
