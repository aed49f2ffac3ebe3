"""Facts that come in: frozen data, each with its generation or its ticket.

A fact's `trigger` is the name of the event in the table. Callers post requests, effects post
exactly one completion per command, and the owner adds evidence (fields that say so) in the same
step, because only the operating system can answer for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from orchestrator.base.record import Record
from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.target import Target

Timer = Literal["drain", "deadline", "restart", "idle"]


@dataclass(frozen=True, slots=True)
class Child:
    """The server process a slot may hold, from spawn until its exit is confirmed."""

    generation: Generation
    pid: int


@dataclass(frozen=True, slots=True)
class Exit(Record):
    """How a server ended. `returncode` is negative for a signal and None when nobody saw it."""

    pid: int
    returncode: int | None
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a healthy server says of itself, and the key it wants to hear."""

    base_url: str
    context_length: int | None = None
    is_vision: bool = False
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SlotEvidence:
    """The operating system's answer to "is the slot empty?", taken in the same step."""

    is_empty: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LoadRequested:
    trigger: ClassVar[str] = "load"
    ticket: Ticket
    target: Target
    at: float
    child_is_alive: bool = True  # evidence


@dataclass(frozen=True, slots=True)
class PrefetchRequested:
    """Make a model whole on disk, and start nothing."""

    trigger: ClassVar[str] = "prefetch"
    ticket: Ticket
    target: Target
    at: float


@dataclass(frozen=True, slots=True)
class UnloadRequested:
    """`model` limits the unload to that model (compared as text); None means whatever is there."""

    trigger: ClassVar[str] = "unload"
    ticket: Ticket
    model: str | None
    at: float


@dataclass(frozen=True, slots=True)
class CancelRequested:
    trigger: ClassVar[str] = "cancel"
    ticket: Ticket
    request_id: str | None
    generation: int | None
    at: float


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The caller of `ticket` has gone away; only its own interest ends."""

    trigger: ClassVar[str] = "withdraw"
    ticket: Ticket
    at: float


@dataclass(frozen=True, slots=True)
class LeaseRequested:
    trigger: ClassVar[str] = "lease"
    ticket: Ticket
    at: float
    child_is_alive: bool = True  # evidence


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    trigger: ClassVar[str] = "release"
    ticket: Ticket
    at: float


@dataclass(frozen=True, slots=True)
class ShutdownRequested:
    trigger: ClassVar[str] = "shutdown"
    ticket: Ticket
    at: float


@dataclass(frozen=True, slots=True)
class Emptied:
    """The kill ladder is done and the slot was verified empty."""

    trigger: ClassVar[str] = "emptied"
    effect: ClassVar[str] = "kill"
    generation: Generation
    at: float
    exit: Exit | None = None


@dataclass(frozen=True, slots=True)
class KillFailed:
    """Something of the slot is still alive after the whole ladder."""

    trigger: ClassVar[str] = "kill_failed"
    effect: ClassVar[str] = "kill"
    generation: Generation
    at: float
    problem: Problem


@dataclass(frozen=True, slots=True)
class Resolved:
    """The Hub has answered: which commit and files the model is, and that it may be had."""

    trigger: ClassVar[str] = "resolved"
    effect: ClassVar[str] = "resolve"
    generation: Generation
    at: float
    model: ModelFiles


@dataclass(frozen=True, slots=True)
class Fetched:
    trigger: ClassVar[str] = "fetched"
    effect: ClassVar[str] = "download"
    generation: Generation
    at: float
    model: ModelFiles
    slot: SlotEvidence = SlotEvidence(is_empty=False, reason="not asked")  # evidence


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The model cannot be had: the Hub says so, or its files do not arrive."""

    trigger: ClassVar[str] = "fetch_failed"
    effect: ClassVar[str] = "download"
    generation: Generation
    at: float
    problem: Problem


@dataclass(frozen=True, slots=True)
class Spawned:
    trigger: ClassVar[str] = "spawned"
    effect: ClassVar[str] = "spawn"
    generation: Generation
    at: float
    child: Child


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    trigger: ClassVar[str] = "spawn_failed"
    effect: ClassVar[str] = "spawn"
    generation: Generation
    at: float
    problem: Problem


@dataclass(frozen=True, slots=True)
class BecameReady:
    trigger: ClassVar[str] = "ready"
    effect: ClassVar[str] = "probe"
    generation: Generation
    at: float
    server: ServerFacts
    child_is_alive: bool = True  # evidence


@dataclass(frozen=True, slots=True)
class NotReady:
    trigger: ClassVar[str] = "not_ready"
    effect: ClassVar[str] = "probe"
    generation: Generation
    at: float
    problem: Problem


@dataclass(frozen=True, slots=True)
class Exited:
    """Our own child has ended, whether we asked for it or not."""

    trigger: ClassVar[str] = "exited"
    generation: Generation
    at: float
    exit: Exit


@dataclass(frozen=True, slots=True)
class Promoted:
    """A queued load may start now (posted by the machine to itself)."""

    trigger: ClassVar[str] = "promote"
    generation: Generation
    at: float
    child_is_alive: bool = True  # evidence


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A deadline of generation's load, the drain of its server, its time without use, or the wait
    for a restart after it is over.
    """

    generation: Generation
    at: float
    kind: Timer

    @property
    def trigger(self) -> str:
        return "restart_due" if self.kind == "restart" else f"{self.kind}_expired"


Completion = (
    Emptied
    | KillFailed
    | Resolved
    | Fetched
    | FetchFailed
    | Spawned
    | SpawnFailed
    | BecameReady
    | NotReady
)
Request = (
    LoadRequested
    | PrefetchRequested
    | UnloadRequested
    | CancelRequested
    | Withdrawn
    | LeaseRequested
    | LeaseReleased
    | ShutdownRequested
)
Fact = Request | Completion | Exited | Promoted | TimerFired
