"""The six states of the lifecycle. Status, events, diagrams and logs use exactly these words.

Failure is not a state: a load that fails ends in Idle, and its callers get the error.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """The state of a slot and its one server."""

    IDLE = "Idle"
    KILLING = "Killing"
    DOWNLOADING = "Downloading"
    SPAWNING = "Spawning"
    WAITING_HEALTH = "WaitingHealth"
    HEALTHY = "Healthy"


PHASES: Final = {
    State.KILLING: "killing",
    State.DOWNLOADING: "downloading",
    State.SPAWNING: "spawning",
    State.WAITING_HEALTH: "loading",
    State.HEALTHY: "ready",
}
"""The `phase` of a load's progress in each state; Idle has none."""

TIMED: Final = {
    State.KILLING: "kill",
    State.DOWNLOADING: "download",
    State.SPAWNING: "spawn",
    State.WAITING_HEALTH: "health",
}
"""The name of the time spent in each state, in `timings_s` and in metrics."""
