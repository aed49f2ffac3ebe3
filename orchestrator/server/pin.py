"""A handle of a process, to wait for its exit and to signal it.

A pidfd is opened before the identity of the process is read, so neither can mean a later process
with the same pid.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from orchestrator.server import process_table
from orchestrator.server.process_table import ProcessId

# Absent from a Python built against old kernel headers, whatever kernel it runs on.
_pidfd_open: Callable[[int], int] | None = getattr(os, "pidfd_open", None)


@dataclass(slots=True, eq=False)
class Pin:
    """A handle that cannot come to mean another process.

    The pidfd is opened first and the identity is checked second, so a signal through it reaches
    this process or none. Without pidfds the identity is checked again before every signal.

    Attributes:
        fd: A pidfd, readable once the process has exited; None where there are no pidfds.
    """

    process: ProcessId
    fd: int | None

    @classmethod
    def of(cls, process: ProcessId) -> Pin | None:
        """Pin a process in order to signal it; None if it has exited, or must not be signalled.

        Pid 0, pid 1 and the calling process must not be.
        """
        if process.pid <= 1 or process.pid == os.getpid():
            return None
        try:
            fd = cls.open(process.pid)
        except ProcessLookupError:
            return None
        pin = cls(process, fd)
        if not process_table.is_alive(process):
            pin.close()
            return None
        return pin

    @staticmethod
    def open(pid: int) -> int | None:
        """Return a pidfd; None where there are none. Raises ProcessLookupError."""
        try:
            return _pidfd_open(pid) if _pidfd_open is not None else None
        except ProcessLookupError:
            raise
        except OSError:  # forbidden by some container runtimes, or no descriptor left: we poll
            return None

    @property
    def has_exited(self) -> bool:
        if (fd := self.fd) is None:  # read once: the warden may close it on its own thread
            return not process_table.is_alive(self.process)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))

    def signal(self, signum: int) -> None:
        """Send a signal. A process that has exited, or that we may not signal, is not an error."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if sys.platform == "linux" and self.fd is not None:
                signal.pidfd_send_signal(self.fd, signum)
            elif process_table.is_alive(self.process):
                os.kill(self.process.pid, signum)

    def close(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def wait_exited(pins: Iterable[Pin], timeout_s: float) -> bool:
    """Wait until all of these processes have exited; return False on timeout."""
    waiting = [pin for pin in pins if not pin.has_exited]
    ends = time.monotonic() + timeout_s
    while waiting and (left := ends - time.monotonic()) > 0:
        if (fd := waiting[0].fd) is not None:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(left * 1000)
        else:
            time.sleep(0.005)
        waiting = [pin for pin in waiting if not pin.has_exited]
    return not waiting
