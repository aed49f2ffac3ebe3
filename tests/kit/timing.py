"""CPU time, for tests that a cost is linear or small whatever else the machine does."""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest_s(call: Callable[[], object], times: int) -> float:
    """Return the least CPU time of this thread that one of several calls took, in seconds."""
    took = []
    for _ in range(times):
        started = time.thread_time()
        call()
        took.append(time.thread_time() - started)
    return min(took)
