"""When to signal a server, and how long its exit may take.

Pure: all times are monotonic seconds passed in by the caller. Standard library only: the keeper
imports it.
"""

from __future__ import annotations

import math
import signal
from typing import Final, NamedTuple

TERM_AGAIN_S: Final = 0.15
"""When to send the second SIGTERM: llama-server ignores the first for 20 s and more while a stream
is active, and ends 16 ms after the second. An idle one with a keep-alive connection needs 0.1 s."""
LEFT_GRACE_S: Final = 0.3
"""The longest grace of a server whose host is dead."""
_GONE_BASE_S: Final = 5.0
_GONE_PER_GIB_S: Final = 0.25  # four times the 0.064 s per GiB that were measured


KILL: Final[int] = getattr(signal, "SIGKILL", 9)
CONTINUE: Final[int] = getattr(signal, "SIGCONT", 18)
"""SIGCONT, which Windows does not name, nor SIGKILL; its tree knows what to do."""


class SignalAt(NamedTuple):
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
    kill = SignalAt(now + grace_s, KILL)
    if grace_s == 0:
        return (kill,)
    again = now + min(TERM_AGAIN_S, grace_s / 2)
    return SignalAt(now, signal.SIGTERM), SignalAt(again, signal.SIGTERM), kill


def gone_within_s(resident_bytes: int) -> float:
    """Return how many seconds after SIGKILL a process of this size may take to exit."""
    return _GONE_BASE_S + _GONE_PER_GIB_S * resident_bytes / (1 << 30)
