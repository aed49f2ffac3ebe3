"""Facts: the machine's input, frozen data with the ticket of a call or the generation of a load.

`trigger` is the name of a fact's rows in the table. Callers post requests, and every effect posts
one completion per command. A field marked as evidence is filled in by the owner in the step that
processes the fact, because only the operating system can answer it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from orchestrator.base.record import Record
from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.memory import Memory
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import Target

Timer = Literal["drain", "deadline", "restart", "idle", "look_up"]
Purpose = Literal["load", "prefetch"]


@dataclass(frozen=True, slots=True)
class Child:
    """The server process of the slot, from its spawn until its exit is confirmed."""

    generation: Generation
    pid: int


@dataclass(frozen=True, slots=True)
class Exit(Record):
    """How a server ended. `returncode` is negative for a signal, None if it is unknown; `reason` is
    `hung` if it was ended for that.
    """

    pid: int
    returncode: int | None
    log_tail: tuple[str, ...] = ()
    reason: Literal["hung"] | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a healthy server reports about itself, and the key it accepts.

    Attributes:
        total_slots: How many requests it computes at a time; None if it does not say.
    """

    base_url: str
    context_length: int | None = None
    is_vision: bool = False
    api_key: str | None = field(default=None, repr=False)
    total_slots: int | None = None


@dataclass(frozen=True, slots=True)
class SlotEvidence:
    """The operating system's answer to "is the slot empty?", obtained in the same step."""

    is_empty: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LookUpRequested:
    """Look up the model of a call. `LoadRequested` or `PrefetchRequested` follows, or a failure."""

    trigger: ClassVar[str] = "look_up"
    ticket: Ticket
    request: LoadRequest
    purpose: Purpose
    at: float


@dataclass(frozen=True, slots=True)
class LookUpFailed:
    trigger: ClassVar[str] = "look_up_failed"
    ticket: Ticket
    problem: Problem
    at: float


@dataclass(frozen=True, slots=True)
class LoadRequested:
    """The model of a call has been looked up, and is to be loaded.

    `kept` is the same model at the commit that ran then, if that is still whole on disk.
    """

    trigger: ClassVar[str] = "load"
    ticket: Ticket
    target: Target
    at: float
    child_is_alive: bool = True  # evidence
    kept: ModelFiles | None = None


@dataclass(frozen=True, slots=True)
class PrefetchRequested:
    """Download a model and start nothing."""

    trigger: ClassVar[str] = "prefetch"
    ticket: Ticket
    target: Target
    at: float


@dataclass(frozen=True, slots=True)
class UnloadRequested:
    """Unload `model`, compared as text, or any model if it is None; `cut` waits for no lease."""

    trigger: ClassVar[str] = "unload"
    ticket: Ticket
    model: str | None
    at: float
    cut: bool = False


@dataclass(frozen=True, slots=True)
class CancelRequested:
    trigger: ClassVar[str] = "cancel"
    ticket: Ticket
    request_id: str | None
    generation: int | None
    at: float


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The caller of `ticket` has gone away."""

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
class ShutdownRequested:
    """`keep` leaves a Healthy server to the next owner, where the policy does so."""

    trigger: ClassVar[str] = "shutdown"
    model: ClassVar[None] = None  # it ends every load
    ticket: Ticket
    at: float
    keep: bool = True
    can_be_kept: bool = True  # evidence


@dataclass(frozen=True, slots=True)
class _OfLoad:
    generation: Generation
    at: float


@dataclass(frozen=True, slots=True)
class Emptied(_OfLoad):
    """The kill ladder has ended, and the slot was verified empty."""

    trigger: ClassVar[str] = "emptied"
    effect: ClassVar[str] = "kill"
    exit: Exit | None = None


@dataclass(frozen=True, slots=True)
class KillFailed(_OfLoad):
    """A process of the slot has survived the whole kill ladder."""

    trigger: ClassVar[str] = "kill_failed"
    effect: ClassVar[str] = "kill"
    problem: Problem


@dataclass(frozen=True, slots=True)
class Resolved(_OfLoad):
    """The Hub has named the commit and the files of a model and grants access to them."""

    trigger: ClassVar[str] = "resolved"
    effect: ClassVar[str] = "resolve"
    model: ModelFiles


@dataclass(frozen=True, slots=True)
class Fetched(_OfLoad):
    trigger: ClassVar[str] = "fetched"
    effect: ClassVar[str] = "download"
    model: ModelFiles
    slot: SlotEvidence = SlotEvidence(is_empty=False, reason="not asked")  # evidence


@dataclass(frozen=True, slots=True)
class FetchFailed(_OfLoad):
    """The Hub refuses the model, or its files cannot be downloaded."""

    trigger: ClassVar[str] = "fetch_failed"
    effect: ClassVar[str] = "download"
    problem: Problem


@dataclass(frozen=True, slots=True)
class Spawned(_OfLoad):
    trigger: ClassVar[str] = "spawned"
    effect: ClassVar[str] = "spawn"
    child: Child


@dataclass(frozen=True, slots=True)
class SpawnFailed(_OfLoad):
    trigger: ClassVar[str] = "spawn_failed"
    effect: ClassVar[str] = "spawn"
    problem: Problem


@dataclass(frozen=True, slots=True)
class Sized(_OfLoad):
    """What the server of this load takes of memory, as far as it is known by now."""

    trigger: ClassVar[str] = "sized"
    memory: Memory


@dataclass(frozen=True, slots=True)
class BecameReady(_OfLoad):
    trigger: ClassVar[str] = "ready"
    effect: ClassVar[str] = "probe"
    server: ServerFacts
    child_is_alive: bool = True  # evidence


@dataclass(frozen=True, slots=True)
class NotReady(_OfLoad):
    trigger: ClassVar[str] = "not_ready"
    effect: ClassVar[str] = "probe"
    problem: Problem


@dataclass(frozen=True, slots=True)
class Exited(_OfLoad):
    """Our own child has ended, whether or not we ended it."""

    trigger: ClassVar[str] = "exited"
    exit: Exit


@dataclass(frozen=True, slots=True)
class Hung(_OfLoad):
    """Our own child lives, but has neither answered a probe nor worked for `silent_s` seconds."""

    trigger: ClassVar[str] = "hung"
    exit: Exit
    silent_s: float


@dataclass(frozen=True, slots=True)
class Drained(_OfLoad):
    """The last lease of a server whose gate is closed has been released."""

    trigger: ClassVar[str] = "drained"


@dataclass(frozen=True, slots=True)
class Found(_OfLoad):
    """What a dead owner has left in the slot: the first fact, if there is anything.

    `child` is None if it is not known which process that is. `target` is what it was started with,
    if its keeper has kept it for the next owner.
    """

    trigger: ClassVar[str] = "found"
    child: Child | None
    target: Target | None


@dataclass(frozen=True, slots=True)
class Promoted(_OfLoad):
    """A queued load may start now. The machine posts this to itself."""

    trigger: ClassVar[str] = "promote"
    child_is_alive: bool = True  # evidence


@dataclass(frozen=True, slots=True)
class TimerFired(_OfLoad):
    """A timer of `generation` has run out: the deadline of that load, the drain or the idle time
    of its server, or the wait before that server is restarted. For `look_up` it is a ticket.

    `idle_in_s` is asked for the idle time only: 0 closes the gate of an unused server.
    """

    kind: Timer
    idle_in_s: float | None = None  # evidence

    @property
    def trigger(self) -> str:
        return "restart_due" if self.kind == "restart" else f"{self.kind}_expired"


ModelRequested = LoadRequested | PrefetchRequested
LookedUp = ModelRequested | LookUpFailed
EndRequested = UnloadRequested | CancelRequested | Withdrawn | ShutdownRequested
Request = LookUpRequested | LookedUp | EndRequested | LeaseRequested
Failure = KillFailed | FetchFailed | SpawnFailed | NotReady
Completion = Emptied | Resolved | Fetched | Spawned | BecameReady | Failure
Report = Completion | Sized | Exited | Hung | Drained | Found | Promoted | TimerFired
Fact = Request | Report
WithChildEvidence = LoadRequested | LeaseRequested | BecameReady | Promoted
