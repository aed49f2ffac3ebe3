"""A server and everything below it, on Linux. Standard library only.

Whatever a server's processes do, the kernel hands orphans to the keeper, so "no child left"
(ECHILD) proves that nothing is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any, Final

from orchestrator.server.tree.port import CannotExecute
from orchestrator.server.tree.posix_process import exit_status

_SET_PDEATHSIG: Final = 1  # prctl(2)
_SET_CHILD_SUBREAPER: Final = 36


class SubreaperTree:
    """Everything below this process, which must be single-threaded and have no other children.

    Its standard input is the server's, and it may have no signal ignored or blocked.

    Raises:
        OSError: The kernel does not offer what it needs.
    """

    contains = True
    exit_fd = None

    def __init__(self) -> None:
        import ctypes

        libc = ctypes.PyDLL(None, use_errno=True)
        self._prctl, self._fork, self._errno = libc.prctl, libc.fork, ctypes.get_errno
        if self._prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
        self.leader: int | None = None
        self._status: int | None = None
        _children(os.getpid())

    def start(self, spec: dict[str, Any], output: int, lock: int) -> int:
        if not self.is_empty():
            raise CannotExecute(0, "the server before it is still there")
        os.set_inheritable(lock, True)
        keeper, argv, env = os.getpid(), spec["argv"], spec["env"]
        with contextlib.suppress(OSError):  # where the host is, or "/"
            os.chdir(spec["cwd"])
        failed, report = os.pipe()
        pid: int = self._fork()  # `os.fork` also makes the child a whole Python again, in 0.5 ms
        if pid < 0:  # the limit of processes
            number = self._errno()
            os.close(failed)
            os.close(report)
            raise CannotExecute(number, os.strerror(number))
        if pid == 0:  # few calls: each touches memory that is copied then
            try:
                os.setsid()
                self._prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() == keeper:
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    os.execve(argv[0], argv, env)  # noqa: S606 (that is the point)
            except BaseException as error:  # noqa: BLE001 (a fork must not return)
                os.write(report, json.dumps(CannotExecute.of(error).args).encode())
            finally:
                os._exit(127)
        os.close(report)
        os.chdir("/")
        with open(failed, "rb") as pipe:
            why = pipe.read()  # ends with the exec
        if why:
            os.waitpid(pid, 0)
            raise CannotExecute(*json.loads(why))
        self.leader, self._status = pid, None
        return pid

    def signal(self, signum: int) -> None:
        group = self.leader
        if group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signum)  # not reaped, so the group is its own
        parents = [os.getpid()]
        while parents:
            parent = parents.pop()
            for pid in _children(parent):
                parents.append(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    if group is None or os.getpgid(pid) != group:
                        self._send(pid, parent, signum)

    @staticmethod
    def _send(pid: int, parent: int, signum: int) -> None:
        """Signal a child of `parent`; a pid that is not our own child's may be another's by now."""
        if parent == os.getpid() or sys.platform != "linux" or not hasattr(os, "pidfd_open"):
            os.kill(pid, signum)
            return
        fd = os.pidfd_open(pid)
        try:
            if pid in _children(parent):
                signal.pidfd_send_signal(fd, signum)
        finally:
            os.close(fd)

    def exit_status(self) -> tuple[bool, int | None]:
        if self.leader is None:
            return True, self._status
        has_exited, self._status = exit_status(self.leader)
        return has_exited, self._status

    def reap_orphans(self) -> None:
        for pid in _children(os.getpid()):
            if pid != self.leader:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def is_empty(self) -> bool:
        self.reap_orphans()
        if self.leader is not None:
            if _children(os.getpid()) != [self.leader] or not self.exit_status()[0]:
                return False
            os.waitpid(self.leader, 0)
            self.leader = None
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            return False
        return True

    def pids(self) -> list[int]:
        found, parents = [], [os.getpid()]
        while parents:
            new = _children(parents.pop())
            found += new
            parents += new
        return found


def _children(pid: int) -> list[int]:
    """Return the children of a process; an incomplete list if some exit meanwhile.

    Raises:
        FileNotFoundError: for this process, if the kernel was built without these lists.
    """
    found: list[int] = []
    is_own = pid == os.getpid()
    try:
        tasks = [str(pid)] if is_own else os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            with open(f"/proc/{pid}/task/{task}/children", "rb", buffering=0) as file:
                found += map(int, file.read().split())
        except OSError:
            if is_own:
                raise
    return found
