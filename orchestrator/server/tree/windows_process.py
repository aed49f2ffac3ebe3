"""Single processes of Windows, by handle. Standard library only."""

from __future__ import annotations

import _winapi
import ctypes
from ctypes import wintypes
from typing import Final

from orchestrator.base.windows import kernel
from orchestrator.server import ladder

ENDED: Final = 0xC000013A
"""Exit status of a process that we end: STATUS_CONTROL_C_EXIT."""
_TERMINATE: Final = 0x0001
_QUERY: Final = 0x1000  # PROCESS_QUERY_LIMITED_INFORMATION
_READ: Final = 0x0010  # PROCESS_VM_READ, which K32GetProcessMemoryInfo once needed
kernel.K32GetProcessMemoryInfo.argtypes = (wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD)


class _Memory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS."""

    _fields_ = (
        ("size", wintypes.DWORD),
        ("page_faults", wintypes.DWORD),
        ("peak_working_set", ctypes.c_size_t),
        ("working_set", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 6),
    )


def pidfd(pid: int) -> int | None:
    """Return a handle to wait for a process and to end it; None if it has exited."""
    try:
        return _winapi.OpenProcess(_winapi.SYNCHRONIZE | _TERMINATE | _QUERY, False, pid)
    except OSError:
        return None


def pidfd_to_send(_pid: int) -> int | None:
    """Return nothing: others open it by its number, which is its own while its keeper has it."""
    return None


def exists(pid: int) -> bool:
    """Return whether a process of that number is running."""
    handle = pidfd(pid)
    if handle is not None:
        _winapi.CloseHandle(handle)
    return handle is not None


def send_signal(_pid: int, fd: int | None, signum: int) -> None:
    """End a process at SIGKILL; other signals are not for single processes. Raises OSError."""
    if signum == ladder.KILL and fd is not None:
        _winapi.TerminateProcess(fd, ENDED)


def reap(_pid: int) -> None:
    """There is nothing to reap: a process is gone with its last handle."""


def pid_namespace() -> str:
    """There is one for all processes."""
    return ""


def resident_bytes(pid: int | None) -> int:
    """Return the working set of a process; 0 if unknown."""
    try:
        handle = _winapi.OpenProcess(_QUERY | _READ, False, pid or 0)
    except OSError:
        return 0
    found = _Memory()
    try:
        is_known = kernel.K32GetProcessMemoryInfo(handle, ctypes.byref(found), ctypes.sizeof(found))
    finally:
        _winapi.CloseHandle(handle)
    return int(found.working_set) if is_known else 0
