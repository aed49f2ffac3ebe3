"""What invariants check: one world, or one step of the machine between two worlds.

A world has the machine's state and context, and beside them what is true for the operating system
and the callers. It is abstract in the checker, and recorded over the real owner. No invariant
trusts the machine about itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import Accept, Answer, Command, Settle
from orchestrator.machine.context import Context, EffectInFlight
from orchestrator.machine.facts import Completion, Fact
from orchestrator.machine.states import State
from orchestrator.settings.target import Target


class Process(NamedTuple):
    """A live process of the slot; generation 0 is a stray that was never recorded.

    One that `is_left` was started by a server, and has outlived it and its keeper. One that
    `is_hung` lives, and will neither answer nor work.
    """

    pid: int
    generation: Generation
    model: str
    is_left: bool = False
    is_hung: bool = False


class World(Protocol):
    """One instant: the memory of the machine, and what is true."""

    @property
    def state(self) -> State: ...
    @property
    def ctx(self) -> Context: ...
    @property
    def alive(self) -> frozenset[Process]:
        """Every process of the slot that is alive."""

    @property
    def in_flight(self) -> tuple[EffectInFlight, ...]:
        """The effects that are really in progress."""

    @property
    def beside(self) -> frozenset[tuple[str, Generation]]:
        """What is in progress besides: `resolve`, `prefetch`, or `look_up` with its ticket."""

    @property
    def concluded(self) -> frozenset[Generation]:
        """Loads that were concluded."""

    @property
    def reported_ended(self) -> frozenset[int]:
        """The pid of the recorded server, if its end was reported."""

    @property
    def tokens(self) -> frozenset[Generation]:
        """Loads whose cancel token has been set."""

    @property
    def unanswered(self) -> frozenset[Ticket]:
        """Calls that have arrived and are not answered, and whose caller has not gone away."""

    @property
    def ended(self) -> frozenset[Ticket]:
        """Loads that were cancelled, unloaded or withdrawn before they were answered."""

    @property
    def accepted(self) -> Mapping[Ticket, Generation]:
        """The generation that each call was given."""

    @property
    def asked(self) -> Mapping[Ticket, Target]:
        """The targets of the load calls."""

    @property
    def holding(self) -> frozenset[Ticket]:
        """Leases that were granted and not released, and whose holder has not gone away."""

    @property
    def inside(self) -> frozenset[Ticket]:
        """The leases that the gate counts."""

    @property
    def let_in(self) -> frozenset[Ticket]:
        """All that are inside, or were when the gate was closed."""

    @property
    def is_open(self) -> bool:
        """The gate lets callers in."""

    @property
    def is_told_drained(self) -> bool:
        """`Drained` is on its way."""

    @property
    def is_found(self) -> bool:
        """The machine has yet to hear of what a dead owner has left."""

    @property
    def was_shut_down(self) -> bool:
        """A shutdown has arrived."""

    @property
    def is_quiescent(self) -> bool:
        """Nothing more happens by itself: no effect, no posted fact, no timer."""


@dataclass(frozen=True, slots=True)
class Edge:
    """One step of the machine; `before` is the world when the fact is processed."""

    before: World
    fact: Fact
    after: World
    commands: tuple[Command, ...]


def pids(world: World) -> str:
    return ", ".join(str(pid) for pid in sorted(p.pid for p in world.alive)) or "nothing"


def has_changed(edge: Edge) -> bool:
    """Return whether the step has changed anything but the look-up that its fact ends."""
    before, after = edge.before, edge.after
    if before.state is not after.state:
        return True
    own = getattr(edge.fact, "ticket", None)
    left = tuple(look_up for look_up in before.ctx.look_ups if look_up.ticket != own)
    return before.ctx != after.ctx and replace(before.ctx, look_ups=left) != after.ctx


def answers(edge: Edge) -> dict[Ticket, Answer]:
    return {c.ticket: c.answer for c in edge.commands if isinstance(c, Settle)}


def category(answer: Answer | None) -> str | None:
    return answer.category if isinstance(answer, Problem) else None


def is_owed(completion: Completion, world: World) -> bool:
    """Return whether something in progress may report this."""
    in_progress = (*((e.kind, e.generation) for e in world.in_flight), *world.beside)
    return (completion.trigger, completion.generation) in owed_by(in_progress)


def owed_by(in_progress: Iterable[tuple[str, Generation]]) -> set[tuple[str, Generation]]:
    """Return the triggers that may be reported by what is in progress, with their generations."""
    return {(trigger, generation) for kind, generation in in_progress for trigger in _ENDS[kind]}


_ENDS = {
    "kill": ("emptied", "kill_failed"),
    "resolve": ("resolved", "fetch_failed"),
    "prefetch": ("fetched", "fetch_failed"),
    "download": ("fetched", "fetch_failed"),
    "spawn": ("spawned", "spawn_failed"),
    "probe": ("ready", "not_ready"),
    "look_up": ("load", "prefetch", "look_up_failed"),
}


def is_known(accept: Accept, world: World) -> bool:
    """Return whether the generation existed before: the call joined, or was already loaded."""
    return accept.generation <= world.ctx.generation
