"""The transitions of an orchestrator as they come, for a person to watch and a program to keep.

A thread follows the event log. `caught_up` makes the two orders one: what is printed between two
steps of a demo appears after the first has been told in full.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.machine.states import State
from orchestrator.runtime.events import Event
from orchestrator.runtime.orchestrator import Orchestrator


@dataclass(frozen=True, slots=True)
class Moment:
    """One transition; `ms` since the timeline began."""

    id: int
    ms: float
    source: State
    state: State
    trigger: str
    generation: int
    pid: int | None


class Timeline:
    """Follows the events of a started orchestrator until it is closed.

    Args:
        began_at: Unix time of 0 ms.
        tell: Called with each moment, on the follower's thread.
    """

    def __init__(
        self, orch: Orchestrator, *, began_at: float, tell: Callable[[Moment], None]
    ) -> None:
        self.moments: list[Moment] = []
        self._orch = orch
        self._began_at = began_at
        self._tell = tell
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, name="demo-timeline", daemon=True)
        self._thread.start()

    @property
    def last_id(self) -> int:
        return self.moments[-1].id if self.moments else 0

    def caught_up(self) -> int:
        """Wait until everything that has happened was told; return the number of the last event."""
        newest = self._orch.last_event_id
        with self._changed:
            self._changed.wait_for(lambda: self.last_id >= newest)
        return newest

    def reached(self, state: State, *, after: int, timeout_s: float) -> bool:
        """Wait until a state is entered after an event; False when the time was over first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: any(m.id > after and m.state is state for m in self.moments), timeout_s
            )

    def ended(self) -> None:
        """Wait for the last event of a closed orchestrator."""
        self._thread.join()

    def _follow(self) -> None:
        for event in self._orch.events(after=0):
            if event.kind != "transition":
                continue
            moment = self._moment(event)
            self._tell(moment)
            with self._changed:
                self.moments.append(moment)
                self._changed.notify_all()

    def _moment(self, event: Event) -> Moment:
        data = event.data
        return Moment(
            event.id,
            round(max(0.0, data["at"] - self._began_at) * 1000, 3),
            State(data["source"]),
            State(data["dest"]),
            data["trigger"],
            data["generation"],
            data["pid"],
        )
