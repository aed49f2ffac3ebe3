"""The step in progress, and the operations that several actions share.

Each load is concluded exactly once, with or without callers. A failed load that is followed by the
previous model is concluded together with the load that restores it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.errors import Problem, Restored
from orchestrator.machine import commands
from orchestrator.machine.context import Caller, Context, Job, LookUp
from orchestrator.machine.facts import Fact, LoadRequested, Promoted, Request
from orchestrator.machine.guards import look_up_of, restores_previous
from orchestrator.machine.recovery import Recovery, after_failure
from orchestrator.settings.target import Target

MAX_REMEMBERED = 256  # ids, unloads, and sources with their args
NOT_LOADED = Problem("not_loaded", "no model is loaded: load one first")

When = Literal["now", "empty", "effect_ended"]
"""When the callers of a load that ends are answered: now, when the slot is verified empty, or when
the effect in flight has ended. Without an effect the load only waits for leases, so that is now."""

_T = TypeVar("_T")
F_co = TypeVar("F_co", bound=Fact, covariant=True)


def require(value: _T | None) -> _T:
    """Return a value whose presence the guards of the row have checked.

    Raises:
        LookupError: it is None, which means that the table is wrong.
    """
    if value is None:
        raise LookupError("no guard of this row has checked that the value is there")
    return value


@dataclass(slots=True)
class Step(Generic[F_co]):
    """One fact being processed: the context and the commands so far.

    The type argument in an action's signature lists the facts it may be used with; a test compares
    it with the table.
    """

    ctx: Context
    fact: F_co
    was_due: bool  # the next load was due when the step began
    emitted: list[commands.Command] = field(default_factory=list)

    def put(self, **changes: Any) -> None:
        self.ctx = self.ctx.updated(**changes)

    def emit(self, *new: commands.Command) -> None:
        self.emitted.extend(new)

    def answer(self: Step[Request], answer: commands.Answer) -> None:
        """Answer the call, and end its look-up."""
        self.drop_look_up(self.fact.ticket)
        self.emit(commands.Settle(self.fact.ticket, answer))

    def answer_when_empty(self: Step[Request], answer: commands.Answer) -> None:
        """Answer the call when the slot is verified empty."""
        self.put(waiters=(*self.ctx.waiters, commands.Settle(self.fact.ticket, answer)))

    def settle(self, callers: Iterable[Caller], answer: commands.Answer) -> None:
        self.emit(*(_settled(caller, answer) for caller in callers))

    def drop_look_up(self, ticket: Ticket) -> None:
        """Forget the look-up of a call, if it has one."""
        found = look_up_of(self.ctx, ticket)
        if found is not None:
            self.put(look_ups=tuple(other for other in self.ctx.look_ups if other is not found))
            self.emit(commands.StopTimer(Generation(ticket), "look_up"))

    def end_look_ups(self, ended: Iterable[LookUp], answer: Problem) -> None:
        """Answer these calls at once; nothing waits for what is still looked up."""
        for look_up in ended:
            self.drop_look_up(look_up.ticket)
            if look_up.has_caller:
                self.emit(commands.Settle(look_up.ticket, answer))

    def set_deadline(self, job: Job) -> None:
        if (deadline_s := job.target.request.deadline_s) is not None:
            left_s = deadline_s - (self.fact.at - job.accepted_at)
            self.emit(commands.SetTimer(job.generation, "deadline", left_s))

    def drop(self, jobs: Iterable[Job], reason: CancelReason = CancelReason.USER) -> None:
        """Remove queued loads and prefetches, and cancel what was begun for them."""
        gone = {job.generation for job in jobs}
        for job in (*self.ctx.queue, *self.ctx.prefetches):
            if job.generation in gone and job.awaits is not None:
                self.emit(commands.SetToken(job.generation, reason))
        self.put(
            queue=tuple(job for job in self.ctx.queue if job.generation not in gone),
            prefetches=tuple(job for job in self.ctx.prefetches if job.generation not in gone),
        )

    def promote_next(self) -> None:
        if self.ctx.is_due:
            self.emit(commands.Post(Promoted(self.ctx.queue[0].generation, self.fact.at)))

    def refuse_waiting_leases(self) -> None:
        """Refuse them, unless a restart is planned, because no load is wanted."""
        recovery = self.ctx.recovery
        if recovery is None or recovery.phase == "cooling_down":
            why = NOT_LOADED if recovery is None else cooling_down(recovery, self.fact.at)
            self.emit(*(commands.Settle(ticket, why) for ticket in self.ctx.lease_waiters))
            self.put(lease_waiters=())

    def interrupt(self, reason: CancelReason) -> None:
        """Set the token of the load in flight, whose effect still has to end."""
        job = require(self.ctx.job)
        self.put(job=replace(job, token=reason, callers=()))
        self.emit(commands.SetToken(job.generation, reason))

    def end(self, job: Job, answer: Problem, when: When = "empty") -> None:
        if when == "now" or (when == "effect_ended" and self.ctx.effect is None):
            self.settle(job.callers, answer)
            self.conclude(job, answer)
        else:
            waiters = (_settled(caller, answer) for caller in job.callers)
            ending = (*self.ctx.ending, *self._conclusions(job, answer))
            self.put(waiters=(*self.ctx.waiters, *waiters), ending=ending)

    def conclude(self, job: Job, answer: commands.Outcome) -> None:
        self.emit(*self._conclusions(job, answer))

    def _conclusions(self, job: Job, answer: commands.Outcome) -> tuple[commands.Concluded, ...]:
        """Return the conclusion of a load, and that of the failed load it follows."""
        own = self._conclusion(job, answer)
        if job.failed is None or not isinstance(job.failed.answer, Problem):
            return (own,)
        problem = answer if isinstance(answer, Problem) else None
        return own, replace(job.failed, answer=_with_restore(job.failed.answer, problem))

    def _conclusion(self, job: Job, answer: commands.Outcome) -> commands.Concluded:
        spent = self._spent(job)
        return commands.Concluded(job.generation, job.target, job.accepted_at, spent, answer)

    def _spent(self, job: Job) -> commands.Timings:
        """Return the timings of a load, including the phase in which it ends."""
        if job is not self.ctx.job:
            return job.timings
        kind = self.ctx.effect.kind if self.ctx.effect else "kill"  # it waits for leases
        return job.spent("health" if kind == "probe" else kind, self.fact.at)

    def fail(self, job: Job, problem: Problem, when: When = "empty") -> None:
        """End a load that has failed; the previous model or a restart may follow."""
        problem = replace(problem, generation=job.generation)
        if job is self.ctx.job and restores_previous(self.ctx, self.fact):
            self.enqueue_own(require(self.ctx.previous), problem, failed=job)
            self.put(previous=None)
            return
        self.end(job, problem, when)
        after, recovery = job.after, self.ctx.recovery
        if after is None or (recovery is not None and self.ctx.is_due):
            self.put(last_error=problem)
        elif recovery is None:
            self.put(last_error=_with_restore(after, problem))
        else:
            self.plan_restart(recovery.target, job.generation, problem, ran_s=None)

    def enqueue_own(self, target: Target, failure: Problem, failed: Job | None = None) -> None:
        """Queue a load that repairs a failure. No load is due: the others await their model.

        The callers of the failed load, if there is one, are answered with both outcomes.
        """
        generation, at = Generation(self.ctx.generation + 1), self.fact.at
        restored = Restored(generation, target.request.model_path, target.model.variant)
        failure = replace(failure, restored=restored)
        callers = failed.callers if failed else ()
        job = Job(
            generation,
            target,
            tuple(replace(caller, failure=caller.failure or failure) for caller in callers),
            at,
            newest_before=self.ctx.newest_load,
            after=failure,
            failed=self._conclusion(failed, failure) if failed else None,
        )
        self.put(generation=generation, queue=(job, *self.ctx.queue), last_error=failure)
        self.set_deadline(job)

    def plan_restart(
        self, target: Target, generation: Generation, problem: Problem, ran_s: float | None
    ) -> None:
        """Start the timer of a restart, or the cool-down; `last_error` says which."""
        policy, at = require(self.ctx.policy.restart), self.fact.at
        recovery = after_failure(
            policy, self.ctx.recovery, target, generation, problem, at=at, ran_s=ran_s
        )
        limit, wait_s = policy.limit, recovery.until - at
        if recovery.phase == "waiting":
            self.emit(commands.SetTimer(generation, "restart", wait_s))
            follows = f"restart {recovery.failures} of {limit} follows within {wait_s:.3g} s"
        else:
            follows = (
                f"the limit of {limit} restarts is reached: nothing is started for {wait_s:.3g} s"
            )
        message = f"{problem.message}; {follows}"
        self.put(recovery=recovery, last_error=replace(problem, message=message))


def _settled(caller: Caller, answer: commands.Answer) -> commands.Settle:
    """Return the answer to one caller, which may be waiting since its own load has failed."""
    if caller.failure is not None:
        answer = _with_restore(caller.failure, answer if isinstance(answer, Problem) else None)
    elif isinstance(answer, commands.Loaded):
        answer = replace(answer, joined=caller.joined)
    return commands.Settle(caller.ticket, answer)


def _with_restore(failure: Problem, problem: Problem | None) -> Problem:
    """Add the outcome of the restoring load: its problem, or None for success."""
    return replace(failure, restored=replace(require(failure.restored), problem=problem))


def superseded(newer: LoadRequested, generation: Generation | None = None) -> Problem:
    message = f"superseded by a newer load of {newer.target.request.model_path}"
    return Problem("superseded", message, generation=generation)


def cooling_down(recovery: Recovery, now: float) -> Problem:
    left_s = max(0.0, recovery.until - now)
    return Problem(
        "server_start_failed",
        f"{recovery.target.request.model_path} failed {recovery.failures} times in a row and is "
        f"not started for another {left_s:.0f} s: change its settings, or set force_reload",
        generation=recovery.generation,
        log_tail=recovery.problem.log_tail,
        reason="cooling_down",
        retry_after_s=left_s,
    )
