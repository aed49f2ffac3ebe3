"""Commands and answers: the machine's output, frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from orchestrator.base.record import Record
from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine import facts
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.memory import Memory
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ReloadReason, Target


@dataclass(frozen=True, slots=True)
class Timings(Record):
    """Seconds that a load spent in each phase; None for a phase it did not enter."""

    kill: float | None = None
    download: float | None = None
    spawn: float | None = None
    health: float | None = None
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """The answer to a load that succeeded."""

    generation: Generation
    target: Target
    child: facts.Child
    server: facts.ServerFacts
    timings: Timings
    reload_reasons: tuple[ReloadReason, ...] = ()
    already: bool = False
    joined: bool = False
    adopted: bool = False
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The answer to an unload; `changed` is False if it named a model that is not there."""

    changed: bool = True


@dataclass(frozen=True, slots=True)
class Prefetched:
    """The answer to a prefetch: all files of the model are on disk."""

    model: ModelFiles


@dataclass(frozen=True, slots=True)
class CancelAnswer:
    cancelled: bool


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """The answer to a lease: the server, whose gate counts the caller from now on."""

    target: Target
    child: facts.Child
    server: facts.ServerFacts


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to a shutdown; `is_kept`: the server goes on, for the next owner."""

    is_kept: bool = False


Outcome = Loaded | Problem
Answer = Outcome | Prefetched | Unloaded | CancelAnswer | LeaseGranted | Done


@dataclass(frozen=True, slots=True)
class Kill:
    """Empty the slot, which holds `child` as far as the machine knows.

    `saves` is what the child was started with, if its prompts are to be kept.
    """

    generation: Generation
    child: facts.Child | None
    saves: Target | None = None


@dataclass(frozen=True, slots=True)
class Resolve:
    """Ask the Hub about the model of a queued load."""

    generation: Generation
    target: Target


@dataclass(frozen=True, slots=True)
class Download:
    """Bring a model to disk: in Downloading, for a queued load, or for a prefetch."""

    generation: Generation
    target: Target


@dataclass(frozen=True, slots=True)
class Spawn:
    generation: Generation
    target: Target


@dataclass(frozen=True, slots=True)
class Probe:
    generation: Generation
    child: facts.Child
    stall_timeout_s: float
    size_bytes: int
    extra_args: tuple[str, ...] = ()
    unchanged: tuple[FileIdentity, ...] = ()  # of an adoption: what must be on disk as it was


Effect = Kill | Resolve | Download | Spawn | Probe


@dataclass(frozen=True, slots=True)
class LookUp:
    """Look up the model of a call; the answer is a `LookedUp`."""

    ticket: Ticket
    request: LoadRequest
    purpose: facts.Purpose


@dataclass(frozen=True, slots=True)
class Warm:
    """Read the files of a load ahead, until its server is started. Nothing waits for this."""

    generation: Generation
    target: Target


@dataclass(frozen=True, slots=True)
class SetToken:
    generation: Generation
    reason: CancelReason


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Start a timer, or restart the one of the same kind and generation.

    A `restart` timer fires at a random moment between half of `after_s` and all of it.
    """

    generation: Generation
    kind: facts.Timer
    after_s: float


@dataclass(frozen=True, slots=True)
class StopTimer:
    generation: Generation
    kind: facts.Timer


@dataclass(frozen=True, slots=True)
class OpenGate:
    """From now on whoever asks for a lease gets this one, without asking the machine."""

    lease: LeaseGranted


@dataclass(frozen=True, slots=True)
class CloseGate:
    """Let nobody in any more. If it `drains`, `Drained` follows when nobody is inside."""

    generation: Generation
    drains: bool = False


@dataclass(frozen=True, slots=True)
class Accept:
    """Tell a caller the generation of its load."""

    ticket: Ticket
    generation: Generation
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Settle:
    """Answer a call; each call is answered once."""

    ticket: Ticket
    answer: Answer


@dataclass(frozen=True, slots=True)
class Concluded:
    """A load has ended, with or without callers; each load ends once."""

    generation: Generation
    target: Target
    accepted_at: float  # monotonic seconds
    timings: Timings  # `total` is 0 if the load failed
    answer: Outcome


End = Literal["stopped", "hung", "exit", "signal", "unknown"]


@dataclass(frozen=True, slots=True)
class ServerEnded:
    """A server has ended: stopped by us, ended by us because it hung, or by itself by an exit, a
    signal or in an unknown way.
    """

    pid: int
    how: End


@dataclass(frozen=True, slots=True)
class Post:
    """Append a fact to the inbox."""

    fact: facts.Promoted


@dataclass(frozen=True, slots=True)
class DropStale:
    """A fact about something that is over was ignored (for the log)."""

    generation: Generation
    trigger: str


Command = (
    Effect
    | LookUp
    | Warm
    | SetToken
    | SetTimer
    | StopTimer
    | OpenGate
    | CloseGate
    | Accept
    | Settle
    | Concluded
    | ServerEnded
    | Post
    | DropStale
)


_FAILURES: Final[dict[type[Effect], type[facts.Failure]]] = {
    Kill: facts.KillFailed,
    Resolve: facts.FetchFailed,
    Download: facts.FetchFailed,
    Spawn: facts.SpawnFailed,
    Probe: facts.NotReady,
}


def failure_of(effect: Effect, problem: Problem, at: float) -> facts.Completion:
    """Return the completion of an effect that could not be started."""
    return _FAILURES[type(effect)](effect.generation, at, problem)
