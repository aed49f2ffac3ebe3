"""The process table: the only module that reads it, and the only one that imports `psutil`.

A process is identified by pid, start time in clock ticks and boot id, never by name or command
line: pids are reused, and psutil's `create_time` moves with the wall clock. On Linux the identity
comes from `/proc`, and is read after a pidfd has been opened; elsewhere psutil provides it
(untested).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import psutil

LINUX: Final = sys.platform == "linux"
_File = str | os.PathLike[str] | int  # a path, or a descriptor
_TCP_ROW_BYTES: Final = 150  # fixed by the kernel's format


@dataclass(frozen=True, slots=True)
class ProcessId:
    """The identity of a process; a later process with the same pid has another one."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """One row of the process table."""

    pid: int
    ppid: int
    session: int
    start_ticks: int
    is_zombie: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used since it was started; 0 where that is unknown.

    Attributes:
        paged: Bytes from storage, page-ins too, plus major faults, for file systems without a disk.
        read_bytes: By system calls, also from the page cache.
        loaded_bytes: Of its files, read or mapped.
    """

    start_ticks: int
    cpu_s: float = 0.0
    paged: int = 0
    read_bytes: int = 0
    resident_bytes: int = 0
    loaded_bytes: int = 0


@cache
def boot_id() -> str:
    """Return the kernel's id of this boot; start ticks are only comparable within one.

    Where it is hidden (systemd's `ProcSubset=pid`) all boots are alike: the boot time, which other
    processes would compare, moves with the clock.
    """
    if sys.platform == "win32":
        return "windows"  # there a process keeps the time at which it was started
    if LINUX:
        return (_read("/proc/sys/kernel/random/boot_id") or b"unknown").decode().strip()
    return f"boot-{int(psutil.boot_time())}"


def row(pid: int) -> ProcessRow | None:
    """Return the row of a process, or None if there is no such process."""
    if not LINUX:
        return _row_psutil(pid)
    data = _read(f"/proc/{pid}/stat", 1024)
    return None if data is None else _parse_stat(pid, data)


def identify(pid: int) -> ProcessId | None:
    """Return the identity of a running process or a zombie, or None."""
    found = row(pid)
    return None if found is None else ProcessId(pid, found.start_ticks, boot_id())


def is_alive(process: ProcessId) -> bool:
    """Return whether exactly this process is running. A zombie is not: it holds no resources."""
    found = row(process.pid)
    return (
        found is not None
        and not found.is_zombie
        and found.start_ticks == process.start_ticks
        and boot_id() == process.boot_id
    )


def pids() -> list[int]:
    """Return every pid in use."""
    return [int(n) for n in os.listdir("/proc") if n.isdigit()] if LINUX else psutil.pids()


def members(group: int, among: Iterable[int]) -> set[int]:
    """Return which of these pids are running in the process group or session of that number.

    Two system calls per process; `/proc` would take ten times as long.
    """
    inside: set[int] = set()
    for pid in among:
        with contextlib.suppress(OSError):
            if group in (group_of(pid), session_of(pid)):
                inside.add(pid)
    return {pid for pid in inside if (found := row(pid)) is not None and not found.is_zombie}


def group_of(pid: int) -> int | None:
    """Return the process group of a pid, or None if it has exited."""
    if sys.platform == "win32":
        return None
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def session_of(pid: int) -> int:
    """Return the session of a pid, 0 for this process; -1 where there are none. Raises OSError."""
    if sys.platform == "win32":
        return -1
    return os.getsid(pid)


def bearers(token: str, among: Iterable[int]) -> set[int]:
    """Return which of these pids were started with `NAME=PATH:DEVICE:INODE` in their environment.

    Another device and inode count if the process sees the same folder at that path: it has been
    removed and made anew since.
    """
    name, _, value = token.partition("=")
    if not LINUX:
        return {pid for pid in among if _of_psutil(pid, lambda p: p.environ()).get(name) == value}
    wanted = os.fsencode(token)
    at_path = wanted.rsplit(b":", 2)[0] + b":"
    pattern = re.compile(rb"(?:^|\0)(" + re.escape(at_path) + rb"[0-9a-f]+:[0-9a-f]+)\0")
    found: set[int] = set()
    for pid in among:
        data = _read(f"/proc/{pid}/environ", 1 << 20) or b""
        given = pattern.search(data) if at_path in data else None
        if given is not None and (given[1] == wanted or place(pid) == place(os.getpid())):
            found.add(pid)
    return found


def place(pid: int) -> tuple[int, int, int] | None:
    """Return what decides which files the paths of a process name: mount namespace and root."""
    try:
        namespace, root = os.stat(f"/proc/{pid}/ns/mnt"), os.stat(f"/proc/{pid}/root")
    except OSError:
        return None
    return namespace.st_ino, root.st_dev, root.st_ino


def holders(file: _File, among: Iterable[int]) -> set[int]:
    """Return which of these pids have the file open, by inode."""
    wanted = _inodes([file])
    found: set[int] = set()
    for pid in among if LINUX else ():
        with contextlib.suppress(OSError):
            if _descriptors(f"/proc/{pid}/fd", wanted):
                found.add(pid)
    return found


def own_descriptors(files: Iterable[_File]) -> list[int]:
    """Return this process's descriptors of these files."""
    return _descriptors("/dev/fd", _inodes(files))


def descendants(roots: Iterable[int]) -> set[int]:
    """Return all descendants of these pids, about 50 µs for a server without children."""
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        new = _children(todo.pop()) - seen
        seen |= new
        todo.extend(new)
    return seen


def ancestors(pid: int) -> set[int]:
    """Return the parents of `pid` up to init."""
    found: set[int] = set()
    while (line := row(pid)) is not None and line.ppid not in found:
        pid = line.ppid
        found.add(pid)
    return found


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process, 0 if unknown."""
    return int(getattr(_of_psutil(pid, lambda p: p.memory_info()), "rss", 0))


def usage(pid: int) -> Usage | None:
    """Return what a process has used, in about 0.1 ms; None if it has exited."""
    if sys.platform != "linux":
        return _of_psutil(pid, _usage_psutil) or None
    # `io` is hidden if the binary carries capabilities, `stat` and `statm` are not
    stat, statm, io = (_read(f"/proc/{pid}/{name}") or b"" for name in ("stat", "statm", "io"))
    fields, pages = stat.rpartition(b")")[2].split(), statm.split()
    if len(fields) < 20 or len(pages) < 3:
        return None
    counted = dict(line.split(b": ") for line in io.splitlines())
    stored, read = int(counted.get(b"read_bytes", 0)), int(counted.get(b"rchar", 0))
    resident, mapped = (int(count) * mmap.PAGESIZE for count in pages[1:3])
    return Usage(
        start_ticks=int(fields[19]),
        cpu_s=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        paged=int(fields[9]) + stored,
        read_bytes=read,
        resident_bytes=resident,
        loaded_bytes=max(stored, read + mapped) if counted else resident,
    )


def listening(pids: Iterable[int]) -> tuple[set[tuple[str, int]], bool]:
    """Return the (IPv4 address, TCP port) pairs these processes listen on, in about 0.1 ms each.

    The second value is whether the kernel hides the descriptors of one of them from us.
    """
    if sys.platform == "win32":
        return _listening_windows(set(pids))
    found: set[tuple[str, int]] = set()
    is_hidden = False
    for pid in pids:
        if not LINUX:
            connections = _of_psutil(pid, lambda p: p.net_connections("tcp4"))
            bound = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
            found |= {(address.ip, address.port) for address in bound}
            continue
        sockets = _listeners(pid)
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:  # it has exited, or its binary carries capabilities
            is_hidden = is_hidden or row(pid) is not None
            continue
        for name in names if sockets else ():
            with contextlib.suppress(OSError, KeyError):
                found.add(sockets[os.readlink(f"/proc/{pid}/fd/{name}")])
    return found, is_hidden


def _listening_windows(pids: set[int]) -> tuple[set[tuple[str, int]], bool]:
    """Read the table of all connections once, which is how Windows tells those of one process.

    Wine does not know whose they are.
    """
    rows: list[Any] = psutil.net_connections("tcp4")
    listening = [row for row in rows if row.status == psutil.CONN_LISTEN]
    found = {(row.laddr.ip, row.laddr.port) for row in listening if row.pid in pids}
    return found, any(not row.pid for row in listening)


def _listeners(pid: int) -> dict[str, tuple[str, int]]:
    """Return where the sockets that listen in the network namespace of `pid` are bound.

    Read row by row: listeners come first, and for a larger read the kernel would walk its whole
    table of connections (8 ms here).
    """
    found = {}
    with (
        contextlib.suppress(OSError),
        open(f"/proc/{pid}/net/tcp", "rb", buffering=0) as table,
    ):
        table.read(_TCP_ROW_BYTES)  # the header
        while fields := (table.read(_TCP_ROW_BYTES) or b"").decode().split():
            if len(fields) < 10 or fields[3] != "0A":
                break
            address, _, port = fields[1].partition(":")
            ip = socket.inet_ntoa(int(address, 16).to_bytes(4, sys.byteorder))
            found[f"socket:[{fields[9]}]"] = ip, int(port, 16)
    return found


def _of_psutil(pid: int, ask: Callable[[psutil.Process], Any]) -> Any:
    """Ask psutil about one process; {} if it has exited or the answer is not available.

    psutil 7.2 lets plain OSErrors through in places.
    """
    try:
        return ask(psutil.Process(pid))
    except (psutil.Error, OSError, AttributeError):
        return {}


def _read(path: str, limit: int = -1) -> bytes | None:
    """Read a file of `/proc`, unbuffered; None if its process has exited or is not ours."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(limit)
    except OSError:
        return None


def _parse_stat(pid: int, data: bytes) -> ProcessRow | None:
    """Parse proc_pid_stat(5) after the command, which may contain spaces and brackets."""
    fields = data[data.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        return None
    is_zombie = fields[0] in (b"Z", b"X") and int(fields[17]) <= 1  # other threads may be running
    return ProcessRow(pid, int(fields[1]), int(fields[3]), int(fields[19]), is_zombie)


def _row_psutil(pid: int) -> ProcessRow | None:
    try:
        process = psutil.Process(pid)
        zombie = process.status() == psutil.STATUS_ZOMBIE
        ticks = int(process.create_time() * 100)
        return ProcessRow(pid, process.ppid(), session_of(pid), ticks, zombie)
    except (psutil.Error, OSError):
        return None


def _usage_psutil(process: psutil.Process) -> Usage:
    times, memory = process.cpu_times(), process.memory_info()
    return Usage(
        start_ticks=int(process.create_time() * 100),
        cpu_s=times.user + times.system,
        paged=getattr(memory, "pageins", 0),  # on macOS
        read_bytes=process.io_counters().read_bytes if hasattr(process, "io_counters") else 0,
        resident_bytes=memory.rss,
        loaded_bytes=memory.rss,
    )


def _children(pid: int) -> set[int]:
    if not LINUX:
        return {child.pid for child in _of_psutil(pid, lambda p: p.children())}
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return set()
    lists = (_read(f"/proc/{pid}/task/{task}/children") or b"" for task in tasks)
    return {int(child) for children in lists for child in children.split()}


def _inodes(files: Iterable[_File]) -> set[tuple[int, int]]:
    found = set()
    for file in files:
        with contextlib.suppress(OSError):
            status = os.stat(file)
            found.add((status.st_dev, status.st_ino))
    return found


def _descriptors(folder: str, wanted: set[tuple[int, int]]) -> list[int]:
    """Return the descriptors in `/proc/PID/fd` or `/dev/fd` that refer to one of these inodes."""
    return [int(fd) for fd in os.listdir(folder) if wanted & _inodes([f"{folder}/{fd}"])]
