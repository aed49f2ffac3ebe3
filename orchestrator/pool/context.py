"""The pool's memory between two facts: one frozen value, which actions replace.

Everything a decision depends on is in here, except how the gates are used: that arrives as evidence
on the fact. There is no claim on room that is not yet free: who gets it is worked out anew after
every fact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.pool.ledger import NO_LIMIT, SERVERS, Amounts, Ledger, group_account
from orchestrator.pool.states import State
from orchestrator.settings.request import LoadRequest

Source = Literal["declared", "exact", "estimate"]
Turns = tuple[tuple[str | None, float], ...]
"""What keys have had, in requests by weight, beyond the one that has had least."""
Basis = Source | Literal["fitted"]
"""Where a figure comes from; `fitted`: the server fits itself into what is reserved."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings of `[pool]`, seconds and numbers."""

    max_wait_s: float = 30.0  # after this long a waiter may end a server in use
    min_resident_s: float = 5.0  # nothing younger is evicted, whoever waits
    max_waiting: int = 256
    held_s: float = 600.0  # how long a request waits at most
    max_resident: int = 0  # 0: as many as fit
    restart: RestartPolicy = field(default_factory=RestartPolicy)  # of what ended by itself


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that a start needs, in MiB by device, and where the figure comes from.

    `least` is what the server can do with, if it may choose its context; None if it may not.
    """

    amounts: Amounts
    source: Source = "estimate"
    least: Amounts | None = None


@dataclass(frozen=True, slots=True)
class Definition:
    """What the catalogue says about an entry, as far as the pool decides by it."""

    need: Need | None  # None: to be measured before its first start
    size_bytes: int = 0  # of the files that a start reads
    request: LoadRequest | None = None  # what a start loads; no decision reads it
    weight: float = 1.0
    is_pinned: bool = False
    group: str | None = None
    idle_ttl_s: float | None = None  # stopped after this long without use; None = never
    restarts: bool = False  # after it has ended by itself


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose request it is: those for one model take turns by key, in the ratio of the weights."""

    key: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Waiter:
    """Who waits for a model: a lease, a request, a call, or without a ticket the house itself.

    Of requests only as many are at a server as it has places; so they also wait for a resident.
    """

    name: str
    kind: Literal["lease", "request", "load", "preload", "restart"]
    since: float  # a restart waits for nothing until then
    ticket: Ticket | None = None
    turn: Turn = field(default_factory=Turn)

    @property
    def gets_in(self) -> bool:
        """Whether it is to use the server, and not only to see it loaded."""
        return self.kind in ("lease", "request")


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue, and its slot as the pool knows it."""

    name: str
    definition: Definition
    state: State = State.ABSENT
    generation: Generation = Generation(0)  # of its last start
    edition: int = 0  # of its definition as a server
    healthy_at: float = 0.0  # while it is Resident
    is_measuring: bool = False
    is_changed: bool = False  # what is in the slot is not what the definition starts
    basis: Basis = "estimate"  # of the reservation of its last start
    is_removed: bool = False  # it is forgotten when its slot is empty
    server: Amounts | None = None  # the server's own figure
    retries: bool = False  # after out of memory it is tried once more
    after: frozenset[str] = frozenset()  # that try waits until these are empty
    failures: int = 0  # starts in a row
    failure: Problem | None = None  # of the last start; requests are refused with it
    cool_until: float | None = None
    restarts: int = 0  # in a row
    emptying: tuple[Ticket, ...] = ()  # calls that are answered when its slot is empty
    turns: Turns = ()  # of the keys whose requests wait, while they wait

    @property
    def places(self) -> Amounts:
        group = self.definition.group
        return Amounts.of({SERVERS: 1} if group is None else {SERVERS: 1, group_account(group): 1})

    @property
    def claim(self) -> Amounts | None:
        """What its next start reserves, places included; None before it is measured."""
        need = self.definition.need
        return None if need is None else need.amounts + self.places

    def with_need(self, need: Need) -> Entry:
        return replace(self, definition=replace(self.definition, need=need))


@dataclass(frozen=True, slots=True)
class Context:
    """The pool's memory."""

    policy: Policy = field(default_factory=Policy)
    devices: Amounts = field(default_factory=Amounts)  # the budget, MiB by device
    ledger: Ledger = field(default_factory=Ledger)
    entries: tuple[Entry, ...] = ()  # in the order in which they were defined
    waiting: tuple[Waiter, ...] = ()  # in the order in which they came
    generation: Generation = Generation(0)  # of the last start of all
    edition: int = 0  # of the last definition of a server
    is_shutting_down: bool = False
    timer_at: float | None = None  # when the timer fires, monotonic seconds

    def updated(self, **changes: Any) -> Context:
        return replace(self, **changes)

    def find(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)

    def waiters_of(self, name: str) -> Iterator[Waiter]:
        return (waiter for waiter in self.waiting if waiter.name == name)

    def changing(self, entry: Entry) -> Context:
        """Return the context with this entry in place of the one of its name."""
        entries = tuple(entry if known.name == entry.name else known for known in self.entries)
        return replace(self, entries=entries)

    def with_budget(self) -> Context:
        """Return the context whose ledger has the budget of these devices, groups and policy."""
        groups = {entry.definition.group for entry in self.entries} - {None}
        places = {group_account(group): 1 for group in groups if group is not None}
        places[SERVERS] = self.policy.max_resident or NO_LIMIT
        budget = self.devices + Amounts.of(places)
        return replace(self, ledger=Ledger(budget, self.ledger.reservations))
