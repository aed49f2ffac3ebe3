"""What becomes of a load: who hears of it and when, and what makes a failure good.

A load is concluded exactly once, with its callers or without; a failed one whose predecessor comes
back is concluded with that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.base.tokens import CancelReason, Generation
from orchestrator.errors import Problem, Restored
from orchestrator.machine.actions.working import Step, known, restored_with, set_deadline, told_to
from orchestrator.machine.commands import Answer, Concluded, Loaded, SetTimer, SetToken, Timings
from orchestrator.machine.context import Caller, Job, Waiter
from orchestrator.machine.facts import Fact
from orchestrator.machine.guards import restores_previous
from orchestrator.machine.recovery import Recovery, after_failed_restart
from orchestrator.settings.target import Target


def interrupt(s: Step[Fact], reason: CancelReason) -> None:
    """Set the token of the load in flight; its effect still has to end by itself."""
    job = known(s.ctx.job)
    s.put(job=replace(job, token=reason, callers=()))
    s.emit(SetToken(job.generation, reason))


def wait(s: Step[Fact], callers: tuple[Caller, ...], answer: Answer) -> None:
    waiters = (Waiter(caller.ticket, told_to(caller, answer)) for caller in callers)
    s.put(waiters=(*s.ctx.waiters, *waiters))


def end(s: Step[Fact], job: Job, answer: Loaded | Problem) -> None:
    """A load has ended, and its callers hear so now."""
    s.settle(job.callers, answer)
    conclude(s, job, answer)


def end_when_empty(s: Step[Fact], job: Job, answer: Problem) -> None:
    """A load has ended, and its callers hear so when the slot is verified empty."""
    wait(s, job.callers, answer)
    s.put(ending=(*s.ctx.ending, *conclusions(s, job, answer)))


def end_at_the_end(s: Step[Fact], job: Job, answer: Problem) -> None:
    """As `end_when_empty`; but now, if the old server is only drained: a load that waits for
    leases has nothing under way that its end would have to wait for.
    """
    (end if s.ctx.effect is None else end_when_empty)(s, job, answer)


def conclude(s: Step[Fact], job: Job, answer: Loaded | Problem) -> None:
    s.emit(*conclusions(s, job, answer))


def conclusions(s: Step[Fact], job: Job, answer: Loaded | Problem) -> tuple[Concluded, ...]:
    """What is said of a load that ends, and of the failed one that it was to make good."""
    own = Concluded(job.generation, job.target, job.accepted_at, spent(s, job), answer)
    if job.failed is None or not isinstance(job.failed.answer, Problem):
        return (own,)
    problem = answer if isinstance(answer, Problem) else None
    return own, replace(job.failed, answer=restored_with(job.failed.answer, problem))


def spent(s: Step[Fact], job: Job) -> Timings:
    """The timings of a load, the phase in which it ends among them."""
    current = s.ctx.job
    if current is None or current.generation != job.generation or job.token is not None:
        return job.timings
    kind = s.ctx.effect.kind if s.ctx.effect else "kill"  # none: it waits for leases
    return job.spent("health" if kind == "probe" else kind, s.fact.at)


def fail(
    s: Step[Fact],
    job: Job,
    problem: Problem,
    tell: Callable[[Step[Fact], Job, Problem], None] = end_when_empty,
) -> None:
    """A load has failed: what follows, and when its callers hear of it. Only the one in flight may
    have replaced anything.
    """
    problem = replace(problem, generation=job.generation)
    if job is s.ctx.job and restores_previous(s.ctx, s.fact):
        enqueue_previous(s, job, problem)
        return
    tell(s, job, problem)
    recovery = s.ctx.recovery
    if job.after is not None and recovery is None:
        s.put(last_error=restored_with(job.after, problem))
    elif job.after is None or recovery is None or s.ctx.is_due:
        s.put(last_error=problem)
    else:
        policy, at = known(s.ctx.policy.restart), s.fact.at
        again = after_failed_restart(
            policy, recovery, at=at, generation=job.generation, problem=problem
        )
        plan_restart(s, again)


def enqueue_previous(s: Step[Fact], failed: Job, problem: Problem) -> None:
    """What ran before comes back; who asked for what failed hears of both when that is settled."""
    target = known(s.ctx.previous)
    enqueue_own(s, target, failed.callers, problem, failed)
    s.put(previous=None)


def enqueue_own(
    s: Step[Fact], target: Target, callers: tuple[Caller, ...], failure: Problem, failed: Job | None
) -> None:
    """It goes before whatever awaits its model."""
    generation = Generation(s.ctx.generation + 1)
    restored = Restored(generation, target.request.model_path, target.model.variant)
    failure = replace(failure, restored=restored)
    callers = tuple(replace(c, failure=c.failure or failure) for c in callers)
    concluded = None
    if failed is not None:
        concluded = Concluded(
            failed.generation, failed.target, failed.accepted_at, spent(s, failed), failure
        )
    job = Job(
        generation,
        target,
        callers,
        s.fact.at,
        s.fact.at,
        newest_before=s.ctx.newest_load,
        after=failure,
        failed=concluded,
    )
    queue = s.ctx.queue
    at = next((i for i, other in enumerate(queue) if other.awaits), len(queue))
    s.put(generation=generation, queue=(*queue[:at], job, *queue[at:]), last_error=failure)
    set_deadline(s, job)


def plan_restart(s: Step[Fact], recovery: Recovery) -> None:
    """Wait for the restart, or cool down; the last error says which."""
    limit = known(s.ctx.policy.restart).limit
    wait_s = recovery.until - s.fact.at
    if recovery.phase == "waiting":
        s.emit(SetTimer(recovery.generation, "restart", wait_s))
        what = f"restart {recovery.failures} of {limit} follows within {wait_s:.3g} s"
    else:
        what = f"that was restart {limit} of {limit}: nothing is started for {wait_s:.3g} s"
    message = f"{recovery.problem.message}; {what}"
    s.put(recovery=recovery, last_error=replace(recovery.problem, message=message))
