"""The gate of a running server: who uses it now. Run-down protection, as kernels have it.

The machine decides when the gate opens and closes; the gate only counts, so that a lease costs no
step. Nothing is decided from a reading of the count: `close` answers for good, as nobody enters
afterwards, and the last one to leave a closed gate says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Final

from orchestrator.base.tokens import Generation
from orchestrator.runtime.answers import LeasedServer

_AN_INSTANT_S: Final = 1e-6  # a timer is due when a sum of floats says so


class Gate:
    """Counts the leases of one server. All methods are thread-safe, and none blocks.

    Args:
        server: What those inside may use; None for a gate that is never open.
        clock: Monotonic seconds.
        drained: Called once, on its thread, by the last one to leave a gate that drains.
    """

    __slots__ = (
        "_admitted",
        "_clock",
        "_drained",
        "_drains",
        "_inside",
        "_is_held",
        "_is_open",
        "_lock",
        "_used_at",
        "places",
        "server",
    )

    def __init__(
        self,
        server: LeasedServer | None,
        clock: Callable[[], float],
        drained: Callable[[Generation], None],
    ) -> None:
        self.server: LeasedServer | None = server
        self._clock = clock
        self._drained = drained
        self._drains = False
        self._inside: set[Hashable] = set()
        self._admitted: set[Hashable] = set()  # those inside who take a place
        self.places: int | None = None  # of those admitted; None: as many as come
        self._is_open = server is not None
        self._is_held = False
        self._used_at = clock()
        # A finalizer may leave while its own thread is in here.
        self._lock = threading.RLock()

    @property
    def inside(self) -> int:
        """How many are inside; for display only."""
        return len(self._inside)

    @property
    def is_open(self) -> bool:
        """Whether one could enter; for display, and to save an attempt."""
        return self._is_open and not self._is_held

    @property
    def used_at(self) -> float | None:
        """When the last one left; None while anybody is inside. For display only."""
        return None if self._inside else self._used_at

    @property
    def has_free_place(self) -> bool:
        """Whether one could be admitted, where places are counted; for display, or as a hint."""
        return self.is_open and self.places is not None and len(self._admitted) < self.places

    def enter(self, who: Hashable) -> LeasedServer | None:
        """Return the server, which is not stopped before `leave`; None if the gate is closed."""
        with self._lock:
            if not self._is_open or self._is_held:
                return None
            self._inside.add(who)
        return self.server

    def admit(self, who: Hashable) -> LeasedServer | None:
        """Enter, if there is a place: of those admitted at most `places` are inside."""
        with self._lock:
            if self.places is not None and len(self._admitted) >= self.places:
                return None
            if (server := self.enter(who)) is not None:
                self._admitted.add(who)
            return server

    def leave(self, who: Hashable) -> None:
        """Leave, if inside: an interrupted caller cannot know whether it is."""
        with self._lock:
            if who not in self._inside:
                return
            self._inside.remove(who)
            self._admitted.discard(who)
            self._used_at = self._clock()
            is_drained = self._drains and not self._inside
        if is_drained and self.server is not None:
            self._drained(self.server.generation)

    def close(self, *, drains: bool) -> bool:
        """Let nobody in any more, and return whether nobody is inside. Owner's thread.

        If it `drains`, the last one to leave says so.
        """
        with self._lock:
            self._is_open, self._drains = False, drains
            return not self._inside

    def close_if_idle(self, ttl_s: float, wanted_at: float) -> float | None:
        """Close the gate if it has not been used for `ttl_s` seconds. Owner's thread.

        Returns:
            The seconds that are missing, 0 if the gate is closed now; None if it was closed before.
        """
        with self._lock:
            if not self._is_open:
                return None
            if self._inside:
                return ttl_s
            left_s = max(self._used_at, wanted_at) + ttl_s - self._clock()
            if left_s > _AN_INSTANT_S:
                return left_s
            self._is_open = False
            return 0.0

    def hold(self, *, if_empty: bool = False) -> bool:
        """Let nobody in any more, for a pool that stops this server; return whether that is so now.

        Args:
            if_empty: Only if nobody is inside.
        """
        with self._lock:
            if not if_empty or not self._inside:
                self._is_held = True
            return self._is_held

    def release(self) -> None:
        """Undo `hold`; a gate that its owner has closed stays closed."""
        with self._lock:
            self._is_held = False

    def reopen(self) -> None:
        """Undo `close_if_idle`, in the same step. Owner's thread."""
        with self._lock:
            self._is_open = True
