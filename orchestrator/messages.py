"""Facts that come in, commands that go out: frozen data, each with its generation.

A fact's `trigger` is the name of the event in `table.py`. Callers post requests, effects post
exactly one completion per command, and the owner adds evidence (fields that say so) in the same
step, because only the operating system can answer for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from orchestrator.errors import Problem
from orchestrator.named import Named
from orchestrator.request import ModelFiles, ReloadReason, Target
from orchestrator.tokens import CancelReason, Generation, Ticket

Timer = Literal["drain", "deadline", "restart", "idle"]

# --------------------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class Child:
    """The server process a slot may hold, from spawn until its exit is confirmed."""

    generation: Generation
    pid: int


@dataclass(frozen=True, slots=True)
class Exit(Named):
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


# ---------------------------------------------------------------------------- facts from callers


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


# ------------------------------------------------------------- facts from effects and the clock


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

# -------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class Timings(Named):
    """Seconds spent in each phase of a load; None for a phase it did not enter."""

    kill: float | None = None
    download: float | None = None
    spawn: float | None = None
    health: float | None = None
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """The answer to a load that holds."""

    generation: Generation
    target: Target
    child: Child
    server: ServerFacts
    timings: Timings
    reload_reasons: tuple[ReloadReason, ...] = ()
    already: bool = False
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The answer to an unload; `changed` is False when it named a model that is not there."""

    changed: bool = True


@dataclass(frozen=True, slots=True)
class Prefetched:
    """The answer to a prefetch: the model is whole on disk."""

    model: ModelFiles


@dataclass(frozen=True, slots=True)
class CancelAnswer:
    cancelled: bool


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    ticket: Ticket
    child: Child
    server: ServerFacts


@dataclass(frozen=True, slots=True)
class Done:
    """The shutdown is complete."""


Answer = Loaded | Prefetched | Unloaded | CancelAnswer | LeaseGranted | Done | Problem

# ------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Kill:
    """Empty the slot; `child` is what it is known to hold."""

    generation: Generation
    child: Child | None


@dataclass(frozen=True, slots=True)
class Resolve:
    """Ask the Hub for a load that waits; the state stays as it is."""

    generation: Generation
    target: Target


@dataclass(frozen=True, slots=True)
class Download:
    """Make the model whole on disk: as the effect of Downloading, or for a load that waits."""

    generation: Generation
    target: Target


@dataclass(frozen=True, slots=True)
class Spawn:
    generation: Generation
    target: Target


@dataclass(frozen=True, slots=True)
class Probe:
    generation: Generation
    child: Child
    stall_timeout_s: float
    size_bytes: int
    extra_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SetToken:
    generation: Generation
    reason: CancelReason


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Wait; a `restart` waits for somewhere between half of it and all of it. A timer of the same
    kind and generation that runs already is set anew.
    """

    generation: Generation
    kind: Timer
    after_s: float


@dataclass(frozen=True, slots=True)
class Accept:
    """Tell the caller of `ticket` which generation its load is."""

    ticket: Ticket
    generation: Generation
    joined: bool


@dataclass(frozen=True, slots=True)
class Settle:
    """Answer a call, once and for all."""

    ticket: Ticket
    answer: Answer


@dataclass(frozen=True, slots=True)
class Concluded:
    """A load has ended, once and for all, and what became of it; callers may have left before.

    Attributes:
        accepted_at: Monotonic seconds.
        timings: Seconds in each phase; of a failed load `total` is not counted here.
    """

    generation: Generation
    target: Target
    accepted_at: float
    timings: Timings
    answer: Loaded | Problem


@dataclass(frozen=True, slots=True)
class ServerEnded:
    """A server has ended: `stopped` by us, else by itself: by `exit`, `signal` or `unknown`."""

    pid: int
    how: Literal["stopped", "exit", "signal", "unknown"]


@dataclass(frozen=True, slots=True)
class Post:
    """Put a fact of our own behind what is already in the inbox."""

    fact: Promoted


@dataclass(frozen=True, slots=True)
class Fence:
    """A completion nobody waits for any more was settled, not believed (for the log)."""

    generation: Generation
    trigger: str


Effect = Kill | Resolve | Download | Spawn | Probe
Command = Effect | SetToken | SetTimer | Accept | Settle | Concluded | ServerEnded | Post | Fence


def failure_of(effect: Effect, problem: Problem, at: float) -> Completion:
    """Return the completion of an effect that could not be carried out at all."""
    generation = effect.generation
    match effect:
        case Kill():
            return KillFailed(generation, at, problem)
        case Resolve() | Download():
            return FetchFailed(generation, at, problem)
        case Spawn():
            return SpawnFailed(generation, at, problem)
        case Probe():
            return NotReady(generation, at, problem)
