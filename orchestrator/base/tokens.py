"""Generations and cancel tokens: what keeps one load's fate apart from another's.

A token belongs to one load, exists from its acceptance, is set at most once, and is never
cleared, rebound or shared. Only the owner sets it; effects read it and are woken by it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum
from typing import NewType

Generation = NewType("Generation", int)
"""Number of an accepted load, from 1, or of a prefetch, from -1 downwards; carried by every command
and completion."""

Ticket = NewType("Ticket", int)
"""Number of one call on the orchestrator; each is answered exactly once."""


class CancelReason(StrEnum):
    """Who ended a load before its commit."""

    USER = "user"
    SUPERSEDED = "superseded"
    SHUTDOWN = "shutdown"
    DEADLINE = "deadline"


class CancelToken:
    """The one-way switch of one load.

    `set` keeps the first reason and wakes every registered callback once. Callbacks run on the
    owner's thread, must not block and must not raise; one added after the fact runs at once.
    """

    __slots__ = ("_callbacks", "_guard", "_reason", "generation")

    def __init__(self, generation: Generation) -> None:
        self.generation: Generation = generation
        self._reason: CancelReason | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._guard = threading.Lock()

    @property
    def reason(self) -> CancelReason | None:
        """Why the load was cancelled; None while it is wanted."""
        return self._reason

    def is_set(self) -> bool:
        return self._reason is not None

    def set(self, reason: CancelReason) -> None:
        with self._guard:
            if self._reason is not None:
                return
            self._reason = reason
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_set(self, callback: Callable[[], None]) -> None:
        """Run `callback` when the token is set, or now if it already is."""
        with self._guard:
            if self._reason is None:
                self._callbacks.append(callback)
                return
        callback()

    def __repr__(self) -> str:
        state = self._reason or "unset"
        return f"CancelToken(generation={self.generation}, {state})"
