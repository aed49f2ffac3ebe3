"""`step(ctx, fact) -> (ctx, commands)`: the pool's table, then its policy, once.

`settle` starts servers and chooses who goes. It works out anew from the ledger who gets which room:
a room that is being emptied is promised within one step only, so no claim can be counted twice,
forgotten, or held against another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.step import Interpreter
from orchestrator.pool import commands, guards
from orchestrator.pool.actions import ACTIONS, Step
from orchestrator.pool.context import Basis, Context, Entry, Waiter
from orchestrator.pool.facts import Fact
from orchestrator.pool.ledger import SERVERS, Amounts, is_place
from orchestrator.pool.policy import (
    Wait,
    candidate,
    cheapest,
    evictable,
    in_order,
    stays_until,
    unused_since,
)
from orchestrator.pool.states import State
from orchestrator.pool.table import TABLE, Row


class Stepped(NamedTuple):
    """The result of one fact."""

    ctx: Context
    commands: tuple[commands.Command, ...]


class PoolMachine:
    """An interpreter of a table; `replaced` guards and actions are used in place of the shipped."""

    def __init__(self, table: Sequence[Row] = TABLE, /, **replaced: Callable[..., Any]) -> None:
        functions = {**vars(guards), **ACTIONS, **replaced}
        self._interpreter = Interpreter(State, table, functions)

    def step(self, ctx: Context, fact: Fact) -> Stepped:
        """Return the next context and the commands to carry out.

        Raises:
            LookupError: the table has no row for this fact, which is a bug.
        """
        step: Step[Fact] = Step(ctx, fact)
        name: str | None = getattr(fact, "name", None)
        after = self._interpreter.fire(state_for(ctx, name), step)
        entry = None if name is None else step.ctx.find(name)
        if entry is not None and entry.state is not after:
            step.change(entry.name, state=after)
        settle(step)
        return Stepped(step.ctx, tuple(step.emitted))


def state_for(ctx: Context, name: str | None) -> State:
    """Return the state in which the table is asked: an entry that is not there is Absent."""
    if name is None:
        return State.POOL
    entry = ctx.find(name)
    return State.ABSENT if entry is None else entry.state


@cache
def pool_machine() -> PoolMachine:
    """Return the interpreter of the shipped table, built once."""
    return PoolMachine()


def step(ctx: Context, fact: Fact) -> Stepped:
    """Step the shipped table; see `PoolMachine.step`."""
    return pool_machine().step(ctx, fact)


# ------------------------------------------------------------------------------------- the policy
def settle(s: Step[Fact]) -> None:
    """Decide what follows from the ledger, the waiting room, the clock and the use of the gates."""
    _refuse_late(s)
    _stop_unused(s)
    _keep_to_budget(s)
    wakes: list[float] = []
    if s.ctx.waiting:
        _refuse_impossible(s)
        wakes = _place(s)
    _end_tries(s)
    _set_timer(s, wakes)


def _refuse_late(s: Step[Fact]) -> None:
    """Answer the requests that have waited `held_s`, and end the starts that nobody waits for."""
    late = [one for one in s.ctx.waiting if one.gets_in and s.fact.at >= _held_until(s, one)]
    for name in dict.fromkeys(one.name for one in late):
        held_s, retry_s = s.ctx.policy.held_s, s.ctx.policy.max_wait_s
        is_there = s.entry_of(name).state is State.RESIDENT
        what = "had no free slot" if is_there else "was not loaded"
        message = f"{name} {what} within {held_s:g} s: try again later"
        problem = Problem("not_loaded", message, retry_after_s=max(1.0, retry_s))
        s.refuse((one for one in late if one.name == name), problem)
        is_wanted = any(s.ctx.waiters_of(name))
        if not is_wanted and s.entry_of(name).state is State.STARTING:
            s.stop(name, "withdrawn")


def _held_until(s: Step[Fact], waiter: Waiter) -> float:
    return waiter.since + s.ctx.policy.held_s


def _end_tries(s: Step[Fact]) -> None:
    """A second try after out of memory belongs to those who waited then, turns to who waits."""
    for entry in s.ctx.entries:
        is_under_way = entry.state is State.STARTING or any(s.ctx.waiters_of(entry.name))
        if entry.retries and not is_under_way:
            s.change(entry.name, retries=False, after=frozenset())
        if entry.turns and not any(w.kind == "request" for w in s.ctx.waiters_of(entry.name)):
            s.change(entry.name, turns=())


def _idle_until(s: Step[Fact], entry: Entry) -> float | None:
    """Return when a resident has been unused for its `idle_ttl_s`, as far as is known now."""
    use, ttl_s = s.uses.get(entry.name), entry.definition.idle_ttl_s
    if entry.state is not State.RESIDENT or use is None or ttl_s is None:
        return None
    if entry.definition.is_pinned:
        return None
    return ttl_s + (s.fact.at if use.is_inside else unused_since(entry, use))


def _stop_unused(s: Step[Fact]) -> None:
    for entry in s.ctx.entries:
        until = _idle_until(s, entry)
        if until is not None and s.fact.at >= until and not s.uses[entry.name].is_inside:
            s.stop(entry.name, "idle", if_idle=True)


def _keep_to_budget(s: Step[Fact]) -> None:
    """After the budget has become smaller, evict until it is kept, or nothing can be evicted."""
    over = _soon(s).debt
    if not over:
        return
    candidates = [
        candidate(s.ctx, entry, s.uses[entry.name], s.fact.at)
        for entry in s.ctx.entries
        if entry.state is State.RESIDENT and entry.name in s.uses and not entry.definition.is_pinned
    ]
    possible = Amounts.total(one.frees for one in candidates)
    lack = Amounts.of({account: min(n, possible[account]) for account, n in over.by_account})
    for name in cheapest(lack, candidates) or ():
        s.stop(name, "budget", if_idle=not s.uses[name].is_inside)


def _soon(s: Step[Fact]) -> Amounts:
    """Return what is free when everything that is Stopping has ended."""
    staying = [entry.name for entry in s.ctx.entries if entry.state is not State.STOPPING]
    return s.ctx.ledger.budget - s.ctx.ledger.total(staying)


def _held_by(s: Step[Fact], state: State, *, pinned_only: bool = False) -> Amounts:
    return s.ctx.ledger.total(
        entry.name
        for entry in s.ctx.entries
        if entry.state is state and (entry.definition.is_pinned or not pinned_only)
    )


def _allowed(s: Step[Fact]) -> Amounts:
    """Return what a model may have at most: the budget without what pinned residents hold."""
    return s.ctx.ledger.budget - _held_by(s, State.RESIDENT, pinned_only=True)


def _is_placed(entry: Entry) -> bool:
    return entry.state not in (State.ABSENT, State.STOPPING)


def _claim(entry: Entry, allowed: Amounts) -> tuple[Amounts, Basis] | None:
    """Return what a start reserves, and on which basis; None before it is measured."""
    claim, need = entry.claim, entry.definition.need
    if claim is None or need is None:
        return None
    if need.least is not None and not claim.fits(allowed):
        fitted = claim.within(allowed)
        if fitted is not None and (need.least + entry.places).fits(fitted):
            return fitted, "fitted"
    return claim, need.source


def _refuse_impossible(s: Step[Fact]) -> None:
    """Refuse what cannot fit, whoever goes: pins, figures and stuck servers change at any time."""
    allowed, stuck = _allowed(s), _held_by(s, State.STUCK)
    for name in sorted({waiter.name for waiter in s.ctx.waiting}):
        entry = s.entry_of(name)
        claimed = _claim(entry, allowed)
        if _is_placed(entry) or claimed is None:
            continue
        claim, _ = claimed
        if not claim.fits(allowed):
            s.give_up(name, _too_large(s, name, claim.beyond(allowed)))
        elif not claim.fits(allowed - stuck):
            message = f"{name} does not fit beside a server that could not be stopped"
            s.give_up(name, Problem("slot_occupied", f"{message}: try again later"))


def _too_large(s: Step[Fact], name: str, lack: Amounts) -> Problem:
    """Name the need, the budget and what pins hold, of the first account that is not enough."""
    claim, budget = s.entry_of(name).claim or Amounts(), s.ctx.ledger.budget
    pins = _held_by(s, State.RESIDENT, pinned_only=True)
    account = lack.by_account[0][0]
    if account == SERVERS:
        message = f"{name} does not fit beside the pinned models, which fill max_resident"
    elif is_place(account):
        message = f"{name} does not fit beside a pinned model of its {account}"
    else:
        message = (
            f"{name} needs {claim[account]} MiB of {account}, but the budget is "
            f"{budget[account]} MiB, of which pinned models hold {pins[account]} MiB"
        )
    remedy = "unpin a model" if pins.by_account else "raise memory of the pool"
    return Problem("too_large", f"{message}: {remedy}, or choose a smaller one")


class _Room:
    """What this step may still give away, and when to look again if it is not enough.

    `free` is free now, `soon` when everything that is Stopping has ended. What one model takes, or
    waits for, is taken from both: a model behind it that has other room to come must not begin in
    the free part of its room, or a large model never sees all of its room free at one time.
    """

    def __init__(self, free: Amounts, soon: Amounts) -> None:
        self.free = free
        self.soon = soon
        self.wakes: list[float] = []
        self.is_blocked = False

    def take(self, claim: Amounts) -> None:
        self.free -= claim
        self.soon -= claim


def _place(s: Step[Fact]) -> list[float]:
    """Give room to the models that wait, in order. Return when to look again."""
    room, allowed = _Room(s.ctx.ledger.free, _soon(s)), _allowed(s)
    is_known, waits = True, _waits(s)
    for wait in in_order(waits, s.ctx.policy.max_wait_s, s.fact.at):
        claimed = _claim(s.entry_of(wait.name), allowed)
        if claimed is None:
            _measure(s, wait.name)
            is_known = False
        elif not is_known and _is_preload(s, wait.name):
            continue  # those before it come first
        elif _make_room(s, room, wait, claimed[0]):
            is_free = claimed[0].fits(room.free)
            room.take(claimed[0])
            if is_free:
                _start(s, wait.name, *claimed)
    if len(_waits(s)) > len(waits):
        return _place(s)  # requests wait for a place at a victim: now they wait for room
    if room.is_blocked:
        residents = (e for e in s.ctx.entries if e.state is State.RESIDENT)
        room.wakes += [stays_until(s.ctx, entry) for entry in residents]
    return room.wakes


def _waits(s: Step[Fact]) -> list[Wait]:
    """Return the longest wait for each model that could be started, in order of arrival."""
    longest: dict[str, float] = {}
    for waiter in s.ctx.waiting:
        if waiter.since <= s.fact.at and not _is_placed(s.entry_of(waiter.name)):
            longest[waiter.name] = min(waiter.since, longest.get(waiter.name, waiter.since))
    return [Wait(name, at, s.entry_of(name).definition.weight) for name, at in longest.items()]


def _measure(s: Step[Fact], name: str) -> None:
    entry = s.entry_of(name)
    if not entry.is_measuring:
        s.emit(commands.Measure(name, entry.edition))
        s.change(name, is_measuring=True)


def _is_preload(s: Step[Fact], name: str) -> bool:
    """Whether only the house waits for it, at the start."""
    return all(waiter.kind == "preload" for waiter in s.ctx.waiters_of(name))


def _make_room(s: Step[Fact], room: _Room, wait: Wait, claim: Amounts) -> bool:
    """Whether the model has its room, now or when what is Stopping has ended.

    For who is overdue and cannot be placed the room is set aside: nothing behind it may take it.
    """
    if claim.fits(room.soon):
        return True
    if _is_preload(s, wait.name):
        message = f"there is no room to preload {wait.name}: its first request loads it"
        s.give_up(wait.name, Problem("too_large", message))
        return False
    overdue_at = wait.overdue_at(s.ctx.policy.max_wait_s)
    is_overdue = s.fact.at >= overdue_at
    overdue = wait.name if is_overdue else None
    candidates = evictable(s.ctx, s.uses, s.fact.at, overdue=overdue)
    victims = cheapest(claim.beyond(room.soon), candidates)
    for name in victims or ():
        room.soon += s.ctx.ledger.of(name)
        is_idle = not s.uses[name].is_inside
        s.stop(name, "room", if_idle=is_idle, room_for=wait.name)
    if victims is not None:
        return True
    room.is_blocked = True
    if not is_overdue:
        room.wakes.append(overdue_at)
    if is_overdue or s.entry_of(wait.name).retries:
        room.take(claim)
    return False


def _start(s: Step[Fact], name: str, claim: Amounts, basis: Basis) -> None:
    """Start it, now that its room is free, unless its slot or its second try has to wait."""
    entry = s.entry_of(name)
    if entry.state is State.ABSENT and not entry.after:
        generation = Generation(s.ctx.generation + 1)
        s.put(ledger=s.ctx.ledger.reserving(name, claim), generation=generation)
        s.change(name, state=State.STARTING, generation=generation, basis=basis)
        held, is_fitted = claim.of_devices(), basis == "fitted"
        s.emit(commands.Start(name, generation, held, is_fitted, entry.definition.request))


def _set_timer(s: Step[Fact], wakes: list[float]) -> None:
    """Set the timer to the first moment at which time alone changes anything.

    A timer that is earlier stays: a resident in use would move it with every step.
    """
    wakes += [_held_until(s, waiter) for waiter in s.ctx.waiting if waiter.gets_in]
    wakes += [waiter.since for waiter in s.ctx.waiting]  # of a restart, when its backoff is over
    wakes += [until for e in s.ctx.entries if (until := _idle_until(s, e)) is not None]
    first = min((wake for wake in wakes if wake > s.fact.at), default=None)
    known = s.ctx.timer_at
    if first is not None and known is not None and s.fact.at < known <= first:
        return
    if first != known:
        s.put(timer_at=first)
        s.emit(commands.SetTimer(first))
