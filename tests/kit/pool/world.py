"""One instant of an abstract machine room around the real pool: slots, gates, callers, clock.

Callers have no identity: those who want nothing are a number, those who hold a lease a count of
each gate, and those who wait are renumbered by place. Time is counted in ticks, relative to now,
and saturates. So a world with endless callers is finite, and starvation is a cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final, Literal, NamedTuple

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.pool import facts
from orchestrator.pool.context import Context, Definition, Entry, Need, Policy, Waiter
from orchestrator.pool.facts import Fact, Use
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.policy import in_turn
from orchestrator.pool.states import State

Phase = Literal["none", "spawn", "sized", "loading", "up", "drain", "dying", "ghost"]
Gate = Literal["new", "open", "shut"]
Size = tuple[int, ...]  # MiB of D0, D1 …
NEVER: Final = 1e6  # ticks
_FAR: Final = 1e3  # a timer beyond that never fires here
EMPTYING: Final = 1000  # tickets of calls that wait for an empty slot begin here
FAULTS: Final = (
    *("fail", "oom", "crash", "stuck", "load", "force", "unload", "cut", "cancel", "remove", "add"),
    *("change", "shutdown", "budget", "unmeasurable", "preload", "adopt", "forget"),
)
"""What may go wrong or be done by hand, each as often as its budget says."""
PROBLEMS: Final = {
    "failed": Problem("server_start_failed", "it failed", reason="exited"),
    "oom": Problem("server_start_failed", "it has no memory", reason="out_of_memory"),
}


@dataclass(frozen=True, slots=True)
class Model:
    """An entry of the catalogue, and the truth about it.

    Attributes:
        size: What the catalogue or the estimate says.
        exact: What the server takes; None: the same.
        changed: What it takes after the catalogue has changed.
        is_fitted: It can do with less than it needs; then it takes `fits_to` (None: all of it).
        places: Callers make requests, of which so many are at a server; None: they take leases.
    """

    size: Size = (1,)
    exact: Size | None = None
    changed: Size = (1,)
    is_declared: bool = False
    is_pinned: bool = False
    weight: float = 1.0
    group: str | None = None
    ttl: float | None = None
    restarts: bool = False
    is_fitted: bool = False
    fits_to: Size | None = None
    is_measured: bool = True
    places: int | None = None

    @property
    def asks(self) -> Literal["lease", "request"]:
        return "lease" if self.places is None else "request"

    def truth(self, variant: int) -> Size:
        return self.changed if variant else self.exact or self.size

    def estimate(self, variant: int) -> Amounts:
        return amounts(self.changed if variant else self.size)

    def definition(self, variant: int) -> Definition:
        """Return its definition; `size_bytes` tells the variant, and is no matter otherwise."""
        source: Literal["declared", "estimate"] = "declared" if self.is_declared else "estimate"
        least = amounts(tuple(min(1, mib) for mib in self.size)) if self.is_fitted else None
        return Definition(
            Need(self.estimate(variant), source, least) if self.is_measured else None,
            size_bytes=variant,
            weight=self.weight,
            is_pinned=self.is_pinned,
            group=self.group,
            idle_ttl_s=self.ttl,
            restarts=self.restarts,
        )


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is explored.

    Attributes:
        budgets: MiB by device; the fault `budget` takes the next one.
        clients: Callers that ask again and again, for any of `asks` (None: all models).
        faults: Budgets of `FAULTS`.
        leaves: Waiters may leave.
        is_slow: A report of a slot is heard some time after it was posted.
        has_late: Reports of earlier starts arrive at any time.
        is_urgent: The clock stands while a slot or a report can go on.
        bound: No waiter is older than so many ticks; with `is_urgent`.
        preload: Models that the house wants at the start.
        adopted: Models whose servers a dead owner has left.
    """

    models: tuple[Model, ...]
    budgets: tuple[Size, ...] = ((1,),)
    policy: Policy = field(default_factory=lambda: ticks())
    clients: int = 3
    asks: tuple[int, ...] | None = None
    faults: Mapping[str, int] = field(default_factory=dict)
    leaves: bool = True
    is_slow: bool = True
    has_late: bool = False
    is_urgent: bool = False
    bound: int | None = None
    preload: tuple[int, ...] = ()
    adopted: tuple[int, ...] = ()

    @property
    def cap(self) -> float:
        """The age at which time saturates."""
        policy = self.policy
        ages = [policy.max_wait_s, policy.min_resident_s, (self.bound or 0) + 1.0]
        ages += [model.ttl for model in self.models if model.ttl is not None]
        return max(ages + [policy.held_s] * (policy.held_s < NEVER))

    @property
    def uses_age(self) -> bool:
        """Whether it matters when a gate was used last."""
        return any(model.ttl is not None for model in self.models)


def ticks(
    max_wait: float = 1.0,
    min_resident: float = 1.0,
    max_waiting: int = 99,
    held: float = NEVER,
    max_resident: int = 0,
    restart_limit: int = 2,
) -> Policy:
    """Return a policy in ticks."""
    restart = RestartPolicy(backoff_s=1.0, limit=restart_limit, stable_after_s=NEVER)
    return Policy(max_wait, min_resident, max_waiting, held, max_resident, restart)


def name_of(model: int) -> str:
    return "ABCDEFGH"[model]


def amounts(size: Size) -> Amounts:
    return Amounts.of({f"D{n}": mib for n, mib in enumerate(size)})


class Report(NamedTuple):
    """What a slot has posted."""

    trigger: str
    why: str = ""


class Slot(NamedTuple):
    """A slot and its server."""

    phase: Phase = "none"
    gate: Gate = "shut"
    inside: int = 0
    reports: tuple[Report, ...] = ()
    why: str = "stopped"
    figure: Amounts = Amounts()  # the server's own, before it reads a weight
    fits: Amounts = Amounts()  # what it will take
    takes: Amounts = Amounts()  # what it has taken
    used: float | None = None  # when a lease ended or began last; None: not since it opened

    @property
    def has_server(self) -> bool:
        return self.phase != "none"

    @property
    def is_at_work(self) -> bool:
        """Whether something happens in it by itself."""
        return bool(self.reports) or self.phase not in ("none", "up", "ghost")


class Core:
    """The pool's context; one object for equal ones, so that worlds are compared by identity."""

    __slots__ = ("by_model", "ctx", "requests", "waited_for")

    def __init__(self, ctx: Context, count: int) -> None:
        self.ctx = ctx
        self.by_model: tuple[Entry | None, ...] = tuple(
            ctx.find(name_of(model)) for model in range(count)
        )
        self.waited_for = frozenset(waiter.name for waiter in ctx.waiting)
        self.requests: dict[str, tuple[int, ...]] = {
            entry.name: tuple(
                int(waiter.ticket)
                for waiter in in_turn(ctx.waiters_of(entry.name), entry.turns)
                if waiter.kind == "request" and waiter.ticket is not None
            )
            for entry in ctx.entries
        }

    def state(self, model: int) -> State:
        entry = self.by_model[model]
        return State.ABSENT if entry is None else entry.state


class World(NamedTuple):
    """One instant."""

    core: Core
    slots: tuple[Slot, ...]
    idle: int  # callers with nothing to do
    left: tuple[int, ...]  # budgets of FAULTS
    measures: tuple[tuple[int, int], ...] = ()  # model and edition
    budget: int = 0  # index of the budget

    def with_slot(self, model: int, slot: Slot) -> World:
        return self._replace(slots=(*self.slots[:model], slot, *self.slots[model + 1 :]))

    def spending(self, fault: str) -> World | None:
        """Return the world with one fault less to come, or None if there is none left."""
        at = FAULTS.index(fault)
        if not self.left[at]:
            return None
        return self._replace(left=(*self.left[:at], self.left[at] - 1, *self.left[at + 1 :]))


class Key(NamedTuple):
    """A fact, with little to hash: its evidence is one letter for each gate."""

    trigger: str
    model: int = -1
    ticket: int = -1
    flag: bool = False
    why: str = ""
    number: int = 1
    has_entered: bool = False
    admitted: tuple[int, ...] = ()  # tickets
    gates: tuple[tuple[str, float | None], ...] = ()

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        return tuple(map(Ticket, self.admitted))


def gates_of(slots: tuple[Slot, ...]) -> tuple[tuple[str, float | None], ...]:
    return tuple(
        ("" if s.gate != "open" else "busy" if s.inside else "idle", s.used) for s in slots
    )


def admitted(scenario: Scenario, world: World, number: int) -> tuple[int, ...]:
    """Return the tickets of the requests that get a model's free places, as the owner tries."""
    slot, places = world.slots[number], scenario.models[number].places
    if places is None or slot.gate != "open":
        return ()
    return world.core.requests.get(name_of(number), ())[: max(0, places - slot.inside)]


def fact_of(scenario: Scenario, key: Key) -> Fact:
    """Return the fact of a key, now."""
    uses = tuple(
        Use(name_of(model), gate == "busy", used)
        for model, (gate, used) in enumerate(key.gates)
        if gate
    )
    return replace(_FACTS[key.trigger](scenario, key, name_of(key.model)), uses=uses)


_NOW: Final = 0.0
_FACTS: Final[dict[str, Callable[[Scenario, Key, str], Fact]]] = {
    "wanted": lambda s, k, name: facts.Wanted(
        name,
        Ticket(k.ticket),
        "load" if k.why == "load" else s.models[k.model].asks,
        _NOW,
        k.flag,
        has_entered=k.has_entered,
    ),
    "preload": lambda s, k, name: facts.Preloaded(name, _NOW),
    "withdrawn": lambda s, k, name: facts.Withdrawn(name, Ticket(k.ticket), _NOW),
    "cancel": lambda s, k, name: facts.CancelRequested(name, Ticket(k.ticket), _NOW),
    "unload": lambda s, k, name: facts.UnloadRequested(name, Ticket(k.ticket), _NOW, k.flag),
    "defined": lambda s, k, name: facts.Defined(
        name, s.models[k.model].definition(k.number), _NOW, k.flag
    ),
    "removed": lambda s, k, name: facts.Removed(name, _NOW, Ticket(k.ticket)),
    "measured": lambda s, k, name: facts.Measured(
        name, k.number, Need(s.models[k.model].estimate(int(k.flag))), _NOW
    ),
    "measure_failed": lambda s, k, name: facts.MeasureFailed(
        name, k.number, PROBLEMS["failed"], _NOW
    ),
    "adopted": lambda s, k, name: facts.Adopted(
        name, Generation(1), amounts(s.models[k.model].truth(0)), _NOW, k.has_entered, k.tickets
    ),
    "sized": lambda s, k, name: facts.Sized(name, Generation(k.number), key_amounts(k.why), _NOW),
    "healthy": lambda s, k, name: facts.BecameHealthy(
        name, Generation(k.number), _NOW, key_amounts(k.why), k.has_entered, k.tickets
    ),
    "leaving": lambda s, k, name: facts.Leaving(name, Generation(k.number), _NOW),
    "emptied": lambda s, k, name: facts.Emptied(
        name, Generation(k.number), _NOW, PROBLEMS.get(k.why)
    ),
    "stuck": lambda s, k, name: facts.BecameStuck(name, Generation(k.number), _NOW),
    "look": lambda s, k, name: facts.Looked(_NOW, k.tickets),
    "shutdown": lambda s, k, name: facts.ShutdownRequested(_NOW),
    "configured": lambda s, k, name: facts.Configured(s.policy, amounts(s.budgets[k.number]), _NOW),
}


def key_amounts(text: str) -> Amounts:
    """Return the amounts that `amounts_key` has written."""
    parts = (part.split("=") for part in text.split(","))
    return Amounts.of({device: int(mib) for device, mib in parts})


def amounts_key(some: Amounts) -> str:
    return ",".join(f"{device}={mib}" for device, mib in some.by_account)


# ---------------------------------------------------------------------------------- one canonical
def canonical(ctx: Context) -> Context:
    """Return the context without what no decision reads, and with its tickets by place."""
    waiting = tuple(
        waiter if waiter.ticket is None else replace(waiter, ticket=Ticket(place))
        for place, waiter in enumerate(ctx.waiting)
    )
    timer = ctx.timer_at
    return replace(
        ctx,
        entries=tuple(map(_plain, ctx.entries)),
        waiting=waiting,
        timer_at=NEVER if timer is not None and timer > _FAR else timer,
        generation=Generation(0),  # the next start is generation 1 again
    )


@cache
def _plain(entry: Entry) -> Entry:
    emptying = tuple(Ticket(EMPTYING + n) for n in range(len(entry.emptying)))
    definition, basis = entry.definition, entry.basis
    if definition.need is not None and definition.need.source == "estimate":  # as good as exact
        definition = replace(definition, need=replace(definition.need, source="exact"))
    if basis == "estimate" or entry.state is State.ABSENT:
        basis = "exact"
    changes: dict[str, Any] = {
        "failures": min(entry.failures, 2),  # a cool-down of 4 ticks is long enough here
        "definition": definition,
        "basis": basis,
        "server": None,
        "emptying": emptying,
    }
    changes["generation"] = Generation(int(entry.state is not State.ABSENT))
    if entry.state is not State.RESIDENT:
        changes["healthy_at"] = 0.0
    if entry.cool_until is None:
        changes["failure"] = None
    return replace(entry, **changes)


def later(ctx: Context, cap: float) -> Context:
    """Return the context one tick later."""

    timer = ctx.timer_at
    return canonical(
        replace(
            ctx,
            entries=tuple(_aged(entry, cap) for entry in ctx.entries),
            waiting=tuple(_waited(waiter, cap) for waiter in ctx.waiting),
            timer_at=None if timer is None else timer - 1.0,
        )
    )


@cache
def _aged(entry: Entry, cap: float) -> Entry:
    cool = entry.cool_until
    healthy_at = max(entry.healthy_at - 1.0, -cap) if entry.state is State.RESIDENT else 0.0
    cool_until = None if cool is None or cool <= 1.0 else cool - 1.0
    return replace(entry, healthy_at=healthy_at, cool_until=cool_until)


@cache
def _waited(waiter: Waiter, cap: float) -> Waiter:
    return replace(waiter, since=max(waiter.since - 1.0, -cap))
