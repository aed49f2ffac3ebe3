"""What a caller is shown: answers and snapshots as plain frozen data, made from the core's own.

Field names are the public vocabulary of the contract; `as_dict` is what HTTP and `--json` print.
Nothing here decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orchestrator.base.record import Record
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import Concluded, LeaseGranted, Loaded, Timings
from orchestrator.machine.context import Context, Job
from orchestrator.machine.facts import Exit
from orchestrator.machine.states import PHASES, State
from orchestrator.models.variants import Variant
from orchestrator.runtime.history import LoadRecord
from orchestrator.runtime.ports import Progress as PhaseProgress
from orchestrator.runtime.snapshot import Snapshot
from orchestrator.settings.fields import ECHOED, SETTINGS, EchoedFields, Kind
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ReloadReason, Target

ProgressOf = Callable[[Generation], PhaseProgress | None]
"""The bytes of the work that is done for a load; None where nothing is counted."""


@dataclass(frozen=True, slots=True)
class LoadOutcome(Record, EchoedFields):
    """The answer to a load, and what `status` shows as `loaded`.

    `as_dict` leaves out settings of `EchoedFields` that have their default.

    Attributes:
        status: `loaded`, or `already_loaded` when nothing had to be done.
        joined: Another call had asked for the same and this one shared its load.
        base_url: Where the server answers, e.g. `http://127.0.0.1:36017`.
        context_length: What the server really has per slot, tokens; None if it does not say.
        requested_context_length: What was asked for; 0 = Auto.
        revision: Commit of a Hub model.
        note: What is worth knowing, e.g. that the Hub could not be asked for a newer revision.
        llama_extra_args: The effective ones; they may be posted back and mean the same.
        timings_s: Seconds in `kill`, `download`, `spawn`, `health`, and in `total`.
    """

    status: Literal["loaded", "already_loaded"]
    generation: Generation
    joined: bool
    model_path: str
    gguf_variant: str | None
    revision: str | None = field(default=None, kw_only=True)
    note: str | None = field(default=None, kw_only=True)
    pid: int
    base_url: str
    context_length: int | None
    requested_context_length: int
    cache_type_kv: str | None
    speculative_type: str
    llama_extra_args: list[str]
    is_vision: bool
    reload_reasons: list[ReloadReason]
    timings_s: Timings

    def as_dict(self) -> dict[str, Any]:
        members = {
            name: value
            for name in self.__slots__
            if (value := getattr(self, name)) is not None or name not in {"revision", "note"}
        }
        members |= {
            name: value
            for name in ECHOED
            if (value := getattr(self, name)) != SETTINGS[name].default
        }
        members["reload_reasons"] = [reason.as_dict() for reason in self.reload_reasons]
        members["timings_s"] = asdict(self.timings_s)
        return members


@dataclass(frozen=True, slots=True)
class Loading(Record):
    """The load in flight: its target and its phase."""

    generation: Generation
    model_path: str
    gguf_variant: str | None
    phase: str | None
    callers: int
    queued: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RecoveryStatus(Record):
    """A server that ended by itself and is to be started again, or is not for a while.

    Attributes:
        phase: `waiting` for the restart, `trying`, or `cooling_down`.
        failures: How often it has failed in a row.
        left_s: Until the wait or the cool-down is over, seconds; 0 while trying.
    """

    model_path: str
    phase: Literal["waiting", "trying", "cooling_down"]
    failures: int
    left_s: float


@dataclass(frozen=True, slots=True)
class Status(Record):
    """What is true right now.

    Attributes:
        since: When the present state was entered, Unix seconds.
        uptime_s: Seconds in the present state.
        occupied_by: Pid of a process that would not die and keeps the slot occupied.
        recovery: What is done about a server that ended by itself.
        idle_unload_in_s: Until the model is unloaded for being idle, seconds; None while it is in
            use, or if it stays.
        story: The last transitions, oldest first.
        prefetching: Downloads that are no load's own.
    """

    state: State
    generation: Generation
    loaded: LoadOutcome | None
    loading: Loading | None
    last_error: Problem | None
    last_exit: Exit | None
    since: float
    uptime_s: float
    occupied_by: int | None
    recovery: RecoveryStatus | None
    story: tuple[str, ...]
    prefetching: tuple[Prefetching, ...] = ()
    idle_unload_in_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "state": self.state.value,
            "generation": self.generation,
            "loaded": self.loaded.as_dict() if self.loaded else None,
            "loading": self.loading.as_dict() if self.loading else None,
            "last_error": self.last_error.as_dict() if self.last_error else None,
            "last_exit": asdict(self.last_exit) if self.last_exit else None,
            "since": self.since,
            "uptime_s": self.uptime_s,
            "occupied_by": self.occupied_by,
            "recovery": asdict(self.recovery) if self.recovery else None,
            "story": list(self.story),
            "prefetching": [asdict(one) for one in self.prefetching],
            "idle_unload_in_s": self.idle_unload_in_s,
        }


@dataclass(frozen=True, slots=True)
class LoadProgress(Record):
    """How far the load in flight is; `fraction` never goes back within a phase."""

    phase: str | None
    bytes_done: int | None
    bytes_total: int | None
    fraction: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Prefetching(Record):
    """A download while something else may run."""

    model_path: str
    gguf_variant: str | None
    bytes_done: int
    bytes_total: int | None


@dataclass(frozen=True, slots=True)
class PrefetchOutcome(Record):
    """A model that is whole on disk.

    Attributes:
        revision: The commit; None for a local model.
        files: Where its files are: every part, and the projector last.
    """

    model_path: str
    gguf_variant: str | None
    revision: str | None
    size_bytes: int
    files: list[str]
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PastLoad(Record):
    """One of the last loads, or one that is in flight.

    Attributes:
        state: Where it is, or where it ended: Healthy or Idle.
        accepted_at: Unix seconds.
        took_s: Seconds until it had its outcome; None while it has none.
        timings_s: Seconds in each phase that has ended.
        outcome: What the load answered, or its problem.
    """

    generation: Generation
    state: State
    model_path: str
    gguf_variant: str | None
    accepted_at: float
    took_s: float | None
    timings_s: Timings
    outcome: LoadOutcome | Problem | None = None

    def as_dict(self) -> dict[str, Any]:
        members = {name: getattr(self, name) for name in self.__slots__}
        members |= {"state": self.state.value, "timings_s": asdict(self.timings_s)}
        if self.outcome is None:
            del members["outcome"]
        else:
            members["outcome"] = self.outcome.as_dict()
        return members


@dataclass(frozen=True, slots=True)
class Variants(Record):
    """What a model could be loaded as; the preferred one first."""

    model_path: str
    variants: list[Variant]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Options(Record):
    """The values that settings may have with this server binary."""

    cache_type_kv: list[str]
    speculative_type: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LeasedServer(Record):
    """A server that no swap ends while the lease is held.

    Attributes:
        api_key: What a protected server wants as a Bearer token; None if it takes everybody.
        kind: What it is for.
    """

    base_url: str
    pid: int
    generation: Generation
    api_key: str | None = field(default=None, repr=False)
    kind: Kind = "chat"


@dataclass(frozen=True, slots=True)
class UnloadOutcome(Record):
    """`unloaded`: the slot is verified empty, or what was named only waited in the queue behind
    another load, which goes on. `not_loaded`: it named a model that is not there.
    """

    status: Literal["unloaded", "not_loaded"]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_outcome(answer: Loaded) -> LoadOutcome:
    return LoadOutcome(
        status="already_loaded" if answer.already else "loaded",
        generation=answer.generation,
        joined=answer.joined,
        pid=answer.child.pid,
        base_url=answer.server.base_url,
        context_length=answer.server.context_length,
        is_vision=answer.server.is_vision or answer.target.is_vision,
        reload_reasons=list(answer.reload_reasons),
        timings_s=answer.timings,
        **_settings(answer.target),
    )


def outcome(record: LoadRecord) -> LoadOutcome | Problem:
    """What became of a load."""
    answer = record.answer
    return load_outcome(answer) if isinstance(answer, Loaded) else answer


def past_load(record: LoadRecord) -> PastLoad:
    became = outcome(record)
    return PastLoad(
        generation=record.generation,
        state=State.HEALTHY if isinstance(became, LoadOutcome) else State.IDLE,
        model_path=record.target.request.model_path,
        gguf_variant=record.target.model.variant,
        accepted_at=round(record.accepted_at, 3),
        took_s=record.timings.total,
        timings_s=record.timings,
        outcome=became,
    )


def loads_in_flight(snapshot: Snapshot, now: float) -> dict[Generation, PastLoad]:
    """Return every load that has no outcome yet: wanted, or with an end that is still to be told.

    Args:
        now: Monotonic seconds.
    """
    ctx, job = snapshot.ctx, snapshot.ctx.job
    failed = (load.failed for load in ctx.wanted if load.failed is not None)
    loads: tuple[Job | Concluded, ...] = (*ctx.wanted, *ctx.ending, *failed)
    return {
        load.generation: PastLoad(
            generation=load.generation,
            state=snapshot.state if job and job.generation == load.generation else State.IDLE,
            model_path=load.target.request.model_path,
            gguf_variant=load.target.model.variant,
            accepted_at=round(time.time() - (now - load.accepted_at), 3),
            took_s=None,
            timings_s=load.timings,
            outcome=None,
        )
        for load in loads
    }


def prefetch_outcome(request: LoadRequest, files: ModelFiles) -> PrefetchOutcome:
    return PrefetchOutcome(
        request.model_path,
        files.variant,
        files.hub.commit if files.hub else None,
        files.size_bytes,
        [file.path for file in (*files.weights, *filter(None, (files.projector,)))],
        files.hub.note if files.hub else None,
    )


def leased_server(answer: LeaseGranted) -> LeasedServer:
    server, child, kind = answer.server, answer.child, answer.target.request.kind
    return LeasedServer(server.base_url, child.pid, child.generation, server.api_key, kind)


def status(snapshot: Snapshot, now: float, progress_of: ProgressOf) -> Status:
    ctx = snapshot.ctx
    healthy = snapshot.state is State.HEALTHY
    return Status(
        state=snapshot.state,
        generation=_generation(ctx),
        loaded=load_outcome(ctx.running.loaded()) if healthy and ctx.running else None,
        loading=_loading(snapshot.state, ctx),
        last_error=ctx.last_error,
        last_exit=ctx.last_exit,
        since=snapshot.since,
        uptime_s=round(max(0.0, now - snapshot.entered_at), 3),
        occupied_by=ctx.child.pid if snapshot.state is State.IDLE and ctx.child else None,
        recovery=_recovery(ctx, now) if not healthy else None,
        story=snapshot.story,
        prefetching=tuple(_prefetching(job, progress_of) for job in ctx.prefetches),
        idle_unload_in_s=_idle_in_s(ctx, now) if healthy else None,
    )


def not_started() -> Status:
    """The status of an orchestrator nobody has used yet."""
    return status(Snapshot(State.IDLE, Context(), time.time(), 0.0), 0.0, lambda _: None)


def _prefetching(job: Job, progress_of: ProgressOf) -> Prefetching:
    counted, request = progress_of(job.generation), job.target.request
    done, total = (counted.bytes_done, counted.bytes_total) if counted else (0, None)
    return Prefetching(request.model_path, job.target.model.variant, done, total)


def progress(snapshot: Snapshot, progress_of: ProgressOf) -> LoadProgress:
    ctx = snapshot.ctx
    job = ctx.wanted[0] if ctx.wanted else None
    phase = PHASES.get(snapshot.state) if job is None else _phase(snapshot.state, ctx, job)
    if snapshot.state is State.HEALTHY and job is None:
        return LoadProgress(phase, None, None, 1.0)
    counts = phase in {PHASES[State.DOWNLOADING], PHASES[State.WAITING_HEALTH]}
    counted = progress_of(job.generation) if job is not None and counts else None
    if counted is None:
        return LoadProgress(phase, None, None, None)
    done, total = counted.bytes_done, counted.bytes_total
    return LoadProgress(phase, done, total, done / total if total else None)


def _phase(state: State, ctx: Context, job: Job) -> str | None:
    """The word for where a load is; the state may be that of what still runs."""
    return PHASES[State.DOWNLOADING] if job.awaits else PHASES.get(state)


def _settings(target: Target) -> dict[str, Any]:
    return {
        "model_path": target.request.model_path,
        "gguf_variant": target.model.variant,
        "revision": target.model.hub.commit if target.model.hub else None,
        "note": target.model.hub.note if target.model.hub else None,
        "requested_context_length": target.request.max_seq_length,
        "cache_type_kv": target.request.cache_type_kv,
        "speculative_type": target.effective_speculative_type,
        "llama_extra_args": list(target.extra_args),
        **{name: target.request.effective(name) for name in ECHOED},
    }


def _generation(ctx: Context) -> Generation:
    """The load the status is about: what is on its way, else what runs, else the last one."""
    if ctx.wanted:
        return ctx.wanted[0].generation
    return ctx.running.generation if ctx.running else ctx.generation


def _recovery(ctx: Context, now: float) -> RecoveryStatus | None:
    known = ctx.recovery
    if known is None or (known.phase == "cooling_down" and now >= known.until):
        return None
    left_s = 0.0 if known.phase == "trying" else _left_s(known.until, now)
    return RecoveryStatus(known.target.request.model_path, known.phase, known.failures, left_s)


def _idle_in_s(ctx: Context, now: float) -> float | None:
    at = ctx.running.idle_at if ctx.running else None
    return None if at is None else _left_s(at, now)


def _left_s(at: float, now: float) -> float:
    return round(max(0.0, at - now), 3)


def _loading(state: State, ctx: Context) -> Loading | None:
    if not ctx.wanted:
        return None
    job: Job = ctx.wanted[0]
    return Loading(
        generation=job.generation,
        model_path=job.target.request.model_path,
        gguf_variant=job.target.model.variant,
        phase=_phase(state, ctx, job),
        callers=len(job.callers),
        queued=len(ctx.wanted) - 1,
    )
