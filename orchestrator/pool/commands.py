"""Commands: the pool's output, frozen data. The owner carries them out in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.pool.ledger import Amounts
from orchestrator.settings.request import LoadRequest

Reason = Literal[
    "room",  # evicted for another model
    "memory",  # evicted after out of memory
    "budget",  # evicted for a smaller budget
    "idle",  # unused for its idle_ttl_s
    "figure",  # its own figure does not fit
    "reload",
    "unload",
    "removed",
    "withdrawn",  # nobody waits for it any more
    "shutdown",
    "stuck",  # tried once more
]


@dataclass(frozen=True, slots=True)
class Start:
    """Load the model into its slot; `reserved` is what its server may take, MiB by device.

    `is_fitted`: that is less than it needs, and the server is to fit itself into it.
    """

    name: str
    generation: Generation
    reserved: Amounts
    is_fitted: bool = False
    request: LoadRequest | None = None  # of the definition that has been decided about


@dataclass(frozen=True, slots=True)
class Stop:
    """Close the gate at once, drain (`cut`: cancel every lease), and empty the slot.

    `if_idle`: it was chosen because nobody was inside. If somebody has entered since the evidence
    was read, the owner drops the result of this step and steps again with the new evidence.
    """

    name: str
    generation: Generation
    reason: Reason
    cut: bool = False
    if_idle: bool = False
    room_for: str | None = None  # the model that it makes room for


@dataclass(frozen=True, slots=True)
class Grant:
    """Answer a caller: its lease has entered, or its load is done."""

    ticket: Ticket
    name: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer a caller with a problem."""

    ticket: Ticket
    name: str
    problem: Problem


@dataclass(frozen=True, slots=True)
class AnswerEmptied:
    """Answer an unload or a removal: the slot is verified empty."""

    ticket: Ticket
    name: str


@dataclass(frozen=True, slots=True)
class AnswerCancelled:
    """Answer a cancel: whether anybody waited for the model."""

    ticket: Ticket
    is_cancelled: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """What the house wanted for itself is not loaded: a preload or a restart. Log a warning."""

    name: str
    kind: Literal["preload", "restart"]
    problem: Problem


@dataclass(frozen=True, slots=True)
class Measure:
    """Find out what a start needs; `measured` or `measure_failed` follows, with this edition."""

    name: str
    edition: int


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Post `look` at this time, monotonic seconds, in place of the last timer; None: never."""

    at: float | None


@dataclass(frozen=True, slots=True)
class DropStale:
    """A report of an earlier start, or of an entry that is not there, is dropped. Log it."""

    name: str
    trigger: str


Command = (
    Start
    | Stop
    | Grant
    | Refuse
    | AnswerEmptied
    | AnswerCancelled
    | GiveUp
    | Measure
    | SetTimer
    | DropStale
)
