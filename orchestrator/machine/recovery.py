"""What follows when a healthy server ends by itself: a restart, or a cool-down.

Restarts back off exponentially up to a ceiling. Too many failures in a row lead to a cool-down in
which nothing is started. A server that stays Healthy for a while resets the count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.base.record import Record
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.settings.target import Target


@dataclass(frozen=True, slots=True)
class RestartPolicy(Record):
    """How a server that ended by itself is restarted (`restart="on-crash"`).

    Attributes:
        backoff_s: The longest wait before the first restart, seconds; it doubles with each
            further one. The actual wait is random, between half of it and all of it, so that many
            hosts do not restart at once.
        backoff_max_s: The ceiling of that wait, seconds.
        limit: Restarts in a row; the failure after the last one begins the cool-down.
        cool_down_s: How long nothing is started after that, seconds.
        stable_after_s: A server that was Healthy for this long resets the count, seconds.
    """

    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    limit: int = 5
    cool_down_s: float = 300.0
    stable_after_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """The recovery from a server that ended by itself.

    The phase is `trying` from the start of the restart on, also after it has succeeded.
    """

    target: Target
    generation: Generation  # of the load that failed last; the timer of the restart carries it
    failures: int  # in a row
    phase: Literal["waiting", "trying", "cooling_down"]
    until: float  # the latest end of the wait or the cool-down, monotonic seconds
    problem: Problem  # the last failure


def backoff_s(policy: RestartPolicy, failures: int) -> float:
    """Return the longest wait before the restart after the n-th failure in a row."""
    doublings = min(failures - 1, 64)  # 2.0**1024 overflows; the ceiling is reached long before
    return min(policy.backoff_s * 2.0**doublings, policy.backoff_max_s)


def after_failure(
    policy: RestartPolicy,
    last: Recovery | None,
    target: Target,
    generation: Generation,
    problem: Problem,
    *,
    at: float,
    ran_s: float | None,
) -> Recovery:
    """Return what follows a server that ended by itself, or a restart that failed.

    Args:
        last: The recovery so far; its count goes on for the same target only.
        target, generation: What ran or was restarted.
        problem: How it failed.
        at: Monotonic seconds.
        ran_s: How long the server was Healthy; None if it never was.
    """
    was_stable = ran_s is not None and ran_s >= policy.stable_after_s
    goes_on = last is not None and last.target == target and not was_stable
    failures = 1 + (last.failures if last is not None and goes_on else 0)
    if failures > policy.limit:
        until = at + policy.cool_down_s
        return Recovery(target, generation, failures, "cooling_down", until, problem)
    until = at + backoff_s(policy, failures)
    return Recovery(target, generation, failures, "waiting", until, problem)
