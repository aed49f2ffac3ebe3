"""Facts: the pool's input, frozen data about one entry by name, or about the whole pool.

`trigger` is the name of a fact's rows in the table. What slots report carries the generation of the
`Start` that it is about, as the pool counts them. Every fact has `at`, monotonic seconds, and
`uses`, evidence that the owner fills in: how the open gates of the residents are used at this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.pool.context import Definition, Need, Policy, Turn
from orchestrator.pool.ledger import Amounts


@dataclass(frozen=True, slots=True)
class Use:
    """How the gate of a resident is used."""

    name: str
    is_inside: bool  # somebody holds a lease
    last_used_at: float | None  # None: not since it became Healthy


Uses = tuple[Use, ...]


# ----------------------------------------------------------------------------- what callers want
@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody wants a lease of a model, or a place at its server for one request, or a call wants
    it loaded (`POST …/load`).

    `has_entered`: the owner has found the gate open in this step, and a lease has entered it. It
    does not try where the entry is not Resident, `is_changed`, or to be loaded anew (`is_forced`).
    """

    trigger: ClassVar[str] = "wanted"
    name: str
    ticket: Ticket
    kind: Literal["lease", "request", "load"]
    at: float
    is_forced: bool = False
    turn: Turn = field(default_factory=Turn)
    has_entered: bool = False  # evidence
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Preloaded:
    """The catalogue wants this model at the start, if it fits then."""

    trigger: ClassVar[str] = "preload"
    name: str
    at: float
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The caller of `ticket` has gone away."""

    trigger: ClassVar[str] = "withdrawn"
    name: str
    ticket: Ticket
    at: float
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class UnloadRequested:
    """`cut` waits for no lease."""

    trigger: ClassVar[str] = "unload"
    name: str
    ticket: Ticket
    at: float
    cut: bool = False
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Cancel who waits for a model; one that is resident stays."""

    trigger: ClassVar[str] = "cancel"
    name: str
    ticket: Ticket
    at: float
    uses: Uses = ()


# ----------------------------------------------------------------------------------- catalogue
@dataclass(frozen=True, slots=True)
class Defined:
    """An entry is new in the catalogue, or the catalogue says something else about it.

    `is_other_server`: what runs now is not what the definition starts.
    """

    trigger: ClassVar[str] = "defined"
    name: str
    definition: Definition
    at: float
    is_other_server: bool = True
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Removed:
    """An entry is gone from the catalogue; the ticket is of a call that waits for the end."""

    trigger: ClassVar[str] = "removed"
    name: str
    at: float
    ticket: Ticket | None = None
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """The answer to `Measure`."""

    trigger: ClassVar[str] = "measured"
    name: str
    edition: int
    need: Need
    at: float
    size_bytes: int = 0  # of the files that a start reads
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class MeasureFailed:
    trigger: ClassVar[str] = "measure_failed"
    name: str
    edition: int
    problem: Problem
    at: float
    uses: Uses = ()


# ---------------------------------------------------------------------------- what slots report
@dataclass(frozen=True, slots=True)
class Adopted:
    """At the start of the pool: a server that a dead owner has left is Healthy in this slot.

    `has_entered` and `admitted` are those of `BecameHealthy`. The owner ends a server whose
    adoption is dropped.
    """

    trigger: ClassVar[str] = "adopted"
    name: str
    generation: Generation
    reserved: Amounts  # MiB by device
    at: float
    has_entered: bool = False  # evidence
    admitted: tuple[Ticket, ...] = ()  # evidence
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Sized:
    """The server's own figure before it reads a weight, and what that figure leaves out."""

    trigger: ClassVar[str] = "sized"
    name: str
    generation: Generation
    figure: Amounts  # MiB by device
    at: float
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class BecameHealthy:
    """The slot has opened its gate.

    `has_entered`: the gate is still open in this step, and the leases of everybody who waits for
    this model have entered it, but for requests: `admitted` are those that have got a place.
    `figure` is the server's own after loading, if it reports one.
    """

    trigger: ClassVar[str] = "healthy"
    name: str
    generation: Generation
    at: float
    figure: Amounts | None = None
    has_entered: bool = False  # evidence
    admitted: tuple[Ticket, ...] = ()  # evidence
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Leaving:
    """A Healthy server has ended without a `Stop`, and its gate is closed."""

    trigger: ClassVar[str] = "leaving"
    name: str
    generation: Generation
    at: float
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Emptied:
    """The slot is verified empty. `problem` says why a start has failed."""

    trigger: ClassVar[str] = "emptied"
    name: str
    generation: Generation
    at: float
    problem: Problem | None = None
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class BecameStuck:
    """The server could not be stopped; `emptied` follows if it ends later."""

    trigger: ClassVar[str] = "stuck"
    name: str
    generation: Generation
    at: float
    uses: Uses = ()


# ------------------------------------------------------------------------------- the whole pool
@dataclass(frozen=True, slots=True)
class Looked:
    """The timer has fired, or the last lease of a resident, or a request with a place, has ended
    while somebody waits. `admitted`: the requests that have got a place in this step.
    """

    trigger: ClassVar[str] = "look"
    at: float
    admitted: tuple[Ticket, ...] = ()  # evidence
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Configured:
    """The settings of the pool, at the start and after a re-read of the catalogue."""

    trigger: ClassVar[str] = "configured"
    policy: Policy
    budget: Amounts  # MiB by device
    at: float
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class ShutdownRequested:
    trigger: ClassVar[str] = "shutdown"
    at: float
    uses: Uses = ()


OfStart = Sized | BecameHealthy | Leaving | Emptied | BecameStuck
OfEntry = (
    Wanted
    | Preloaded
    | Withdrawn
    | UnloadRequested
    | CancelRequested
    | Defined
    | Removed
    | Measured
    | MeasureFailed
    | Adopted
    | OfStart
)
Fact = OfEntry | Looked | Configured | ShutdownRequested
