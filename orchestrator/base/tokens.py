"""Generations, tickets and cancel tokens, which keep one load apart from another.

A token belongs to one load from its acceptance. It is set at most once, and never cleared, rebound
or shared. Only the owner sets it; effects read it or are called back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum
from typing import NewType

Generation = NewType("Generation", int)
"""Number of an accepted load, counted up from 1, or of a prefetch, counted down from -1. Every
command and completion carries one."""

Ticket = NewType("Ticket", int)
"""Number of a call on the orchestrator, in the order of calls. Each call is answered once."""


class CancelReason(StrEnum):
    """Why a load was ended before its commit."""

    USER = "user"
    SUPERSEDED = "superseded"
    SHUTDOWN = "shutdown"
    DEADLINE = "deadline"


class CancelToken:
    """A one-way switch.

    `set` keeps the first reason and runs every registered callback once, on the owner's thread.
    Callbacks must not block or raise.
    """

    __slots__ = ("_callbacks", "_guard", "_reason", "generation")

    def __init__(self, generation: Generation) -> None:
        self.generation: Generation = generation
        self._reason: CancelReason | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._guard = threading.Lock()

    @property
    def reason(self) -> CancelReason | None:
        """Why the load was cancelled; None if it was not."""
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
        """Run `callback` when the token is set, or at once if it is set already."""
        with self._guard:
            if self._reason is None:
                self._callbacks.append(callback)
                return
        callback()
