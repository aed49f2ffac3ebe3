"""What is true after a step, and what callers read from it. `now` is monotonic seconds.

The owner replaces its snapshot as a whole: readers need no lock and never see half a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from orchestrator.base.paths import PathNames
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import Command, Concluded
from orchestrator.machine.context import Context, Job, Running
from orchestrator.machine.facts import Fact
from orchestrator.machine.states import PHASES, State
from orchestrator.runtime import answers
from orchestrator.runtime.answers import LoadOutcome, LoadProgress, PastLoad, Status
from orchestrator.runtime.gate import Gate
from orchestrator.runtime.ports import Progress

ProgressOf = Callable[[Generation], Progress | None]  # `Effects.progress`


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is true after a step.

    Attributes:
        since: When the state was entered, Unix seconds; for display only.
        entered_at: The same in monotonic seconds.
        story: The last transitions, oldest first.
        history: The last loads that have ended, oldest first.
    """

    state: State
    ctx: Context
    since: float
    entered_at: float
    story: tuple[str, ...] = ()
    history: tuple[PastLoad, ...] = ()

    def status(self, now: float, progress_of: ProgressOf, gate: Gate | None = None) -> Status:
        state, ctx, running = self.state, self.ctx, self.ctx.running
        is_healthy = state is State.HEALTHY
        idle_at = _idle_at(running, gate) if running and is_healthy else None
        leases = self.leases(gate)
        is_draining = ctx.gate == "draining" and leases > 0
        drained_at = self.entered_at + ctx.policy.drain_timeout_s
        return Status(
            state=state,
            generation=(ctx.wanted[0] if ctx.wanted else running or ctx).generation,
            loaded=answers.load_outcome(running.loaded()) if running and is_healthy else None,
            loading=_loading(state, ctx),
            last_error=ctx.last_error,
            last_exit=ctx.last_exit,
            since=self.since,
            uptime_s=_seconds(self.entered_at, now),
            occupied_by=ctx.child.pid if state is State.IDLE and ctx.child else None,
            recovery=None if is_healthy else _recovery(ctx, now),
            story=self.story,
            prefetching=tuple(_prefetching(job, progress_of) for job in ctx.prefetches),
            idle_unload_in_s=None if idle_at is None else _seconds(now, idle_at),
            leases=leases,
            draining_left_s=_seconds(now, drained_at) if is_draining else None,
        )

    def leases(self, gate: Gate | None) -> int:
        """Return how many leases there are of a server that is not lost to them."""
        return gate.inside if gate is not None and self.ctx.gate is not None else 0

    def progress(self, progress_of: ProgressOf) -> LoadProgress:
        job = self.ctx.wanted[0] if self.ctx.wanted else None
        phase = _phase(self.state, job)
        if job is None:
            return LoadProgress(phase, None, None, 1.0 if self.state is State.HEALTHY else None)
        has_bytes = self.state is not State.SPAWNING
        counted = progress_of(job.generation) if has_bytes else None
        if counted is None:
            return LoadProgress(phase, None, None, None)
        done, total = counted.bytes_done, counted.bytes_total
        is_all_read = done == total and self.state is State.WAITING_HEALTH  # but not yet ready
        fraction = done / total if total and not is_all_read else None
        return LoadProgress(phase, done, total, fraction)

    def loads(self, now: float) -> dict[Generation, PastLoad]:
        """Return the loads in flight and those that have ended, by generation."""
        ctx = self.ctx
        in_flight: list[Job | Concluded] = [*ctx.wanted, *ctx.ending]
        in_flight += [load.failed for load in ctx.wanted if load.failed is not None]
        loads = {}
        for load in in_flight:
            is_job = ctx.job is not None and ctx.job.generation == load.generation
            loads[load.generation] = _load(load, self.state if is_job else State.IDLE, now)
        return {**loads, **{load.generation: load for load in self.history}}


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step: its fact, the snapshots before and after it, and its commands."""

    fact: Fact
    before: Snapshot
    after: Snapshot
    commands: tuple[Command, ...]


Observer = Callable[[StepReport], None]


class KnownNames:
    """The display names of all paths in an orchestrator's answers, for `http.paths`."""

    def __init__(self, folders: tuple[PathNames, ...]) -> None:
        self._folders = folders
        self._last: tuple[tuple[object, ...], tuple[PathNames, ...]] | None = None

    def now(self, snapshot: Snapshot) -> tuple[PathNames, ...]:
        """Return all names; the same tuple as before unless what contains them has changed."""
        ctx, history = snapshot.ctx, snapshot.history
        sources = (
            *(ctx.job, ctx.running, ctx.queue, ctx.prefetches, ctx.ending, ctx.previous),
            *(ctx.recovery, ctx.last_error, history),
        )
        last = self._last
        if last is None or any(a is not b for a, b in zip(last[0], sources, strict=True)):
            names = (*self._folders, *_names(ctx), *(load.names for load in history))
            last = self._last = sources, tuple(filter(None, names))
        return last[1]


def ended_load(ended: Concluded, now: float, story: tuple[str, ...]) -> PastLoad:
    """Return a load that ends now; a problem gets the story."""
    load, answer, names = _load(ended, State.IDLE, now), ended.answer, ended.target.names
    timings = replace(ended.timings, total=now - ended.accepted_at)
    if isinstance(answer, Problem):
        outcome: LoadOutcome | Problem = replace(answer, story=story)
        names += answer.names
    else:
        load, outcome = replace(load, state=State.HEALTHY), answers.load_outcome(answer)
        names += tuple(chain.from_iterable(reason.names for reason in answer.reload_reasons))
        if answer.generation == ended.generation:
            timings = answer.timings  # the same as its callers get
    return replace(load, took_s=timings.total, timings_s=timings, outcome=outcome, names=names)


def _idle_at(running: Running, gate: Gate | None) -> float | None:
    used_at = gate.used_at if gate is not None else None
    if running.idle_ttl_s is None or used_at is None:
        return None
    return max(used_at, running.wanted_at) + running.idle_ttl_s


def _load(load: Job | Concluded, state: State, now: float) -> PastLoad:
    return PastLoad(
        generation=load.generation,
        state=state,
        model_path=load.target.request.model_path,
        gguf_variant=load.target.model.variant,
        accepted_at=round(time.time() - (now - load.accepted_at), 3),
        took_s=None,
        timings_s=load.timings,
        request=load.target.request.changed(),
    )


def _loading(state: State, ctx: Context) -> answers.Loading | None:
    if not ctx.wanted:
        return None
    job, target = ctx.wanted[0], ctx.wanted[0].target
    return answers.Loading(
        generation=job.generation,
        model_path=target.request.model_path,
        gguf_variant=target.model.variant,
        phase=_phase(state, job),
        callers=len(job.callers),
        queued=len(ctx.wanted) - 1,
    )


def _phase(state: State, job: Job | None) -> str | None:
    """A load that waits for the Hub is downloading, whatever the running server does."""
    return PHASES[State.DOWNLOADING] if job is not None and job.awaits else PHASES.get(state)


def _recovery(ctx: Context, now: float) -> answers.RecoveryStatus | None:
    known = ctx.recovery
    if known is None or (known.phase == "cooling_down" and now >= known.until):
        return None
    path, phase = known.target.request.model_path, known.phase
    left_s = 0.0 if phase == "trying" else _seconds(now, known.until)
    return answers.RecoveryStatus(path, phase, known.failures, left_s)


def _prefetching(job: Job, progress_of: ProgressOf) -> answers.Prefetching:
    counted, target = progress_of(job.generation), job.target
    done, total = (counted.bytes_done, counted.bytes_total) if counted else (0, None)
    return answers.Prefetching(target.request.model_path, target.model.variant, done, total)


def _names(ctx: Context) -> Iterator[PathNames]:
    for load in (*ctx.queue, *ctx.prefetches, *filter(None, (ctx.job,)), ctx.running):
        if load is not None:
            yield load.target.names
            yield from (reason.names for reason in load.reload_reasons)
    for ended in (*ctx.ending, ctx.recovery):
        if ended is not None:
            yield ended.target.names
    for one in (ctx.previous, ctx.last_error):
        if one is not None:
            yield one.names


def _seconds(start: float, end: float) -> float:
    return round(max(0.0, end - start), 3)
