"""A bounded log of numbered events that any number of readers follow.

A reader keeps a position and no queue: a slow reader misses the oldest events and delays nobody.
Numbers are unique within an orchestrator, so a reader can resume after the last one it has seen.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Self

from orchestrator.base.record import Record, parsed

MAX_EVENTS: Final = 1024


@dataclass(frozen=True, slots=True)
class Event(Record):
    """One event. The members of `data` are attributes too, such as `event.dest`.

    Attributes:
        id: Sequence number, from 1.
        kind: `transition`; there may be more kinds later.
        data: Of a transition: `source`, `dest`, `trigger`, `generation`, `at` (Unix seconds).
    """

    id: int
    kind: str
    data: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "data")[name]
        except (KeyError, AttributeError):
            raise AttributeError(name) from None

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "kind": self.kind, **self.data}

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        data = {name: value for name, value in members.items() if name not in ("id", "kind")}
        return parsed(cls, {"id": members["id"], "kind": members["kind"], "data": data})


class EventLog:
    """The last events. The owner's thread writes, any thread reads.

    Args:
        last_id: Number of the last event that others have seen.
        most: How many are kept.
    """

    def __init__(self, last_id: int = 0, most: int = MAX_EVENTS) -> None:
        self._events: deque[Event] = deque(maxlen=most)
        self._changed = threading.Condition()
        self._wakers: set[Callable[[], None]] = set()
        self.last_id: int = last_id
        self.is_closed: bool = False

    def append(self, kind: str, data: dict[str, Any]) -> None:
        with self._changed:
            self.last_id += 1
            self._events.append(Event(self.last_id, kind, data))
        self.wake()

    def close(self) -> None:
        """End all readers after the events that are there."""
        with self._changed:
            self.is_closed = True
        self.wake()

    def since(self, after: int) -> list[Event]:
        """Return the events after number `after` that are still there, oldest first."""
        with self._changed:
            newest = [*islice(reversed(self._events), max(0, self.last_id - after))]
        return newest[::-1]

    def wait(self, after: int) -> list[Event]:
        """Block until there is an event after number `after`; [] if the log is closed first."""
        with self._changed:
            self._changed.wait_for(lambda: self.last_id > after or self.is_closed)
        return self.since(after)

    def subscribe(self, waker: Callable[[], None]) -> Callable[[], None]:
        """Call `waker` at every event, until the returned function is called."""

        def stop() -> None:
            with self._changed:
                self._wakers.discard(waker)

        with self._changed:
            self._wakers.add(waker)
        return stop

    def wake(self) -> None:
        """Wake all readers: there is an event, or a load has ended without one."""
        with self._changed:
            self._changed.notify_all()
            wakers = tuple(self._wakers)
        for waker in wakers:
            waker()
