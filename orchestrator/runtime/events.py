"""What happened, in order: a bounded log of numbered events that any number of readers follow.

Readers keep a position, not a queue: a slow one loses the oldest events and nobody waits for it.
Numbers never repeat within an orchestrator, so a reader can resume after the last one it saw.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from orchestrator.base.record import Record

KEPT: Final = 1024


@dataclass(frozen=True, slots=True)
class Event(Record):
    """One thing that happened.

    Attributes:
        id: Sequence number, from 1.
        kind: What it is; `transition` so far.
        data: For a transition: `source`, `dest`, `trigger`, `generation`, `at` (Unix seconds).
    """

    id: int
    kind: str
    data: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """What the data holds reads like a field: `event.dest`."""
        try:
            return object.__getattribute__(self, "data")[name]
        except (KeyError, AttributeError):
            raise AttributeError(name) from None

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "kind": self.kind, **self.data}


class EventLog:
    """Written by the owner's thread, read from anywhere."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._changed = threading.Condition()
        self._last = 0
        self._closed = False
        self._wakers: dict[int, Callable[[], None]] = {}

    @property
    def last_id(self) -> int:
        return self._last

    @property
    def is_closed(self) -> bool:
        return self._closed

    def append(self, kind: str, data: dict[str, Any]) -> None:
        with self._changed:
            self._last += 1
            self._events.append(Event(self._last, kind, data))
        self.wake()

    def close(self) -> None:
        """Nothing more will happen; readers end after what is there."""
        with self._changed:
            self._closed = True
        self.wake()

    def since(self, after: int) -> list[Event]:
        """Return what happened after that number, oldest first, as far as it is still kept."""
        with self._changed:
            newest = [*islice(reversed(self._events), max(0, self._last - after))]
        return newest[::-1]

    def wait(self, after: int) -> list[Event]:
        """Block until something happened after that number; [] when the log is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._last > after or self._closed)
        return self.since(after)

    def subscribe(self, waker: Callable[[], None]) -> Callable[[], None]:
        """Call `waker` whenever something happens; returns how to stop that."""

        def stop() -> None:
            with self._changed:
                self._wakers.pop(id(waker), None)

        with self._changed:
            self._wakers[id(waker)] = waker
        return stop

    def wake(self) -> None:
        """Let the readers look, at events or at something else that they wait for."""
        with self._changed:
            self._changed.notify_all()
            wakers = tuple(self._wakers.values())
        for waker in wakers:
            waker()
