"""A server and everything below it, on Windows: a job object. Standard library only.

What a process of a job starts is in the job too, and cannot leave it, so "no active process" proves
that nothing is left. The job ends them all with its last handle, which is the keeper's.
"""

from __future__ import annotations

import _winapi
import ctypes
import msvcrt
import os
import signal
import subprocess
from ctypes import wintypes
from typing import Any, Final

from orchestrator.base.windows import kernel
from orchestrator.server import ladder
from orchestrator.server.tree.port import CannotExecute, Tree
from orchestrator.server.tree.windows_process import ENDED

_SUSPENDED: Final = 0x4
_LIMITS: Final = 9  # JobObjectExtendedLimitInformation
_ACCOUNTING: Final = 1  # JobObjectBasicAccountingInformation
_PIDS: Final = 3  # JobObjectBasicProcessIdList
_KILL_ON_CLOSE: Final = 0x2000
_MOST_PIDS: Final = 1024
kernel.CreateJobObjectW.restype = wintypes.HANDLE
kernel.CreateJobObjectW.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
kernel.AssignProcessToJobObject.argtypes = (wintypes.HANDLE, wintypes.HANDLE)
kernel.TerminateJobObject.argtypes = (wintypes.HANDLE, wintypes.UINT)
kernel.ResumeThread.argtypes = (wintypes.HANDLE,)
kernel.SetInformationJobObject.argtypes = (
    *(wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD),
)
kernel.QueryInformationJobObject.argtypes = (
    *(wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD, ctypes.c_void_p),
)


class _Limits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = (
        ("times", ctypes.c_int64 * 2),
        ("flags", wintypes.DWORD),
        ("working_sets", ctypes.c_size_t * 2),
        ("active_processes", wintypes.DWORD),
        ("affinity", ctypes.c_size_t),
        ("classes", wintypes.DWORD * 2),
        ("io", ctypes.c_uint64 * 6),
        ("memory", ctypes.c_size_t * 4),
    )


class _Accounting(ctypes.Structure):
    """JOBOBJECT_BASIC_ACCOUNTING_INFORMATION."""

    _fields_ = (
        ("times", ctypes.c_int64 * 4),
        ("page_faults", wintypes.DWORD),
        ("total", wintypes.DWORD),
        ("active", wintypes.DWORD),
        ("terminated", wintypes.DWORD),
    )


class _Pids(ctypes.Structure):
    """JOBOBJECT_BASIC_PROCESS_ID_LIST."""

    _fields_ = (
        ("assigned", wintypes.DWORD),
        ("listed", wintypes.DWORD),
        ("pids", ctypes.c_size_t * _MOST_PIDS),
    )


class JobTree:
    """Everything in one job object. Raises OSError: there can be none."""

    contains = True

    def __init__(self) -> None:
        self.leader: int | None = None
        self.exit_fd: int | None = None
        self._status: int | None = None
        self._job = kernel.CreateJobObjectW(None, None)
        limits = _Limits(flags=_KILL_ON_CLOSE)
        if not self._job or not kernel.SetInformationJobObject(
            self._job, _LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
        ):
            raise ctypes.WinError(ctypes.get_last_error())

    def start(self, spec: dict[str, Any], output: int, lock: int) -> int:
        if not self.is_empty():
            raise CannotExecute(0, "the server before it is still there")
        argv, cwd = spec["argv"], spec["cwd"] if os.path.isdir(spec["cwd"]) else None
        with open(os.devnull, "rb") as null:
            handles = [msvcrt.get_osfhandle(fd) for fd in (null.fileno(), output, lock)]
            for handle in handles:
                os.set_handle_inheritable(handle, True)
            startup = subprocess.STARTUPINFO(
                dwFlags=subprocess.STARTF_USESTDHANDLES,
                hStdInput=handles[0],
                hStdOutput=handles[1],
                hStdError=handles[1],
                lpAttributeList={"handle_list": handles},
            )
            flags = _SUSPENDED | subprocess.CREATE_NEW_PROCESS_GROUP
            try:
                process, thread, pid, _ = _winapi.CreateProcess(
                    argv[0],
                    subprocess.list2cmdline(argv),
                    None,
                    None,
                    True,
                    flags,
                    spec["env"],
                    cwd,
                    startup,
                )
            except (OSError, ValueError) as error:
                raise CannotExecute.of(error) from error
        is_inside = kernel.AssignProcessToJobObject(self._job, process)
        if is_inside:
            kernel.ResumeThread(thread)
        _winapi.CloseHandle(thread)
        if not is_inside:
            why = ctypes.WinError(ctypes.get_last_error())
            _winapi.TerminateProcess(process, ENDED)
            _winapi.CloseHandle(process)
            raise CannotExecute.of(why)
        self.leader, self.exit_fd, self._status = pid, process, None
        return pid

    def signal(self, signum: int) -> None:
        """End everything at SIGKILL, and at SIGTERM if no Ctrl-Break can be sent, as under Wine."""
        is_soft = signum == signal.SIGTERM and self.leader is not None
        if is_soft and kernel.GenerateConsoleCtrlEvent(signal.CTRL_BREAK_EVENT, self.leader):
            return
        if is_soft or signum == ladder.KILL:
            kernel.TerminateJobObject(self._job, ENDED)

    def exit_status(self) -> tuple[bool, int | None]:
        if self.exit_fd is None:
            return True, self._status
        if _winapi.WaitForSingleObject(self.exit_fd, 0) != _winapi.WAIT_OBJECT_0:
            return False, None
        self._status = _winapi.GetExitCodeProcess(self.exit_fd)
        return True, self._status

    def reap_orphans(self) -> None:
        """There is nothing to reap."""

    def is_empty(self) -> bool:
        if self.leader is None:
            return True
        found = _Accounting()
        is_known = kernel.QueryInformationJobObject(
            self._job, _ACCOUNTING, ctypes.byref(found), ctypes.sizeof(found), None
        )
        if not is_known or found.active or not self.exit_status()[0]:
            return False
        process, self.exit_fd, self.leader = self.exit_fd, None, None
        if process is not None:
            _winapi.CloseHandle(process)
        return True

    def pids(self) -> list[int]:
        found = _Pids()
        kernel.QueryInformationJobObject(
            self._job, _PIDS, ctypes.byref(found), ctypes.sizeof(found), None
        )
        return [int(pid) for pid in found.pids[: found.listed]]


def of_this_process() -> Tree:
    """Return what a keeper starts its server in."""
    return JobTree()


def in_this_process() -> Tree:
    """Return a tree for a keeper that is a thread."""
    return JobTree()
