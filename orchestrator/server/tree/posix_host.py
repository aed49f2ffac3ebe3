"""The process that a keeper works for, and how its end is noticed. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
import sys
from typing import Final, Self

from orchestrator.base import waitable
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
        self.lock: int | None = None

    def leave(self) -> None:
        """Close what belongs to it."""
        for fd in (self.fd, self.lock):
            if fd is not None:
                os.close(fd)
        self.fd = self.lock = None

    def succeeded_by(self, pid: int) -> Self:
        """Return the process that has taken its lock; this one is left."""
        lock, self.lock = self.lock, None
        self.leave()
        successor = type(self)(pid, pidfd(pid))
        successor.lock = lock
        return successor

    def guard(self, lock: Part) -> None:
        """Know its lock, which is another file once the slot's folder was made anew."""
        if self.lock is not None:
            os.close(self.lock)
        self.lock = lock if isinstance(lock, int) else None

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
        if self._pid is not None:
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return False

    def take_lock(self) -> bool:
        """Take the owner's lock, to remove what is left; False if there is another owner by now."""
        return self._flock(fcntl.LOCK_EX)

    def gives_up_lock(self) -> bool:
        """Return whether no process owns the slot."""
        return self._flock(fcntl.LOCK_EX) and self._flock(fcntl.LOCK_UN)

    def _flock(self, how: int) -> bool:
        try:
            fcntl.flock(-1 if self.lock is None else self.lock, how | fcntl.LOCK_NB)
        except (OSError, ValueError):
            return False
        return True

    def is_owner(self, pid: int) -> bool:
        """Return whether this process has taken the lock since, as it has written into the file."""
        if self.lock is None or self.gives_up_lock():
            return False
        try:
            return bool(json.loads(os.pread(self.lock, 4096, 0))["pid"] == pid)
        except (OSError, ValueError, TypeError, KeyError):
            return False


def pidfd(pid: int) -> int | None:
    """Return a pidfd of a process; None where there are none, or if it has exited."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            return os.pidfd_open(pid)
    return None


def send_signal(pid: int, fd: int | None, signum: int) -> None:
    """Signal a process, through its pidfd if there is one. Raises OSError."""
    if sys.platform == "linux" and fd is not None:
        signal.pidfd_send_signal(fd, signum)
    else:
        os.kill(pid, signum)


def reap(pid: int) -> None:
    """Reap a process that has ended if it is a child of this one, which it is if we are pid 1."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def pid_namespace() -> str:
    """Return what tells the numbers of processes of one container from those of another."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
