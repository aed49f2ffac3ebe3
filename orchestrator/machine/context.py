"""What the machine remembers between two facts: one frozen value, replaced by every step.

Only actions (actions.py) make a new one. Everything a decision may depend on is in here; what
the operating system knows better arrives as evidence on the fact itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Final, Literal

from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import Answer, Concluded, Loaded, Timings
from orchestrator.machine.facts import Child, Exit, ServerFacts
from orchestrator.machine.recovery import Recovery, RestartPolicy
from orchestrator.settings.target import ReloadReason, Source, Target

EffectKind = Literal["kill", "download", "spawn", "probe"]
"""What a state has in flight; what is done for a load that waits is no effect of a state."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the embedding backend decided once.

    Attributes:
        drain_timeout_s: How long a swap or unload waits for leases to be given back.
        abandoned_load: What becomes of a load whose last caller went away.
        restart: How a server that ended by itself is started again; None = it is not.
        idle_ttl_s: A server is stopped after this long without use; None = never.
        max_waiting: How many loads wait in the queue.
        max_prefetches: How many models are fetched beside what loads or runs.
    """

    drain_timeout_s: float = 30.0
    abandoned_load: Literal["cancel", "continue"] = "cancel"
    restart: RestartPolicy | None = None
    idle_ttl_s: float | None = None
    max_waiting: int = 64
    max_prefetches: int = 4


@dataclass(frozen=True, slots=True)
class Caller:
    """One call that waits for a load.

    Attributes:
        joined: Another call had asked for the same.
        failure: How the load it asked for has failed; it waits to hear whether what ran before
            comes back.
    """

    ticket: Ticket
    request_id: str | None
    joined: bool
    failure: Problem | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """An accepted load that has not ended.

    Attributes:
        callers: Who still waits for it; empty once it is cancelled.
        newest_before: The newest load (`Context.newest_load`) when it was accepted.
        token: Mirror of its cancel token; only the step that cancels it sets both.
        phase_at: When it entered its present phase, monotonic seconds.
        attempts: How often the slot was found occupied again between kill and spawn.
        awaits: What it waits for in the queue: what the Hub says of its model, or all its files.
        after: The failure it makes good: nobody asked for this load, and it needs no caller.
        failed: The load that has failed and is concluded with this one, which brings back what
            ran before.
    """

    generation: Generation
    target: Target
    callers: tuple[Caller, ...]
    accepted_at: float
    phase_at: float
    timings: Timings = Timings()
    reload_reasons: tuple[ReloadReason, ...] = ()
    newest_before: Ticket = Ticket(0)
    token: CancelReason | None = None
    attempts: int = 0
    awaits: Literal["answer", "files"] | None = None
    after: Problem | None = None
    failed: Concluded | None = None

    def spent(self, phase: str, at: float) -> Timings:
        """Return the timings with the present phase booked up to `at`."""
        so_far = (getattr(self.timings, phase) or 0.0) + at - self.phase_at
        return replace(self.timings, **{phase: so_far})


@dataclass(frozen=True, slots=True)
class EffectInFlight:
    """The one effect whose completion the machine waits for."""

    kind: EffectKind
    generation: Generation


@dataclass(frozen=True, slots=True)
class Running:
    """What a Healthy server was started with: committed, and compared with later requests.

    Attributes:
        idle_at: When it is stopped if nobody uses it before, monotonic seconds; None = never, or
            it is in use.
    """

    generation: Generation
    target: Target
    child: Child
    server: ServerFacts
    timings: Timings
    reload_reasons: tuple[ReloadReason, ...]
    at: float
    idle_at: float | None = None

    def loaded(self, *, already: bool = False, joined: bool = False) -> Loaded:
        """The answer to a load that this is the outcome of."""
        return Loaded(
            self.generation,
            self.target,
            self.child,
            self.server,
            self.timings,
            () if already else self.reload_reasons,
            already=already,
            joined=joined,
        )


@dataclass(frozen=True, slots=True)
class Waiter:
    """A call that is answered when the slot has been verified empty."""

    ticket: Ticket
    answer: Answer


@dataclass(frozen=True, slots=True)
class Context:
    """The machine's whole memory.

    Attributes:
        child: The process the slot may hold; forgotten only when the slot is verified empty.
        job: The load in flight. A cancelled one stays until its effect has ended.
        queue: Accepted loads that come after it, oldest first. One that awaits something keeps
            those behind it waiting, and what runs running.
        prefetches: Downloads that no load follows.
        end_is_known: The child has ended by itself: found dead (`found`), and told (`told`).
        running: What the child was committed with; kept until it is stopped, for comparison.
        leases: Who keeps the running server from being stopped.
        ending: Loads that are concluded when the slot is verified empty, as `waiters` are answered.
        newest_load: The latest call whose load was accepted; who leaves a load does not count.
        unloads: The latest unload of each model, by the name it was given; None is of any model.
        cancelled_ids: Cancels that came before their load, with the time they were made.
        seen_ids: Ids of recent loads; a cancel of one of these is late, not early.
        committed_args: Extra args of the last load that became Healthy, by source.
        previous: What ran before the loads in flight; `restore_previous` brings it back.
        recovery: What is done about a server that ended by itself.
    """

    policy: Policy = field(default_factory=Policy)
    generation: Generation = Generation(0)
    last_prefetch: Generation = Generation(0)
    job: Job | None = None
    queue: tuple[Job, ...] = ()
    prefetches: tuple[Job, ...] = ()
    effect: EffectInFlight | None = None
    child: Child | None = None
    end_is_known: Literal["found", "told"] | None = None
    running: Running | None = None
    leases: frozenset[Ticket] = frozenset()
    lease_waiters: tuple[Ticket, ...] = ()
    waiters: tuple[Waiter, ...] = ()
    ending: tuple[Concluded, ...] = ()
    newest_load: Ticket = Ticket(0)
    unloads: tuple[tuple[str | None, Ticket], ...] = ()
    is_shutting_down: bool = False
    cancelled_ids: tuple[tuple[str, float], ...] = ()
    seen_ids: tuple[str, ...] = ()
    committed_args: tuple[tuple[Source, tuple[str, ...]], ...] = ()
    previous: Target | None = None
    recovery: Recovery | None = None
    last_error: Problem | None = None
    last_exit: Exit | None = None

    def having(self, **changes: Any) -> Context:
        """As `dataclasses.replace`, at a third of its cost: every request of a model comes by."""
        values = list(_values(self))
        for name, value in changes.items():
            values[_PLACES[name]] = value
        return Context(*values)

    @property
    def wanted(self) -> tuple[Job, ...]:
        """Every load that somebody still wants, oldest first."""
        return tuple(job for job in (self.job, *self.queue) if job and job.token is None)

    @property
    def is_due(self) -> bool:
        """Does a load wait for its turn, and for nothing else?"""
        return bool(self.queue) and self.queue[0].awaits is None


_NAMES: Final = tuple(f.name for f in fields(Context))
_PLACES: Final = {name: place for place, name in enumerate(_NAMES)}
_values = attrgetter(*_NAMES)
