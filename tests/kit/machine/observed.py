"""What an invariant looks at: one world, or one step of the machine between two.

A world is the machine's own state and context next to what the operating system and the callers
know to be true: an abstract one in the checker, a recorded one over the real owner. Nothing in
the invariants believes the machine about itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import Accept, Answer, Command, Settle
from orchestrator.machine.context import Context, EffectInFlight
from orchestrator.machine.facts import Completion, Fact
from orchestrator.machine.states import State
from orchestrator.settings.target import Target


class Process(NamedTuple):
    """A process of the slot that is alive now; generation 0 is a stray nobody recorded."""

    pid: int
    generation: Generation
    model: str


class World(Protocol):
    """One instant: what the machine believes, and what is true."""

    @property
    def state(self) -> State: ...
    @property
    def ctx(self) -> Context: ...
    @property
    def alive(self) -> frozenset[Process]:
        """Every process of the slot that is alive."""

    @property
    def in_flight(self) -> tuple[EffectInFlight, ...]:
        """What is really being carried out."""

    @property
    def beside(self) -> frozenset[tuple[str, Generation]]:
        """What is being done for loads that wait, and for prefetches: `resolve` or `prefetch`."""

    @property
    def concluded(self) -> frozenset[Generation]:
        """Loads of which it has been said what became of them."""

    @property
    def told_ended(self) -> frozenset[int]:
        """The server on record, if it has been said that it has ended."""

    @property
    def tokens(self) -> frozenset[Generation]:
        """Loads whose cancel token has been set."""

    @property
    def unanswered(self) -> frozenset[Ticket]:
        """Calls that have arrived, are not answered, and whose caller is still there."""

    @property
    def ended(self) -> frozenset[Ticket]:
        """Loads that were cancelled, unloaded or withdrawn before they were answered."""

    @property
    def accepted(self) -> Mapping[Ticket, Generation]:
        """Which load a call was told it is."""

    @property
    def asked(self) -> Mapping[Ticket, Target]:
        """What the load calls asked for."""

    @property
    def holding(self) -> frozenset[Ticket]:
        """Leases that were granted and not given back; the holder is still there."""

    @property
    def was_shut_down(self) -> bool:
        """A shutdown has arrived."""

    @property
    def is_quiescent(self) -> bool:
        """Nothing more happens by itself: no effect, no fact on its way, no timer."""


@dataclass(frozen=True, slots=True)
class Edge:
    """One step of the machine: `before` is the world at the moment the fact is processed."""

    before: World
    fact: Fact
    after: World
    commands: tuple[Command, ...]


def pids(world: World) -> str:
    return ", ".join(str(pid) for pid in sorted(p.pid for p in world.alive)) or "nothing"


def has_changed(edge: Edge) -> bool:
    before, after = edge.before, edge.after
    return before.state is not after.state or before.ctx != after.ctx


def answers(edge: Edge) -> dict[Ticket, Answer]:
    return {c.ticket: c.answer for c in edge.commands if isinstance(c, Settle)}


def category(answer: Answer | None) -> str | None:
    return answer.category if isinstance(answer, Problem) else None


def is_owed(completion: Completion, world: World) -> bool:
    """Is something in flight that may report this?"""
    under_way = (*((e.kind, e.generation) for e in world.in_flight), *world.beside)
    return (completion.trigger, completion.generation) in owed_by(under_way)


def owed_by(under_way: Iterable[tuple[str, Generation]]) -> set[tuple[str, Generation]]:
    """Return the triggers of what may be reported by what is being done, with its generation."""
    return {(trigger, generation) for kind, generation in under_way for trigger in _ENDS[kind]}


_ENDS = {
    "kill": ("emptied", "kill_failed"),
    "resolve": ("resolved", "fetch_failed"),
    "prefetch": ("fetched", "fetch_failed"),
    "download": ("fetched", "fetch_failed"),
    "spawn": ("spawned", "spawn_failed"),
    "probe": ("ready", "not_ready"),
}


def is_known(accept: Accept, world: World) -> bool:
    """Joined, or already loaded: the generation existed before."""
    return accept.generation <= world.ctx.generation
