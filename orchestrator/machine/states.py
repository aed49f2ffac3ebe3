"""The six states of the lifecycle, and the named sets the rest of the code reasons in.

The names are user vocabulary: status, events, diagrams and logs show exactly these words.
Failure is not a state: a load that fails ends in Idle and its outcome travels with its caller.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Where the one server of a slot is in its life."""

    IDLE = "Idle"
    KILLING = "Killing"
    DOWNLOADING = "Downloading"
    SPAWNING = "Spawning"
    WAITING_HEALTH = "WaitingHealth"
    HEALTHY = "Healthy"


BUSY: Final = frozenset({State.KILLING, State.DOWNLOADING, State.SPAWNING, State.WAITING_HEALTH})
"""Something is under way: an effect, a drain, or a load."""

SETTLED: Final = frozenset({State.IDLE, State.HEALTHY})
"""The machine rests here when nothing more will happen by itself."""

MAY_OWN_PROCESS: Final = frozenset(
    {State.KILLING, State.SPAWNING, State.WAITING_HEALTH, State.HEALTHY}
)
"""A server process of ours may exist. (In Idle only one that refused to die: `occupied`.)"""

PHASES: Final = {
    State.KILLING: "killing",
    State.DOWNLOADING: "downloading",
    State.SPAWNING: "spawning",
    State.WAITING_HEALTH: "loading",
    State.HEALTHY: "ready",
}
"""The word `progress` uses for a state; Idle has none."""

TIMED: Final = {
    State.KILLING: "kill",
    State.DOWNLOADING: "download",
    State.SPAWNING: "spawn",
    State.WAITING_HEALTH: "health",
}
"""The word for the time spent in a state, in `timings_s` and in metrics."""
