"""One instant of an abstract world around the real machine: its callers and the operating system.

Worlds are small and hashable, so that equal ones are explored once. `View` adapts a world to the
invariants. The facts are made here too, once for equal arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from typing import Final, Literal, NamedTuple, cast, get_args

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine import facts
from orchestrator.machine.context import Context, EffectInFlight, EffectKind
from orchestrator.machine.facts import (
    BecameReady,
    Child,
    Completion,
    Emptied,
    Exit,
    Exited,
    Fetched,
    FetchFailed,
    Found,
    Hung,
    KillFailed,
    LoadRequested,
    LookUpFailed,
    LookUpRequested,
    NotReady,
    PrefetchRequested,
    Purpose,
    Resolved,
    ServerFacts,
    Sized,
    SlotEvidence,
    Spawned,
    SpawnFailed,
)
from orchestrator.machine.states import State
from orchestrator.settings.files import FileIdentity, HubModel, ModelFiles
from orchestrator.settings.memory import Memory
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary, Target
from tests.kit.machine.observed import Process
from tests.kit.machine.programs import Action

AT = 0.0  # time stands still, so that the number of worlds is finite
STRAY = Process(7, Generation(0), "?")


class Core:
    """The machine's state and context.

    The checker has one object for equal ones, so that worlds compare and hash them by identity.
    """

    __slots__ = ("ctx", "state")

    def __init__(self, state: State, ctx: Context) -> None:
        self.state = state
        self.ctx = ctx


class Status(IntEnum):
    """The progress of a call; `CALLED` has its place in the order of calls, and has not arrived.
    `LOST` was a call of a host that has been killed.
    """

    UNSENT = 0
    CALLED = 1
    CALLED_ENDED = 2
    WAITING = 3
    ENDED = 4
    GONE = 5
    HELD = 6
    DONE = 7
    LOST = 8


class Call(NamedTuple):
    """What the caller knows about its call."""

    status: Status = Status.UNSENT
    ticket: Ticket = Ticket(0)
    generation: Generation = Generation(0)


WorkKind = EffectKind | Literal["resolve", "prefetch", "look_up"]
"""An effect of a state, or work for a queued load, a prefetch or a call."""

FoundKind = Literal["found", "found_changed", "found_unknown"]
NoticedKind = Literal["exited", "promote", "hung", "drained", "sized"] | FoundKind
FOUND: Final[frozenset[FoundKind]] = frozenset(get_args(FoundKind))
BESIDE: Final = frozenset({"resolve", "prefetch", "look_up"})


class Work(NamedTuple):
    """Work in progress; the generation of a look-up is the ticket of its call."""

    kind: WorkKind
    generation: Generation
    pid: int = 0
    model: str = ""


class Noticed(NamedTuple):
    """A fact on its way that is no completion: a promotion, the exit, the hang, the end of the
    drain or the memory of a server, or what the next owner finds: a server that is as its keeper
    remembers it, one that is not, or something of which nobody knows what it is.
    """

    kind: NoticedKind
    generation: Generation
    pid: int = 0


class Timer(NamedTuple):
    kind: facts.Timer
    generation: Generation


class Gate(NamedTuple):
    """The gate of a server, and the leases that it counts.

    `is_held`: closed as evidence of this step, and open again unless the machine takes it.
    """

    generation: Generation = Generation(0)
    is_open: bool = False
    inside: frozenset[Ticket] = frozenset()
    at_close: frozenset[Ticket] = frozenset()
    drains: bool = False
    is_held: bool = False


class World(NamedTuple):
    """One instant; see `observed.World`."""

    core: Core
    calls: tuple[Call, ...]
    progress: tuple[int, ...]
    alive: frozenset[Process] = frozenset()
    work: tuple[Work, ...] = ()
    noticed: frozenset[Noticed] = frozenset()
    timers: frozenset[Timer] = frozenset()
    tokens: frozenset[Generation] = frozenset()
    concluded: frozenset[Generation] = frozenset()
    reported_ended: frozenset[int] = frozenset()
    cancelled_ids: frozenset[str] = frozenset()
    gate: Gate = Gate()
    strays: int = 0
    keepers: int = 0
    hangs: int = 0
    hosts: int = 0
    stale: int = 0


@dataclass(frozen=True, slots=True)
class Faults:
    """What may go wrong at any moment; numbers are budgets.

    Attributes:
        kill: A process survives the kill ladder.
        download, spawn, health: The effect fails.
        look_up: A slow look-up fails.
        crash: A server ends by itself.
        strays: How often an unrecorded process appears in the slot between kill and spawn.
        keeper: How often the keeper is killed; something of its server may go on.
        hang: How many servers hang.
        host: How often the host is killed; the next owner comes at once.
        stale: How many completions of ended effects arrive.
        figures: Servers print what they take of memory; that may arrive at any time.
    """

    kill: bool = True
    download: bool = True
    spawn: bool = True
    health: bool = True
    look_up: bool = True
    crash: bool = True
    strays: int = 0
    keeper: int = 0
    hang: int = 0
    host: int = 0
    stale: int = 1
    figures: bool = False
    # of a keeper's code, which the checker must find
    is_empty_too_early: bool = False
    loses_exits: bool = False
    # of the gate
    lets_in_late: bool = False
    loses_the_last: bool = False
    # of the watch, and of an adoption
    calls_a_worker_hung: bool = False
    adopts_without_comparing: bool = False


NO_FAULTS = Faults(
    kill=False,
    download=False,
    spawn=False,
    health=False,
    look_up=False,
    crash=False,
    strays=0,
    keeper=0,
    stale=0,
)


class View:
    """A world as `observed.World`."""

    __slots__ = ("_actions", "_world")

    def __init__(self, actions: tuple[Action, ...], world: World) -> None:
        self._actions = actions
        self._world = world

    @property
    def state(self) -> State:
        return self._world.core.state

    @property
    def ctx(self) -> Context:
        return self._world.core.ctx

    @property
    def alive(self) -> frozenset[Process]:
        return self._world.alive

    @property
    def in_flight(self) -> tuple[EffectInFlight, ...]:
        return tuple(
            effect_in_flight(cast("EffectKind", w.kind), w.generation)
            for w in self._world.work
            if w.kind not in BESIDE
        )

    @property
    def beside(self) -> frozenset[tuple[str, Generation]]:
        return frozenset((w.kind, w.generation) for w in self._world.work if w.kind in BESIDE)

    @property
    def concluded(self) -> frozenset[Generation]:
        return self._world.concluded

    @property
    def reported_ended(self) -> frozenset[int]:
        return self._world.reported_ended

    @property
    def tokens(self) -> frozenset[Generation]:
        return self._world.tokens

    @property
    def unanswered(self) -> frozenset[Ticket]:
        return self._tickets(Status.WAITING, Status.ENDED)

    @property
    def ended(self) -> frozenset[Ticket]:
        return self._tickets(Status.ENDED, Status.GONE)

    @property
    def holding(self) -> frozenset[Ticket]:
        return self._tickets(Status.HELD)

    @property
    def inside(self) -> frozenset[Ticket]:
        return self._world.gate.inside

    @property
    def let_in(self) -> frozenset[Ticket]:
        gate = self._world.gate
        return gate.inside if gate.is_open else gate.at_close

    @property
    def is_open(self) -> bool:
        return self._world.gate.is_open

    @property
    def is_told_drained(self) -> bool:
        return any(n.kind == "drained" for n in self._world.noticed)

    @property
    def is_found(self) -> bool:
        return any(noticed.kind in FOUND for noticed in self._world.noticed)

    @property
    def was_shut_down(self) -> bool:
        return any(
            action.verb == "shutdown" and call.status not in {Status.UNSENT, Status.LOST}
            for action, call in zip(self._actions, self._world.calls, strict=True)
        )

    def _tickets(self, *statuses: Status) -> frozenset[Ticket]:
        return frozenset(call.ticket for call in self._world.calls if call.status in statuses)

    @property
    def accepted(self) -> Mapping[Ticket, Generation]:
        return {call.ticket: call.generation for call in self._world.calls if call.generation}

    @property
    def asked(self) -> Mapping[Ticket, Target]:
        return {
            call.ticket: target(action.request)
            for action, call in zip(self._actions, self._world.calls, strict=True)
            if action.request is not None and call.status
        }

    @property
    def is_quiescent(self) -> bool:
        world, gate = self._world, self._world.gate
        timers = world.timers
        if gate.inside:  # while it is in use, it only starts over
            timers -= {Timer("idle", gate.generation)}
        return not (world.work or world.noticed or timers or watched(world, is_hung=True))


# ----------------------------------------------------------------------------------------- facts


def child_is_alive(world: World) -> bool:
    child = world.core.ctx.child
    return child is not None and any(process.pid == child.pid for process in world.alive)


def watched(world: World, *, is_hung: bool) -> list[Process]:
    """Return the server that is watched for a hang, if it hangs, or does not."""
    child = world.core.ctx.child if world.core.state is State.HEALTHY else None
    return [p for p in world.alive if child and p.pid == child.pid and p.is_hung is is_hung]


def evidence(world: World) -> SlotEvidence:
    return _EMPTY if not world.alive else _OCCUPIED


_EMPTY = SlotEvidence(is_empty=True)
_OCCUPIED = SlotEvidence(is_empty=False, reason="the slot's lock is held")


@cache
def effect_in_flight(kind: EffectKind, generation: Generation) -> EffectInFlight:
    return EffectInFlight(kind, generation)


@cache
def look_up_requested(action: Action, ticket: Ticket) -> LookUpRequested:
    assert action.request is not None
    purpose: Purpose = "prefetch" if action.verb == "prefetch" else "load"
    return LookUpRequested(ticket, action.request, purpose, AT)


@cache
def look_up_failed(ticket: Ticket) -> LookUpFailed:
    return LookUpFailed(ticket, Problem("model_not_found", "no such file"), AT)


@cache
def prefetch_requested(ticket: Ticket, request: LoadRequest) -> PrefetchRequested:
    return PrefetchRequested(ticket, target(request), AT)


@cache
def load_requested(ticket: Ticket, request: LoadRequest, is_alive: bool) -> LoadRequested:
    return LoadRequested(ticket, target(request), AT, is_alive)


@cache
def became_ready(generation: Generation, is_alive: bool) -> BecameReady:
    return BecameReady(generation, AT, ServerFacts("http://127.0.0.1:1"), is_alive)


@cache
def exited(generation: Generation, pid: int) -> Exited:
    return Exited(generation, AT, Exit(pid, returncode=-9))


@cache
def sized(generation: Generation) -> Sized:
    """The figure tells whose it is."""
    return Sized(generation, AT, Memory.of("exact", {"Host": generation}))


@cache
def hung(generation: Generation, pid: int) -> Hung:
    return Hung(generation, AT, Exit(pid, returncode=None, reason="hung"), silent_s=60.0)


@cache
def found(noticed: Noticed, model: str | None) -> Found:
    """Return what the next owner finds; `model` is what its keeper remembers, if it does."""
    generation = noticed.generation
    child = Child(generation, noticed.pid) if generation else None
    remembered = None if model is None else on_disk(model)
    return Found(generation, AT, child, remembered)


@cache
def stale_completions(
    generation: Generation, slot: SlotEvidence, is_alive: bool
) -> tuple[Completion, ...]:
    """Every completion an ended effect of this load could still report."""
    problem = Problem("server_start_failed", "late")
    return (
        Emptied(generation, AT),
        KillFailed(generation, AT, problem),
        Resolved(generation, AT, resolved("o/Stale")),
        Fetched(generation, AT, files("Stale"), slot),
        FetchFailed(generation, AT, problem),
        Spawned(generation, AT, Child(generation, 99)),
        SpawnFailed(generation, AT, problem),
        became_ready(generation, is_alive),
        NotReady(generation, AT, problem),
    )


@cache
def files(model: str) -> ModelFiles:
    """Return a model on disk, local or of the Hub."""
    inode = ord(model.rpartition("/")[2][0])
    weights = (FileIdentity(model, device=1, inode=inode, size_bytes=1, mtime_ns=1),)
    if "/" in model:
        return ModelFiles(weights, None, "V", HubModel(model, commit="c" * 40))
    return ModelFiles(weights)


@cache
def on_disk(model: str) -> Target:
    """Return the target of a server that runs."""
    return replace(target(LoadRequest(model_path=model)), model=files(model))


@cache
def resolved(model: str) -> ModelFiles:
    """Return a resolved Hub model that is not on disk."""
    return ModelFiles((), None, "V", HubModel(model, commit="c" * 40))


@cache
def target(request: LoadRequest) -> Target:
    """Return the target of a request; Hub models are neither resolved nor on disk."""
    binary = FileIdentity("/bin/llama-server", 1, 1, 1, 1)
    name = request.model_path
    model = files(name)
    if "/" in name:
        model = ModelFiles((), None, None, HubModel(name, is_settled=False))
    return Target(request, model, ServerBinary("external", (binary.path,), binary))
