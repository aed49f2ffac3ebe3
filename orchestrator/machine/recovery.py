"""What follows when a healthy server has ended by itself: a restart, a longer wait, or a pause.

Pure. Restarts back off exponentially up to a ceiling; too many failures in a row lead to a
cool-down in which nothing is started; a server that held for a while makes the count start again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.base.record import Record
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.settings.target import Target


@dataclass(frozen=True, slots=True)
class RestartPolicy(Record):
    """How a server that ended by itself is started again (`restart="on-crash"`).

    Attributes:
        backoff_s: The longest wait before the first restart, seconds; each further one doubles
            it. The wait itself is drawn from its upper half, so that hosts do not march in step.
        backoff_max_s: The ceiling of that wait, seconds.
        limit: Restarts in a row; the failure after the last one begins the cool-down.
        cool_down_s: How long nothing is started after that, seconds.
        stable_after_s: A server that was Healthy for this long starts the count again, seconds.
    """

    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    limit: int = 5
    cool_down_s: float = 300.0
    stable_after_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """A server that ended by itself, and what is being done about it.

    Attributes:
        target: What ran.
        generation: The load that failed last; names the timer of the restart.
        failures: How many in a row.
        phase: `waiting` for the restart, `trying` it (also once it holds), or `cooling_down`.
        until: When the wait or the cool-down is over at the latest, monotonic seconds.
        problem: How it failed the last time.
    """

    target: Target
    generation: Generation
    failures: int
    phase: Literal["waiting", "trying", "cooling_down"]
    until: float
    problem: Problem

    def trying(self) -> Recovery:
        return replace(self, phase="trying")


def backoff_s(policy: RestartPolicy, failures: int) -> float:
    """Return the longest wait before the restart that follows the n-th failure in a row."""
    doublings = min(failures - 1, 64)  # beyond that a float is full, and the ceiling far below
    return min(policy.backoff_s * 2.0**doublings, policy.backoff_max_s)


def after_exit(
    policy: RestartPolicy,
    last: Recovery | None,
    *,
    target: Target,
    generation: Generation,
    ran_s: float,
    at: float,
    problem: Problem,
) -> Recovery:
    """Return what is done about a server that was Healthy for `ran_s` seconds and has ended.

    Args:
        policy: What the embedding backend decided.
        last: What was being done before; only the same target counts on.
        target, generation: What ran.
        ran_s: How long it was Healthy.
        at: Monotonic seconds.
        problem: How it ended.
    """
    goes_on = last is not None and ran_s < policy.stable_after_s and last.target == target
    before = last.failures if last is not None and goes_on else 0
    return _decided(policy, target, generation, before + 1, problem, at)


def after_failed_restart(
    policy: RestartPolicy, last: Recovery, *, at: float, generation: Generation, problem: Problem
) -> Recovery:
    """Return what is done about a restart that did not become Healthy."""
    return _decided(policy, last.target, generation, last.failures + 1, problem, at)


def _decided(
    policy: RestartPolicy,
    target: Target,
    generation: Generation,
    failures: int,
    problem: Problem,
    at: float,
) -> Recovery:
    if failures > policy.limit:
        until = at + policy.cool_down_s
        return Recovery(target, generation, failures, "cooling_down", until, problem)
    until = at + backoff_s(policy, failures)
    return Recovery(target, generation, failures, "waiting", until, problem)
