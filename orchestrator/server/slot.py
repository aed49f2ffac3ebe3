"""The process slot: a directory with two locks and a record of which server may be running.

`owner.lock` is held by the orchestrator that claimed the slot, for as long as it lives.
`server.lock` is inherited by the server and everything it starts, and closed by us, so the kernel
releases it when the last of them is dead. Processes that have closed it are found by the record,
which is written before the spawn, and by a token in their environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import InvalidRequest, SlotOwned, StateDirError, UnsupportedPlatform
from orchestrator.machine.facts import SlotEvidence
from orchestrator.server import process_table
from orchestrator.server.process_table import ProcessId

try:
    import fcntl
except ImportError:  # Windows: without inherited locks no slot can be verified
    fcntl = None  # type: ignore[assignment]

TOKEN_NAME: Final = "LLAMA_ORCHESTRATOR_SLOT_TOKEN"  # noqa: S105 (a name, not a secret)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RECORD_VERSION: Final = 1
_VERIFY_EVERY_S: Final = 0.02
_SUCCESSION_S: Final = 10.0
_HANDOVER_S: Final = 0.25


def default_state_dir() -> Path:
    """Return `$LLAMA_ORCHESTRATOR_STATE_DIR`, or the XDG state directory of this user."""
    if given := os.environ.get("LLAMA_ORCHESTRATOR_STATE_DIR"):
        return Path(given)
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "llama-orchestrator"


def cache_dir(state_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder for what is cached about this machine, shared by all slots."""
    return Path(state_dir or default_state_dir()) / "cache"


class Slot:
    """One named slot of a state directory.

    Raises:
        InvalidRequest: The name is not valid (field `slot`).
        StateDirError: The directory cannot be created, read or written (field `state_dir`).
    """

    def __init__(
        self, name: str = "default", state_dir: str | os.PathLike[str] | None = None
    ) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest.because(
                f"slot is {name!r}: use 1 to 64 of A-Z a-z 0-9 . _ - after a letter or digit",
                field="slot",
            )
        self.name = name
        self.directory: Path = _prepare(state_dir) / name
        _make_private(self.directory)
        self.lock_path: Path = self.directory / "server.lock"
        self.record_path: Path = self.directory / "server.json"
        self.owner_path: Path = self.directory / "owner.lock"
        status = self.directory.stat()  # the same path in a container is another slot
        self.token: str = f"{TOKEN_NAME}={self.directory}:{status.st_dev:x}:{status.st_ino:x}"
        self._owner_fd: int | None = None
        self._owner_pid = 0
        self._known: set[ProcessId] = set()
        _slots.add(self)

    def claim(self) -> None:
        """Become the one owner of this slot.

        If the owner is dead but its lock is still held, its guardian is emptying the slot: wait
        for that, at most 10 s.

        Raises:
            SlotOwned: Another live orchestrator has it; the message names its pid.
            UnsupportedPlatform: There are no inherited locks here.
            StateDirError: The lock file cannot be opened or written.
        """
        if fcntl is None:
            raise UnsupportedPlatform.because("this platform has no flock: use Linux or macOS")
        ends = time.monotonic() + _SUCCESSION_S
        while (fd := _try_lock(self.owner_path)) is None:
            owner = _read_owner(self.owner_path)
            is_alive = owner is not None and process_table.is_alive(owner)
            if is_alive or time.monotonic() > ends:
                who = f"process {owner.pid}" if owner and is_alive else "another process"
                raise SlotOwned.because(
                    f"slot {self.name!r} is owned by {who}: stop it, or use another slot name",
                    field="slot",
                )
            time.sleep(_VERIFY_EVERY_S)
        me = process_table.identify(os.getpid())
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(asdict(me)).encode() if me else b"", 0)
        except OSError as error:
            os.close(fd)
            raise _unusable(self.owner_path, error) from error
        self._owner_fd, self._owner_pid = fd, os.getpid()

    def succeed(self, owner: ProcessId) -> bool:
        """Take the slot over on behalf of a dead owner; return False if it has been claimed."""
        ends = time.monotonic() + _HANDOVER_S
        fd = None
        while fd is None and self.belongs_to(owner) and time.monotonic() < ends:
            fd = _try_lock(self.owner_path)
            if fd is None:  # a claim about to be written, or a fork that never ran our hook
                time.sleep(_VERIFY_EVERY_S)
        if fd is not None:
            self._owner_fd, self._owner_pid = fd, os.getpid()
        return self.belongs_to(owner)

    def belongs_to(self, owner: ProcessId) -> bool:
        """Return whether no other process has claimed the slot since; its lock does not matter."""
        return _read_owner(self.owner_path) in (owner, None)

    def release(self) -> None:
        """Give up the slot; it should be empty by then."""
        if self._owner_fd is not None and self._owner_pid == os.getpid():
            os.close(self._owner_fd)  # never LOCK_UN: a fork would release our lock
            self._owner_fd = None

    def disown(self) -> None:
        """Close this process's descriptors of both locks: a forked worker owns nothing.

        They are found by inode, because another thread may have been opening one at the fork.
        """
        for fd in process_table.own_descriptors((self.owner_path, self.lock_path)):
            os.close(fd)
        self._owner_fd = None

    def take_lock(self) -> tuple[SlotEvidence, int | None]:
        """Ask the operating system whether the slot is empty, and keep it so.

        Returns:
            The evidence and, if the slot is empty, a locked descriptor: pass it to the server and
            close it, or close it. While it is open no other process can find the slot empty.
        """
        try:
            fd = _try_lock(self.lock_path)
        except StateDirError as error:
            return SlotEvidence(False, error.message), None
        if fd is None:
            return SlotEvidence(False, "a process still holds the lock of this slot"), None
        for process in self._known:
            if process_table.is_alive(process):
                os.close(fd)
                return SlotEvidence(False, f"process {process.pid} is still alive"), None
        return SlotEvidence(True), fd

    def inhabitants(self, group: int | None = None) -> set[ProcessId]:
        """Return every running process that belongs to this slot's server.

        These are recorded processes, members of the server's process group or session,
        descendants of all these, and processes with the slot's token in their environment.

        Args:
            group: Process group (and session) of a server that is known to be ours.
        """
        pids = process_table.pids()
        found = {p.pid for p in self._known if process_table.is_alive(p)}
        found |= process_table.bearers(self.token, pids)
        if group is not None:
            found |= process_table.members(group, pids)
        return self.identified(found | process_table.descendants(found))

    def lock_holders(self) -> set[ProcessId]:
        """Return which processes have the server lock open. Slower than `inhabitants`: for a lock
        that is held although no inhabitant is left.
        """
        return self.identified(process_table.holders(str(self.lock_path), process_table.pids()))

    def identified(self, pids: set[int]) -> set[ProcessId]:
        """Identify these pids, except zombies, this process, its ancestors, and pid 0 and 1.

        Members of our own session are left out too: a server is started in a session of its own
        that its descendants cannot leave for ours, but a forked worker may hold a copy of a lock.
        """
        if not pids:
            return set()
        untouchable = {0, 1, os.getpid()} | process_table.ancestors(os.getpid())
        our_session = os.getsid(0)
        return {
            ProcessId(pid, found.start_ticks, process_table.boot_id())
            for pid in pids - untouchable
            if (found := process_table.row(pid)) is not None
            and not found.is_zombie
            and found.session != our_session
        }

    def remember(self, server: ProcessId | None) -> None:
        """Record the server of this slot; None just before one is started."""
        host = process_table.identify(os.getpid())
        if host is None:
            raise StateDirError.because("this process cannot be found in the process table")
        if server is not None:
            self._known.add(server)
        members = {"version": _RECORD_VERSION, "host": asdict(host)}
        members["server"] = None if server is None else asdict(server)
        temporary = self.record_path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(members), encoding="utf-8")
            os.replace(temporary, self.record_path)
        except OSError as error:
            raise _unusable(self.record_path, error) from error

    def recall(self) -> ProcessId | None:
        """Return the recorded server, which `take_lock` and `inhabitants` know from then on.

        None if the record is missing, corrupt or not ours.
        """
        try:
            members = json.loads(self.record_path.read_bytes()[:65536])
            _parse_process(members["host"])
            if members["version"] != _RECORD_VERSION or members["server"] is None:
                return None
            server = _parse_process(members["server"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        if server.pid <= 1:
            return None
        self._known.add(server)
        return server

    def forget(self) -> None:
        """Remove the record; the slot has been verified empty."""
        self._known.clear()
        with contextlib.suppress(OSError):  # a stale record names processes that are gone
            self.record_path.unlink()


_slots: Final[weakref.WeakSet[Slot]] = weakref.WeakSet()


def _disown_all() -> None:
    for slot in tuple(_slots):
        slot.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


def _read_owner(path: Path) -> ProcessId | None:
    try:
        return _parse_process(json.loads(path.read_bytes()[:4096]))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _parse_process(members: Any) -> ProcessId:
    """Parse an identity; raise ValueError or TypeError for anything else."""
    process = ProcessId(**members)
    kinds = (type(process.pid), type(process.start_ticks), type(process.boot_id))
    if kinds != (int, int, str) or not 0 < process.pid < 1 << 31:
        raise ValueError("not a process")
    return process


def _prepare(state_dir: str | os.PathLike[str] | None) -> Path:
    """Return the state directory as an absolute path without links, created if necessary."""
    root = default_state_dir()
    if state_dir is not None:
        try:
            root = Path(state_dir).expanduser()
            is_usable = state_dir != "" and root.parent.is_dir()
        except (TypeError, RuntimeError):  # not a path; no such user
            is_usable = False
        if not is_usable:
            raise StateDirError.because(
                f"state_dir is {state_dir!r}: give the path of a folder whose parent exists",
                field="state_dir",
            )
    _make_private(root, parents=state_dir is None)
    return root.resolve()


def _make_private(directory: Path, *, parents: bool = False) -> None:
    probe = directory / ".probe"
    try:
        directory.mkdir(mode=0o700, parents=parents, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise _unusable(directory, error) from error


def _unusable(path: Path, error: Exception) -> StateDirError:
    why = getattr(error, "strerror", None) or str(error)
    return StateDirError.because(
        f"{path} cannot be written ({why}): check the disk, or choose another state_dir",
        field="state_dir",
    )


def _try_lock(path: Path) -> int | None:
    """Return a descriptor that holds the file's lock; None while another process holds it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    if fd <= 2:  # the host has no standard streams, and the child's are replaced
        low, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
