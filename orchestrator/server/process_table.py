"""Who is alive: the only reader of the process table and the only import of `psutil`.

A process is identified by pid, start time in clock ticks and boot id, never by name or command
line: wall clock steps move `create_time`, and pids come back. On Linux the identity comes from
`/proc` and is pinned by a pidfd before it is believed; elsewhere psutil answers (untested).
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
from functools import cache
from typing import Any, Final

import psutil

LINUX: Final = sys.platform == "linux"
# Absent from a Python built against old kernel headers, whatever kernel it runs on.
_pidfd_open: Callable[[int], int] | None = getattr(os, "pidfd_open", None)
_TCP_ROW_BYTES: Final = 150  # fixed by the kernel's format


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that can be told from a later one with the same pid."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """One line of the process table."""

    pid: int
    ppid: int
    pgrp: int
    session: int
    start_ticks: int
    is_zombie: bool


@cache
def boot_id() -> str:
    """The kernel's name for this boot; start ticks mean nothing in another one."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return f"boot-{int(psutil.boot_time())}"


def row(pid: int) -> ProcessRow | None:
    """Return the process table's line of `pid`, or None when there is none."""
    if not LINUX:
        return _row_psutil(pid)
    data = _read(f"/proc/{pid}/stat", 1024)
    return None if data is None else _parse_stat(pid, data)


def identify(pid: int) -> ProcessId | None:
    """Return the identity of a living process (a zombie has one too), or None."""
    found = row(pid)
    return None if found is None else ProcessId(pid, found.start_ticks, boot_id())


def is_alive(process: ProcessId) -> bool:
    """Does exactly this process still run? A zombie does not: it holds nothing any more."""
    found = row(process.pid)
    return (
        found is not None
        and not found.is_zombie
        and found.start_ticks == process.start_ticks
        and boot_id() == process.boot_id
    )


class Pin:
    """A handle that cannot come to mean another process.

    Pinned first, verified second: after the check a signal through it reaches this process or
    nobody. Without pidfds (not Linux) the identity is checked again before every signal.
    """

    __slots__ = ("_fd", "process")

    def __init__(self, process: ProcessId, fd: int | None) -> None:
        self.process: ProcessId = process
        self._fd = fd

    @classmethod
    def of(cls, process: ProcessId) -> Pin | None:
        """Pin a process that may be signalled: never pid 0 or 1, never this one. None when it is
        not that process any more.
        """
        if process.pid <= 1 or process.pid == os.getpid():
            return None
        return cls.to_watch(process)

    @classmethod
    def to_watch(cls, process: ProcessId) -> Pin | None:
        """Pin any process, also pid 1: in a container the host often is. None when it is not that
        process any more.
        """
        try:
            fd = _pidfd_open(process.pid) if _pidfd_open is not None else None
        except ProcessLookupError:
            return None
        except OSError:  # forbidden (some container runtimes), or no descriptor left: we poll
            fd = None
        pin = cls(process, fd)
        if not is_alive(process):
            pin.close()
            return None
        return pin

    @property
    def fd(self) -> int | None:
        """Readable once the process has exited; None where the platform has no pidfd."""
        return self._fd

    @property
    def has_exited(self) -> bool:
        if (fd := self._fd) is None:  # read once: the warden may close it meanwhile
            return not is_alive(self.process)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))

    def signal(self, signum: int) -> None:
        """Send a signal; a process that has gone meanwhile is not an error, and one that we may
        not signal is one that does not die.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._fd is not None and _pidfd_open is not None:
                signal.pidfd_send_signal(self._fd, signum)
            elif is_alive(self.process):
                os.kill(self.process.pid, signum)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def wait_exited(pins: Iterable[Pin], timeout_s: float) -> bool:
    """Wait until all of these have exited; False when the time was over first."""
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


def pids() -> list[int]:
    """Return every pid there is."""
    return [int(n) for n in os.listdir("/proc") if n.isdigit()] if LINUX else psutil.pids()


def everyone() -> dict[int, ProcessRow]:
    """Return the whole process table by pid. About 10 µs a process."""
    return {pid: found for pid in pids() if (found := row(pid)) is not None}


def members(group: int, among: Iterable[int]) -> set[int]:
    """Return which of these pids live in a process group or session of that number.

    Two system calls a process; /proc would take ten times as long.
    """
    inside: set[int] = set()
    for pid in among:
        with contextlib.suppress(OSError):
            if group in (os.getpgid(pid), os.getsid(pid)):
                inside.add(pid)
    return {pid for pid in inside if (found := row(pid)) is not None and not found.is_zombie}


def group_of(pid: int) -> int | None:
    """Return the process group of a pid, None when it has gone."""
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def bearers(token: str, among: Iterable[int]) -> set[int]:
    """Return which of these pids carry `NAME=value` in the environment they were started with."""
    wanted = os.fsencode(token) + b"\0"
    if LINUX:
        return {
            pid
            for pid in among
            if (data := _read(f"/proc/{pid}/environ", 1 << 20)) is not None
            and (data.startswith(wanted) or b"\0" + wanted in data)
        }
    name, _, value = token.partition("=")
    return {pid for pid in among if _of_psutil(pid, lambda p: p.environ()).get(name) == value}


def holders(path: str, among: Iterable[int]) -> set[int]:
    """Return which of these pids have the file open (its inode, not its name)."""
    if not LINUX:
        return set()
    try:
        wanted = os.stat(path)
    except OSError:
        return set()
    return {pid for pid in among if _has_open(pid, wanted)}


def own_descriptors(paths: Iterable[str | os.PathLike[str]]) -> list[int]:
    """Return this process's descriptors of these files."""
    wanted = set()
    for path in paths:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            wanted.add((found.st_dev, found.st_ino))
    fds = []
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            found = os.fstat(int(name))
            if (found.st_dev, found.st_ino) in wanted:
                fds.append(int(name))
    return fds


def descendants(roots: Iterable[int]) -> set[int]:
    """Return every process below these, without them. Some 50 µs for a server without children."""
    table = None if LINUX else everyone()
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        new = _children(todo.pop(), table) - seen
        seen |= new
        todo.extend(new)
    return seen


def ancestors(pid: int, table: dict[int, ProcessRow]) -> set[int]:
    """Return the parents of `pid` up to init."""
    found: set[int] = set()
    while (line := table.get(pid)) is not None and line.ppid not in found:
        pid = line.ppid
        found.add(pid)
    return found


def resident_bytes(pid: int) -> int:
    """Resident memory, 0 when unknown."""
    info = _of_psutil(pid, lambda p: p.memory_info())
    return int(getattr(info, "rss", 0))


def bytes_read(pid: int) -> int:
    """Bytes the process has read so far (page cache included), 0 when unknown."""
    info = (
        _of_psutil(pid, lambda p: p.io_counters())
        if hasattr(psutil.Process, "io_counters")
        else None
    )
    return int(getattr(info, "read_chars", 0))


def cpu_seconds(pid: int) -> float:
    """CPU time the process has used so far, 0 when unknown."""
    info = _of_psutil(pid, lambda p: p.cpu_times())
    return float(getattr(info, "user", 0.0) + getattr(info, "system", 0.0))


def listens(pids: Iterable[int], port: int) -> bool | None:
    """Does one of these processes listen on this TCP port? None: we may not look. About 0.1 ms."""
    if not LINUX:
        return port in {found for _, found in listening(pids)}
    may_not_look = False
    for pid in pids:
        wanted = {f"socket:[{inode}]" for inode in _listener_inodes(pid, port)}
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:  # it has gone, or its binary carries capabilities
            may_not_look = may_not_look or row(pid) is not None
            continue
        for name in names if wanted else ():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") in wanted:
                    return True
    return None if may_not_look else False


def _listener_inodes(pid: int, port: int) -> list[str]:
    """Return the inodes of the sockets that listen on this port in the namespace of `pid`.

    Read row by row, because listeners come first and the kernel would go through its whole table
    of connections (8 ms here) to answer a larger read.
    """
    inodes = []
    try:
        fd = os.open(f"/proc/{pid}/net/tcp", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        os.read(fd, _TCP_ROW_BYTES)  # the header
        while fields := os.read(fd, _TCP_ROW_BYTES).split():
            if len(fields) < 10 or fields[3] != b"0A":
                break
            if int(fields[1].rpartition(b":")[2], 16) == port:
                inodes.append(fields[9].decode())
    except OSError:
        return []
    finally:
        os.close(fd)
    return inodes


def listening(pids: Iterable[int]) -> list[tuple[str, int]]:
    """Return the (address, port) pairs these processes listen on, over TCP. Some ms a process."""
    return [
        (connection.laddr.ip, connection.laddr.port)
        for pid in pids
        for connection in _of_psutil(pid, lambda p: p.net_connections("tcp")) or ()
        if connection.status == psutil.CONN_LISTEN
    ]


def _of_psutil(pid: int, ask: Callable[[psutil.Process], Any]) -> Any:
    """Ask psutil about one process; {} when it has gone or may not be asked.

    psutil 7.2 lets raw OSErrors through in places, so they are an answer too.
    """
    try:
        return ask(psutil.Process(pid))
    except (psutil.Error, OSError):
        return {}


def _read(path: str, limit: int) -> bytes | None:
    """Read a /proc file in as few calls as possible; None when it is gone or not ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = b""
        while len(data) < limit and (more := os.read(fd, limit - len(data))):
            data += more
    except OSError:
        return None
    finally:
        os.close(fd)
    return data


def _parse_stat(pid: int, data: bytes) -> ProcessRow | None:
    """Fields of proc_pid_stat(5) after the command, which may hold spaces and brackets."""
    fields = data[data.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        return None
    ppid, pgrp, session = (int(field) for field in fields[1:4])
    is_zombie = fields[0] in (b"Z", b"X") and int(fields[17]) <= 1  # its other threads may live on
    return ProcessRow(pid, ppid, pgrp, session, int(fields[19]), is_zombie)


def _row_psutil(pid: int) -> ProcessRow | None:
    try:
        process = psutil.Process(pid)
        zombie = process.status() == psutil.STATUS_ZOMBIE
        ticks = int(process.create_time() * 100)
        group, session = os.getpgid(pid), os.getsid(pid)
        return ProcessRow(pid, process.ppid(), group, session, ticks, zombie)
    except (psutil.Error, OSError):
        return None


def _children(pid: int, table: dict[int, ProcessRow] | None) -> set[int]:
    if table is not None:
        return {found.pid for found in table.values() if found.ppid == pid}
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return set()
    lists = (_read(f"/proc/{pid}/task/{task}/children", 1 << 16) or b"" for task in tasks)
    return {int(child) for children in lists for child in children.split()}


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for name in names:
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
