"""Pure decisions beside the table: when to signal, how often to probe, what a load would do.

All times are monotonic seconds given by the caller; nothing here reads a clock.
"""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import dataclass
from typing import Final, Literal

from orchestrator.argv import build_argv
from orchestrator.context import Context
from orchestrator.errors import InvalidRequest, Problem
from orchestrator.machine import step
from orchestrator.messages import Accept, Loaded, LoadRequested, Settle
from orchestrator.named import Named
from orchestrator.redaction import redact
from orchestrator.request import MAX_SECONDS, ReloadReason, Target, differences
from orchestrator.states import State
from orchestrator.tokens import Ticket

TERM_AGAIN_S: Final = 0.15
"""A second SIGTERM this soon: llama-server ignores the first while a stream is active, for 20 s
and more, and ends in 16 ms at the second. An idle one with a keep-alive connection needs 0.1 s."""

FIRST_PROBE_S: Final = 0.0015
LONGEST_PROBE_S: Final = 0.25
_PROBE_GROWTH: Final = 1.3
_GONE_BASE_S: Final = 5.0
_GONE_PER_GIB_S: Final = 0.25  # measured: 0.064 s a GiB after SIGKILL; four times that


@dataclass(frozen=True, slots=True)
class SignalAt:
    """One rung of the kill ladder; `at_s` is absolute monotonic time."""

    at_s: float
    signum: int


def kill_plan(grace_s: float, *, now: float) -> tuple[SignalAt, ...]:
    """Return the signals to send to everything in the slot, earliest first.

    Args:
        grace_s: Seconds between the first SIGTERM and SIGKILL; 0 means SIGKILL at once.
        now: Monotonic time in seconds, never wall clock.

    Raises:
        ValueError: `grace_s` is negative or not finite.

    Source: signal(7); a stopped process keeps SIGTERM pending until SIGCONT.
    """
    if not math.isfinite(grace_s) or grace_s < 0:
        raise ValueError(f"grace_s must be 0 or more, not {grace_s}")
    kill = SignalAt(now + grace_s, signal.SIGKILL)
    if grace_s == 0:
        return (kill,)
    again = now + min(TERM_AGAIN_S, grace_s / 2)
    return SignalAt(now, signal.SIGTERM), SignalAt(again, signal.SIGTERM), kill


def gone_within_s(resident_bytes: int) -> float:
    """Return how long after SIGKILL a process of this size may take to be gone."""
    return _GONE_BASE_S + _GONE_PER_GIB_S * resident_bytes / (1 << 30)


def next_probe_s(last_s: float | None) -> float:
    """Return how long to wait before the next readiness probe if nothing happens before.

    Args:
        last_s: What this returned the last time; None for the first probe.
    """
    return FIRST_PROBE_S if last_s is None else min(last_s * _PROBE_GROWTH, LONGEST_PROBE_S)


@dataclass(frozen=True, slots=True)
class Plan(Named):
    """What a load would do now.

    Attributes:
        action: `none` (it runs already, or is on its way), `load`, or `reload`.
        reload_reasons: What keeps the running server from serving it.
        argv: The command line it would start, with nothing secret in it.
    """

    action: Literal["none", "load", "reload"]
    reload_reasons: list[ReloadReason]
    argv: list[str]

    def as_dict(self) -> dict[str, object]:
        reasons = [reason.as_dict() for reason in self.reload_reasons]
        return {"action": self.action, "reload_reasons": reasons, "argv": self.argv}


def plan_load(state: State, ctx: Context, target: Target, *, at: float = 0.0) -> Plan:
    """Return what the table would do with this load: by asking it, without doing it.

    Args:
        state, ctx: What is true now.
        target: What would be asked for.
        at: Monotonic seconds.

    Raises:
        OrchestratorError: the load would be refused at once.
    """
    ticket = Ticket(sys.maxsize)  # asked for after everything else
    stepped = step(state, ctx, LoadRequested(ticket, target, at))
    before = [ctx.running.target] if ctx.running else []
    before += [job.target for job in stepped.ctx.wanted[:-1]]
    for command in stepped.commands:
        match command:
            case Settle(answer=Problem() as problem) if command.ticket == ticket:
                raise problem.error()
            case Settle(answer=Loaded() as loaded) if command.ticket == ticket:
                return Plan("none", [], _shown_argv(loaded.target))
            case Accept(joined=True, generation=joined) if command.ticket == ticket:
                shared = next(job for job in stepped.ctx.wanted if job.generation == joined)
                return Plan("none", [], _shown_argv(shared.target))
    newest = stepped.ctx.wanted[-1]
    committed = {**dict(ctx.committed_args), **{t.source: t.extra_args for t in before}}
    effective = newest.target.inheriting(committed)
    if not before:
        return Plan("load", [], _shown_argv(effective))
    reasons = newest.reload_reasons or differences(before[-1], effective)
    return Plan("reload", list(reasons), _shown_argv(effective))


def _shown_argv(target: Target) -> list[str]:
    shown = "<chat template>" if target.request.chat_template_override else None
    return [redact(token) for token in build_argv(target, template_file=shown)]


def checked_seconds(field: str, value: object, *, zero: bool = True) -> float:
    """Return a setting in seconds, or say what is wrong with it.

    Raises:
        InvalidRequest: not a number, negative, or more than a clock can wait (field as given).
    """
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 <= value <= MAX_SECONDS or (value == 0 and not zero):  # type: ignore[operator]
        least = "0" if zero else "more than 0"
        message = f"{field} is no time to wait: use {least} to {MAX_SECONDS:.0f} seconds"
        raise InvalidRequest.because(message, field=field)
    return float(value)  # type: ignore[arg-type]
