"""What became of every load, for whoever asks later.

Written in each step before the snapshot shows it, so that a load is unsettled or has an outcome,
and never neither. Of the load, not of one of its callers: one that left takes no answer with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from orchestrator.context import Context, Job
from orchestrator.errors import Problem
from orchestrator.messages import Answer, Command, Fact, Loaded, Promoted, Settle, Timings
from orchestrator.ports import Clock
from orchestrator.snapshot import Snapshot
from orchestrator.states import TIMED
from orchestrator.tokens import Generation

_KEPT: Final = 256


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """What is remembered of a load from its acceptance on, for display.

    Attributes:
        job: As it was when it was last wanted.
        accepted_at: Unix seconds.
        timings: Seconds in each phase; `total` counts up to the answer.
        answer: What became of it; None while it is in flight.
    """

    job: Job
    accepted_at: float
    timings: Timings
    answer: Loaded | Problem | None = None


class History:
    """The last loads by generation; those in flight are never forgotten. Owner's thread writes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.records: dict[Generation, LoadRecord] = {}

    @property
    def outcomes(self) -> dict[Generation, Loaded | Problem]:
        """What became of the loads that have ended, oldest generation first."""
        known = sorted(self.records.items())  # copied in one go: another thread writes
        return {generation: r.answer for generation, r in known if r.answer is not None}

    def note(
        self, before: Snapshot, fact: Fact, shown: Snapshot, commands: Sequence[Command]
    ) -> tuple[Loaded | Problem, ...]:
        """Keep what a step did to the loads, and return what became of those it settles."""
        old, new = before.ctx, shown.ctx
        if old.job is new.job and old.queue is new.queue and old.waiters is new.waiters:
            return ()  # as in every step of a lease
        self._note_jobs(before, shown)
        settled = sorted(unsettled(before.ctx) - unsettled(shown.ctx))
        if not settled:
            return ()
        said = [command.answer for command in commands if isinstance(command, Settle)]
        said += [waiter.answer for waiter in before.ctx.waiters]
        return tuple(self._settle(generation, said, fact, shown) for generation in settled)

    def _settle(
        self, generation: Generation, said: Sequence[Answer], fact: Fact, shown: Snapshot
    ) -> Loaded | Problem:
        own = (a for a in said if isinstance(a, Loaded | Problem) and a.generation == generation)
        answer = next(own, None) or _unheard(generation, fact, shown.ctx)
        known = self.records.pop(generation)  # what has ended goes to the end
        timings = replace(known.timings, total=self._clock() - known.job.accepted_at)
        if isinstance(answer, Problem):
            answer = answer.told(shown.story)
        elif answer.generation == generation:
            timings = answer.timings  # as its callers were told
        self.records[generation] = replace(known, timings=timings, answer=answer)
        ended = [g for g, record in self.records.items() if record.answer is not None]
        for forgotten in ended[:-_KEPT]:
            del self.records[forgotten]
        return answer

    def _note_jobs(self, before: Snapshot, shown: Snapshot) -> None:
        """Keep what every load in flight is, and book the phase in which one ends."""
        wanted = {job.generation: job for job in shown.ctx.wanted}
        for generation, job in wanted.items():
            known = self.records.get(generation)
            accepted_at = known.accepted_at if known else time.time()
            self.records[generation] = LoadRecord(job, accepted_at, job.timings)
        last = before.ctx.job
        if last is not None and last.token is None and last.generation not in wanted:
            known = self.records[last.generation]
            timings = last.spent(TIMED[before.state], self._clock())
            self.records[last.generation] = replace(known, timings=timings)


def unsettled(ctx: Context) -> set[Generation]:
    """Loads in flight, and those that have failed and whose callers hear so in the end."""
    failed = [w.answer.generation for w in ctx.waiters if isinstance(w.answer, Problem)]
    failed += [c.failure.generation for job in ctx.wanted for c in job.callers if c.failure]
    return {job.generation for job in ctx.wanted} | {Generation(g) for g in failed if g}


def _unheard(generation: Generation, fact: Fact, ctx: Context) -> Loaded | Problem:
    """Return what became of a load whose last caller has gone: nobody was told, but may ask."""
    running, error = ctx.running, ctx.last_error
    if running is not None and isinstance(fact, Promoted):
        return replace(running.loaded(), already=True)
    if running is not None and running.generation == generation:
        return running.loaded()
    if error is not None and error.generation == generation:
        return error
    back = error.restored if error is not None else None
    if back is not None and back.generation == generation and back.problem is not None:
        return back.problem
    return Problem("cancelled", "its last caller has gone away", generation=generation)
