"""A handle of a process, to wait for its exit and to signal it.

A pidfd, on Windows a handle, is opened before the identity of the process is read, so neither can
mean a later process with the same pid.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.base import waitable
from orchestrator.server import process_table, tree
from orchestrator.server.process_table import ProcessId


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
        pin = cls(process, tree.process.pidfd(process.pid))
        if not process_table.is_alive(process):
            pin.close()
            return None
        return pin

    @property
    def has_exited(self) -> bool:
        if (fd := self.fd) is None:  # read once: the warden may close it on its own thread
            return not process_table.is_alive(self.process)
        return waitable.is_ready(fd)

    def signal(self, signum: int) -> None:
        """Send a signal. A process that has exited, or that we may not signal, is not an error."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.fd is not None or process_table.is_alive(self.process):
                tree.process.send_signal(self.process.pid, self.fd, signum)

    def close(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            waitable.close(fd)


def wait_exited(pins: Iterable[Pin], timeout_s: float) -> bool:
    """Wait until all of these processes have exited; return False on timeout."""
    waiting = [pin for pin in pins if not pin.has_exited]
    ends = time.monotonic() + timeout_s
    while waiting and (left := ends - time.monotonic()) > 0:
        if (fd := waiting[0].fd) is not None:
            waitable.is_ready(fd, left)
        else:
            time.sleep(0.005)
        waiting = [pin for pin in waiting if not pin.has_exited]
    return not waiting
