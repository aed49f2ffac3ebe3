"""Commands that go out, and the answers that callers hear: frozen data, with its generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.base.record import Record
from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.facts import (
    Child,
    Completion,
    FetchFailed,
    KillFailed,
    NotReady,
    Promoted,
    ServerFacts,
    SpawnFailed,
    Timer,
)
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.target import ReloadReason, Target


@dataclass(frozen=True, slots=True)
class Timings(Record):
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
    target: Target
    child: Child
    server: ServerFacts


@dataclass(frozen=True, slots=True)
class Done:
    """The shutdown is complete."""


Answer = Loaded | Prefetched | Unloaded | CancelAnswer | LeaseGranted | Done | Problem


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
class DropStale:
    """A completion nobody waits for any more was settled, not believed (for the log)."""

    generation: Generation
    trigger: str


Effect = Kill | Resolve | Download | Spawn | Probe
Command = (
    Effect | SetToken | SetTimer | Accept | Settle | Concluded | ServerEnded | Post | DropStale
)


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
