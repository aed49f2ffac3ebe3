"""The process that a keeper works for, and how its end is noticed. Standard library only."""

from __future__ import annotations

import json
import math
from typing import Final, Self

from orchestrator.base import waitable
from orchestrator.server.tree import locks, process
from orchestrator.server.tree.port import Part

_ASK_EVERY_S: Final = 0.25  # where there is no pidfd
_LOCK_EVERY_S: Final = 0.1


class Host:
    """The process that a keeper works for.

    A forked worker may keep its socket open, and a host that replaces itself keeps its pid: it is
    gone when its pidfd says so, or when its socket is closed and its lock can be taken.

    Args:
        fd: Its pidfd, if there is one.
        pid: Its pid; None for a keeper that is a thread of the host and dies with it.
    """

    def __init__(self, pid: int | None, fd: int | None) -> None:
        self.fd = fd
        self._pid = pid
        self.is_silent = False
        self.lock: Part | None = None

    def leave(self) -> None:
        """Close what belongs to it."""
        if self.fd is not None:
            waitable.close(self.fd)
        locks.let_go(self.lock)
        self.fd = self.lock = None

    def succeeded_by(self, pid: int) -> Self:
        """Return the process that has taken its lock; this one is left."""
        lock, self.lock = self.lock, None
        self.leave()
        successor = type(self)(pid, process.pidfd(pid))
        successor.lock = lock
        return successor

    def guard(self, lock: Part) -> None:
        """Know its lock, which is another file once the slot's folder was made anew."""
        locks.let_go(self.lock)
        self.lock = lock

    @property
    def is_this_process(self) -> bool:
        return self._pid is None

    @property
    def ask_every_s(self) -> float:
        """How often to ask `is_gone`, if no descriptor becomes readable."""
        if self.is_silent:
            return _LOCK_EVERY_S
        return _ASK_EVERY_S if self.fd is None and self._pid is not None else math.inf

    def is_gone(self) -> bool:
        if self.is_silent and self.gives_up_lock():
            return True
        if self.fd is not None:
            return waitable.is_ready(self.fd)
        return self._pid is not None and not process.exists(self._pid)

    def take_lock(self) -> bool:
        """Take the owner's lock, to remove what is left; False if there is another owner by now."""
        return locks.seize(self.lock)

    def gives_up_lock(self) -> bool:
        """Return whether no process owns the slot."""
        return locks.is_given_up(self.lock)

    def is_owner(self, pid: int) -> bool:
        """Return whether this process has taken the lock since, as it has written into the file."""
        if self.lock is None or self.gives_up_lock():
            return False
        try:
            return bool(json.loads(locks.read(self.lock))["pid"] == pid)
        except (OSError, ValueError, TypeError, KeyError):
            return False
