"""Single processes, by pidfd where there are such. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def pidfd(pid: int) -> int | None:
    """Return a pidfd of a process; None where there are none, or if it has exited."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            return os.pidfd_open(pid)
    return None


def pidfd_to_send(pid: int) -> int | None:
    """Return what another process is sent to wait for this one, to be closed by `os.close`."""
    return pidfd(pid)


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


def exists(pid: int) -> bool:
    """Return whether there is a process of that number, not reaped yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def resident_bytes(pid: int | None) -> int:
    """Return the resident bytes of a process; 0 if unknown."""
    try:
        with open(f"/proc/{pid}/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def exit_status(pid: int) -> tuple[bool, int | None]:
    """Return whether a child has exited, and its status as `Tree.exit_status` has it."""
    found = None
    if sys.platform == "linux":  # elsewhere `Popen` tells
        try:
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            return True, None
    if found is None:
        return False, None
    return True, found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
