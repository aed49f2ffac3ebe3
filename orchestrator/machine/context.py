"""The machine's memory between two facts: one frozen value, which actions replace.

Everything a decision depends on is in here, except what only the operating system knows: that
arrives as evidence on the fact.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Final, Literal

from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import Concluded, Loaded, Settle, Timings
from orchestrator.machine.facts import Child, Exit, Purpose, ServerFacts
from orchestrator.machine.recovery import Recovery, RestartPolicy
from orchestrator.settings.memory import Memory
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ReloadReason, Source, Target

EffectKind = Literal["kill", "download", "spawn", "probe"]
"""The effects of states. What is done for queued loads and prefetches is not among them."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Settings of the embedding program, which never change."""

    drain_timeout_s: float = 30.0  # how long a swap or an unload waits for leases
    abandoned_load: Literal["cancel", "continue"] = "cancel"  # a load without callers
    restart: RestartPolicy | None = None  # of a server that ended by itself; None = never
    idle_ttl_s: float | None = None  # stop a server after this time without use; None = never
    keeps_server: bool = False  # for the next owner, at the end of the host
    warms: bool = False  # the files of the next model while the running server ends
    keeps_prompts: bool = False  # of a server that is stopped for another load
    max_looking: int = 1024  # calls whose model is being looked up
    max_waiting: int = 64  # queued loads
    max_prefetches: int = 4  # downloads beside the load in flight


@dataclass(frozen=True, slots=True)
class Caller:
    """A call that waits for a load.

    `failure` is set if the load it requested has failed: it now waits for the load that restores
    the previous model, and is answered with both outcomes.
    """

    ticket: Ticket
    request_id: str | None
    joined: bool = False
    failure: Problem | None = None


@dataclass(frozen=True, slots=True)
class LookUp:
    """A call whose model is being looked up. It has no generation yet."""

    ticket: Ticket
    request: LoadRequest
    purpose: Purpose
    at: float
    has_caller: bool = True  # False: the caller has gone away, and the policy continues its load


@dataclass(frozen=True, slots=True)
class Job:
    """An accepted load that has not ended."""

    generation: Generation
    target: Target
    callers: tuple[Caller, ...]  # empty once it is cancelled
    accepted_at: float
    phase_at: float = 0.0  # when its current phase began, once it is in flight; monotonic seconds
    timings: Timings = Timings()
    reload_reasons: tuple[ReloadReason, ...] = ()
    newest_before: Ticket = Ticket(0)  # `Context.newest_load` when it was accepted
    token: CancelReason | None = None  # mirrors its cancel token; both are set in one step
    attempts: int = 0  # how often the slot was occupied again between kill and spawn
    awaits: Literal["answer", "files"] | None = None  # of the Hub, while it is queued
    after: Problem | None = None  # the failure that it repairs; such a load needs no caller
    is_adoption: bool = False  # of a server that was found; neither does this
    memory: Memory | None = None  # of its server, as far as it is known
    failed: Concluded | None = None  # the failed load that it follows; concluded together

    @property
    def is_own(self) -> bool:
        """Whether it goes on without a caller."""
        return self.after is not None or self.is_adoption

    def spent(self, phase: str, at: float) -> Timings:
        """Return the timings including the current phase up to `at`."""
        so_far = (getattr(self.timings, phase) or 0.0) + at - self.phase_at
        return replace(self.timings, **{phase: so_far})


@dataclass(frozen=True, slots=True)
class EffectInFlight:
    """The one effect whose completion the machine waits for."""

    kind: EffectKind
    generation: Generation


@dataclass(frozen=True, slots=True)
class Running:
    """What the Healthy server was started with; later requests are compared with it."""

    generation: Generation
    target: Target
    child: Child
    server: ServerFacts
    timings: Timings
    reload_reasons: tuple[ReloadReason, ...]
    at: float  # when it became Healthy, monotonic seconds
    wanted_at: float = 0.0  # when a load last asked for it
    idle_ttl_s: float | None = None  # it is stopped after this time without use; None = never
    adopted: bool = False  # from a dead owner
    memory: Memory | None = None

    def loaded(self, *, already: bool = False) -> Loaded:
        """Return the answer to a load that ends with this server."""
        return Loaded(
            self.generation,
            self.target,
            self.child,
            self.server,
            self.timings,
            () if already else self.reload_reasons,
            already,
            adopted=self.adopted,
            memory=self.memory,
        )


@dataclass(frozen=True, slots=True)
class Context:
    """The machine's memory."""

    policy: Policy = field(default_factory=Policy)
    generation: Generation = Generation(0)
    last_prefetch: Generation = Generation(0)
    job: Job | None = None  # the load in flight; a cancelled one stays until its effect has ended
    queue: tuple[Job, ...] = ()  # accepted loads, oldest first; one that awaits blocks the others
    prefetches: tuple[Job, ...] = ()  # downloads that no load follows
    look_ups: tuple[LookUp, ...] = ()
    effect: EffectInFlight | None = None
    child: Child | None = None  # what the slot may hold; cleared when it is verified empty
    child_end: Literal["found", "reported", "hung"] | None = None
    """Why it ends, if not for us: it was found dead, its exit was reported, or it hangs."""
    running: Running | None = None  # what the child was committed with; cleared when it is stopped
    gate: Literal["open", "draining"] | None = None
    """Of the running server: whether leases are granted, or Killing waits for the last one."""
    lease_waiters: tuple[Ticket, ...] = ()
    waiters: tuple[Settle, ...] = ()  # answers to give when the slot is verified empty
    ending: tuple[Concluded, ...] = ()  # loads to conclude at that moment
    newest_load: Ticket = Ticket(0)  # the latest accepted call, without callers that have left
    unloads: tuple[tuple[str | None, Ticket], ...] = ()  # the latest of each model; None is any
    is_shutting_down: bool = False
    cancelled_ids: tuple[tuple[str, float], ...] = ()  # cancels that came before their load
    seen_ids: tuple[str, ...] = ()  # a cancel of one of these is late, not early
    committed_args: tuple[tuple[Source, tuple[str, ...]], ...] = ()  # of the last Healthy load
    previous: Target | None = None  # what ran before the load in flight, to be restored
    recovery: Recovery | None = None
    last_error: Problem | None = None
    last_exit: Exit | None = None

    def updated(self, **changes: Any) -> Context:
        """Do what `dataclasses.replace` does in a third of the time: every step needs it."""
        values = list(_values(self))
        for name, value in changes.items():
            values[_INDEX[name]] = value
        return Context(*values)

    @property
    def loading(self) -> Job | None:
        """The load in flight, unless it was cancelled."""
        return self.job if self.job is not None and self.job.token is None else None

    @property
    def wanted(self) -> tuple[Job, ...]:
        """The loads that have not been cancelled, oldest first."""
        return tuple(job for job in (self.job, *self.queue) if job and job.token is None)

    @property
    def is_due(self) -> bool:
        """Whether the first load in the queue waits for its turn only."""
        return bool(self.queue) and self.queue[0].awaits is None


_NAMES: Final = tuple(f.name for f in fields(Context))
_INDEX: Final = {name: index for index, name in enumerate(_NAMES)}
_values = attrgetter(*_NAMES)
