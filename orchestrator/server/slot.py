"""The process slot: a directory, two locks and a record that say whose server may be alive.

`owner.lock` belongs to the orchestrator that claimed the slot, for as long as it lives.
`server.lock` is inherited by the server and by everything it starts, and closed by us: the kernel
itself says when the last of them is dead. The record (written before anything can go wrong) and an
environment token find what has closed its descriptors. Names and command lines mean nothing here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import InvalidRequest, SlotOwned, StateDirError, UnsupportedPlatform
from orchestrator.machine.facts import SlotEvidence
from orchestrator.server import process_table
from orchestrator.server.process_table import Pin, ProcessId

try:
    import fcntl
except ImportError:  # Windows: no inherited locks, and so no slot that could be verified
    fcntl = None  # type: ignore[assignment]

TOKEN_NAME: Final = "LLAMA_ORCHESTRATOR_SLOT_TOKEN"  # noqa: S105 (a name, not a secret)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RECORD_VERSION: Final = 1
_VERIFY_EVERY_S: Final = 0.02
_SUCCESSION_S: Final = 10.0
_HANDOVER_S: Final = 0.25


def default_state_dir() -> Path:
    """`$LLAMA_ORCHESTRATOR_STATE_DIR`, else the XDG state directory of this user."""
    if given := os.environ.get("LLAMA_ORCHESTRATOR_STATE_DIR"):
        return Path(given)
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "llama-orchestrator"


def cache_dir(state_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder for what is worth keeping about this machine, whatever the slot."""
    return Path(state_dir or default_state_dir()) / "cache"


@dataclass(frozen=True, slots=True)
class Record:
    """What the slot may hold, as written to disk."""

    host: ProcessId
    server: ProcessId | None = None


class Slot:
    """One named slot of a state directory.

    Raises:
        InvalidRequest: the name is not usable (field `slot`).
        StateDirError: the directory cannot be made, read or written (field `state_dir`).
    """

    def __init__(
        self, name: str = "default", state_dir: str | os.PathLike[str] | None = None
    ) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest.because(
                f"slot is {name!r}: use 1 to 64 of A-Z a-z 0-9 . _ - after a letter or digit",
                field="slot",
            )
        root = default_state_dir() if state_dir is None else _given(state_dir)
        self.name = name
        self.directory: Path = _prepare(root, create_parents=state_dir is None) / name
        _make_private(self.directory)
        self.lock_path: Path = self.directory / "server.lock"
        self.record_path: Path = self.directory / "server.json"
        self.owner_path: Path = self.directory / "owner.lock"
        place = self.directory.stat()  # the same path in a container is another slot
        self.token: str = f"{TOKEN_NAME}={self.directory}:{place.st_dev:x}:{place.st_ino:x}"
        self._owner_fd: int | None = None
        self._owner_pid = 0
        self._known: set[ProcessId] = set()

    # ------------------------------------------------------------------------------ ownership

    def claim(self) -> None:
        """Become the one owner of this slot.

        While the lock is held for an owner that is dead, its guardian is emptying the slot: that
        is waited for, 10 s at most.

        Raises:
            SlotOwned: another live orchestrator has it; the message names its pid.
            UnsupportedPlatform: there are no inherited locks here.
            StateDirError: the lock file cannot be opened or written.
        """
        if fcntl is None:
            raise UnsupportedPlatform.because("this platform has no flock: use Linux or macOS")
        ends = time.monotonic() + _SUCCESSION_S
        while (fd := _try_lock(self.owner_path)) is None:
            owner = _owner_in(self.owner_path)
            lives = owner is not None and process_table.is_alive(owner)
            if lives or time.monotonic() > ends:
                who = f"process {owner.pid}" if owner and lives else "another process"
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
            raise _unwritable(self.owner_path, error) from error
        self._own(fd)

    def succeed(self, owner: ProcessId) -> bool:
        """Take the slot over from a dead owner, in its name. False: somebody has claimed it."""
        ends = time.monotonic() + _HANDOVER_S
        fd = None
        while fd is None and self.belongs_to(owner) and time.monotonic() < ends:
            fd = _try_lock(self.owner_path)
            if fd is None:  # a claim about to be written, or a fork that never ran our hook
                time.sleep(_VERIFY_EVERY_S)
        if fd is not None:
            self._own(fd)
        return self.belongs_to(owner)

    def belongs_to(self, owner: ProcessId) -> bool:
        """Has nobody else claimed the slot since, whoever may hold its lock now?"""
        return _owner_in(self.owner_path) in (owner, None)

    def _own(self, fd: int) -> None:
        self._owner_fd, self._owner_pid = fd, os.getpid()
        _claimed.add(self)

    def release(self) -> None:
        """Give the slot up; what it holds is the caller's business before that."""
        if self._owner_fd is not None and self._owner_pid == os.getpid():
            os.close(self._owner_fd)  # never LOCK_UN: a fork would release our lock
            self._owner_fd = None

    def disown(self) -> None:
        """In a forked worker: it neither owns the slot nor keeps any of its locks held.

        Found by what they refer to, because another thread may have been about to open one.
        """
        for fd in process_table.own_descriptors((self.owner_path, self.lock_path)):
            os.close(fd)
        self._owner_fd = None

    # --------------------------------------------------------------------------------- emptiness

    def take_lock(self) -> tuple[SlotEvidence, int | None]:
        """Ask the operating system whether the slot is empty, and hold the answer.

        Returns:
            The evidence and, when empty, a locked descriptor: pass it to the server and close
            it, or close it. While it is open nobody else can find the slot empty.
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
        """Return every living process that belongs to this slot's server.

        Recorded processes that are still themselves, members of the recorded server's session,
        descendants of these, and whoever carries the slot's token in its environment. Never this
        process, its parents, or pid 0 and 1.

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
        """Return who has the server lock open; slower than `inhabitants`, for when the kernel
        says "held" and nobody is left to blame.
        """
        return self.identified(process_table.holders(str(self.lock_path), process_table.pids()))

    def identified(self, pids: set[int]) -> set[ProcessId]:
        """Identify these, without zombies, this process, its parents, and pid 0 and 1.

        Nor anybody in our own session: a server is started in a session of its own, and nothing
        below it can join ours. A forked worker that holds a copy of a lock is told apart by that.
        """
        if not pids:
            return set()
        table = process_table.everyone()
        untouchable = {0, 1, os.getpid()} | process_table.ancestors(os.getpid(), table)
        our_session = os.getsid(0)
        return {
            ProcessId(pid, table[pid].start_ticks, process_table.boot_id())
            for pid in pids - untouchable
            if pid in table and not table[pid].is_zombie and table[pid].session != our_session
        }

    # -------------------------------------------------------------------------------- the record

    def remember(self, server: ProcessId | None) -> None:
        """Write down what the slot holds (None: something is about to be started)."""
        host = process_table.identify(os.getpid())
        if host is None:
            raise StateDirError.because("this process cannot be found in the process table")
        if server is not None:
            self._known.add(server)
        members = {"version": _RECORD_VERSION, "host": asdict(host)}
        members["server"] = None if server is None else asdict(server)
        _write_atomically(self.record_path, json.dumps(members))

    def recall(self) -> Record | None:
        """Read the record; a corrupt, foreign or absent one is None, and never believed."""
        try:
            with open(self.record_path, encoding="utf-8") as file:
                members = json.loads(file.read(65536))
            host = _process_in(members["host"])
            server = None if members["server"] is None else _process_in(members["server"])
            is_ours = members["version"] == _RECORD_VERSION and (server is None or server.pid > 1)
            return Record(host, server) if is_ours else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def forget(self) -> None:
        """The slot has been verified empty."""
        self._known.clear()
        with contextlib.suppress(OSError):  # a stale record names processes that are not any more
            self.record_path.unlink()

    # -------------------------------------------------------------------------------- recovery

    def reap(
        self, *, heir_of: ProcessId | None = None, term_s: float = 0.3, kill_s: float = 5.0
    ) -> tuple[set[int], SlotEvidence]:
        """End what a dead owner left in this slot. The caller owns the slot.

        Args:
            heir_of: Stop as soon as the slot is not this dead owner's any more.
            term_s: Seconds between SIGTERM and SIGKILL.
            kill_s: Seconds after that before giving up.

        Returns:
            The pids that were signalled, and whether the slot is empty now.
        """
        record = self.recall()
        group = None
        if record is not None and record.server is not None:
            self._known.add(record.server)
            is_itself = process_table.identify(record.server.pid) == record.server
            group = record.server.pid if is_itself else None  # a zombie keeps its group's number
        started = time.monotonic()
        signalled: set[int] = set()
        while True:
            if heir_of is not None and not self.belongs_to(heir_of):
                return signalled, SlotEvidence(False, "another orchestrator has claimed it")
            pins = _pin(self.inhabitants(group))
            elapsed = time.monotonic() - started
            if not pins:
                evidence, fd = self.take_lock()
                if fd is not None:
                    os.close(fd)
                    self.forget()
                    return signalled, evidence
                pins = _pin(self.lock_holders())
            signalled |= {pin.process.pid for pin in pins}
            if elapsed < term_s:
                _end(pins, (signal.SIGTERM, signal.SIGCONT), term_s)
            else:
                _end(pins, (signal.SIGKILL,), kill_s)
            if elapsed > term_s + kill_s:
                pids = sorted(pin.process.pid for pin in pins)
                who = f"processes {pids} will not die" if pids else "its lock is held by somebody"
                return signalled, SlotEvidence(False, who)


_claimed: Final[weakref.WeakSet[Slot]] = weakref.WeakSet()


def _disown_all() -> None:
    for slot in tuple(_claimed):
        slot.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


def _pin(processes: Iterable[ProcessId]) -> list[Pin]:
    return [pin for process in processes if (pin := Pin.of(process)) is not None]


def _end(pins: list[Pin], signals: Iterable[int], timeout_s: float) -> None:
    """Signal these and wait for their exits; a moment when there is nobody we may see."""
    for pin in pins:
        for signum in signals:
            pin.signal(signum)
    if pins:
        process_table.wait_exited(pins, timeout_s)
    else:
        time.sleep(_VERIFY_EVERY_S)
    for pin in pins:
        pin.close()


def _owner_in(path: Path) -> ProcessId | None:
    try:
        return _process_in(json.loads(path.read_bytes()[:4096]))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _process_in(members: Any) -> ProcessId:
    """Read an identity; what cannot be one is a ValueError or a TypeError."""
    process = ProcessId(**members)
    kinds = (type(process.pid), type(process.start_ticks), type(process.boot_id))
    if kinds != (int, int, str) or not 0 < process.pid < 1 << 31:
        raise ValueError("not a process")
    return process


def _given(state_dir: object) -> Path:
    if isinstance(state_dir, str | os.PathLike) and str(state_dir):
        with contextlib.suppress(RuntimeError, TypeError):  # no such user; a path of bytes
            return Path(state_dir).expanduser()
    raise StateDirError.because(
        f"state_dir is {state_dir!r}: give the path of a folder", field="state_dir"
    )


def _prepare(root: Path, *, create_parents: bool) -> Path:
    """Return the state directory as a real, absolute path; make it when it is not there."""
    if not create_parents and not root.parent.is_dir():
        raise StateDirError.because(
            f"state_dir {root} does not exist, nor does its parent: create it first",
            field="state_dir",
        )
    _make_private(root, parents=create_parents)
    return root.resolve()


def _make_private(directory: Path, *, parents: bool = False) -> None:
    try:
        directory.mkdir(mode=0o700, parents=parents, exist_ok=True)
        with open(directory / ".probe", "w"):
            pass
        (directory / ".probe").unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise StateDirError.because(
            f"state_dir {directory} cannot be written ({_why(error)}): make it writable or "
            "choose another with state_dir",
            field="state_dir",
        ) from error


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _unwritable(path: Path, error: OSError) -> StateDirError:
    return StateDirError.because(
        f"{path} cannot be written ({_why(error)}): check state_dir and its disk",
        field="state_dir",
    )


def _try_lock(path: Path) -> int | None:
    """Return a descriptor that holds the file's lock; None while somebody else holds it."""
    fd = _open(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateDirError.because(
            f"{path} cannot be opened ({error.strerror}): check state_dir", field="state_dir"
        ) from error
    if fd > 2:
        return fd
    above = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)  # the host has no standard streams
    os.close(fd)
    return above


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
