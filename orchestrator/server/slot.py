"""The process slot: a directory with two locks and a record of which server may be running.

`owner.lock` is held by the orchestrator that claimed the slot, for as long as it lives.
`server.lock` is inherited by the server and everything it starts, and closed by us, so the kernel
releases it when the last of them is dead. Processes that have closed it are found by the record,
which is written before the spawn, and by a token in their environment.

A lock file is only believed to be the one on disk after a comparison: the folder may be removed or
replaced at any time. Then what was started is judged by the files that were open, the name
(slot_name.py) still refuses a second owner, and the folder is made anew before anything is started.
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
from typing import Any, Final, cast

from orchestrator.base import launch
from orchestrator.base.log import event_log
from orchestrator.base.private_file import read_file, replace_file
from orchestrator.errors import InvalidRequest, SlotOwned, StateDirError
from orchestrator.machine.facts import SlotEvidence
from orchestrator.server import process_table, slot_name
from orchestrator.server.ladder import CONTINUE
from orchestrator.server.pin import Pin
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot_name import NameTaken
from orchestrator.server.state_dir import check_trusted, make_folder, prepare, unusable
from orchestrator.server.tree import Part, locks

TOKEN_NAME: Final = "LLAMA_ORCHESTRATOR_SLOT_TOKEN"  # noqa: S105 (a name, not a secret)
LONGEST_NAME: Final = 64
_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
_RECORD_VERSION: Final = 1
_VERIFY_EVERY_S: Final = 0.02
_SUCCESSION_S: Final = 10.0
_log = event_log("orchestrator.server")


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
        self.directory: Path = prepare(state_dir) / name
        make_folder(self.directory)
        self.lock_path: Path = self.directory / "server.lock"
        self.record_path: Path = self.directory / "server.json"
        self.owner_path: Path = self.directory / "owner.lock"
        self.door_path: Path = self.directory / "keeper.sock"
        status = self.directory.stat()  # the same path in a container is another slot
        self.token: str = f"{TOKEN_NAME}={self.directory}:{status.st_dev:x}:{status.st_ino:x}"
        self._name_fd: int | None = None
        self._owner_fd: int | None = None
        self._lock_fd: int | None = None  # of the file that our server's lock is on
        self._owner_pid = 0
        self._known: set[ProcessId] = set()
        _slots.add(self)

    def claim(self) -> None:
        """Become the one owner of this slot.

        If the owner is dead but its lock is still held, its keeper is about to end: wait for that,
        at most 10 s.

        Raises:
            SlotOwned: Another live orchestrator has it; the message says which process that is.
            StateDirError: A lock file cannot be opened or written, or others may write the folder.
        """
        check_trusted(self.directory)
        ends = time.monotonic() + _SUCCESSION_S
        while not self._try_claim():
            pid = self._living_owner()
            if pid is not None or time.monotonic() > ends:
                raise _owned(self.name, pid)
            self.continue_keeper()
            time.sleep(_VERIFY_EVERY_S)

    def continue_keeper(self) -> None:
        """Continue the keeper of a dead owner, which may be stopped."""
        keeper = self.recall_keeper()
        if keeper is not None and (pin := Pin.of(keeper)) is not None:
            pin.signal(CONTINUE)
            pin.close()

    def _try_claim(self) -> bool:
        try:
            with launch.no_fork:  # a fork closes what it finds in `_name_fd`
                self._name_fd = slot_name.bind(self.directory)
        except NameTaken:
            return False
        try:
            if (fd := _try_lock(self.owner_path)) is not None:
                self._own(fd)
        finally:
            if self._owner_fd is None:
                self._give_up_name()
        return self._owner_fd is not None

    def _own(self, fd: int) -> None:
        """Make a locked descriptor of `owner.lock` ours, and write our identity into the file."""
        me = process_table.identify(os.getpid())
        try:
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, json.dumps(asdict(me)).encode() if me else b"")
            lock_fd = locks.open_lock(self.lock_path)
        except OSError as error:
            if fd != self._owner_fd:
                os.close(fd)
            raise unusable(self.directory, error) from error
        self._owner_pid = os.getpid()
        self._keep(fd, lock_fd)

    def _keep(self, owner_fd: int | None, lock_fd: int | None) -> None:
        """Close the other descriptors; never LOCK_UN, by which a fork would release our lock."""
        old = {self._owner_fd, self._lock_fd} - {owner_fd, lock_fd, None}
        self._owner_fd, self._lock_fd = owner_fd, lock_fd
        for fd in old:
            os.close(cast("int", fd))

    def _give_up_name(self) -> None:
        fd, self._name_fd = self._name_fd, None
        if fd is not None:
            os.close(fd)

    def _living_owner(self) -> int | None:
        owner = _read_owner(self.owner_path)
        if owner is not None and process_table.is_alive(owner):
            return owner.pid
        pid = slot_name.holder(self.directory)
        found = None if pid is None else process_table.row(pid)
        return None if found is None or found.is_zombie else pid

    def release(self) -> None:
        """Give up the slot; it should be empty by then."""
        if self._owner_fd is not None and self._owner_pid == os.getpid():
            self._keep(None, None)
            self._give_up_name()

    def disown(self) -> None:
        """Close this process's copies of both locks and of the name: a forked worker owns nothing.

        The locks are found by inode, because another thread may have been opening one at the fork.
        """
        ours = (self.owner_path, self.lock_path, self._owner_fd, self._lock_fd)
        for fd in process_table.own_descriptors(one for one in ours if one is not None):
            os.close(fd)
        self._owner_fd = self._lock_fd = None
        self._give_up_name()

    def verify(self) -> SlotEvidence:
        """Ask the operating system whether everything that was started in this slot is dead.

        This needs no folder: the lock is that of the file which the server inherited.
        """
        if not locks.is_free(self.lock_path, cast("int", self._lock_fd)):
            return SlotEvidence(False, "a process still holds the lock of this slot")
        alive = (p.pid for p in self._known if process_table.is_alive(p))
        if (pid := next(alive, None)) is not None:
            return SlotEvidence(False, f"process {pid} is still alive")
        return SlotEvidence(True)

    def take_lock(self) -> tuple[SlotEvidence, int | None]:
        """Ask the operating system whether the slot is empty, and keep it so.

        Returns:
            The evidence and, if the slot is empty, a locked descriptor: pass it to the server and
            close it, or close it. While it is open no other process can find the slot empty.
        """
        evidence = self.verify()
        if not evidence.is_empty:
            return evidence, None
        try:
            self._restore()
            fd = _try_lock(self.lock_path)
        except (SlotOwned, StateDirError) as error:
            return SlotEvidence(False, error.message), None
        if fd is not None and os.path.sameopenfile(fd, cast("int", self._lock_fd)):
            return evidence, fd
        if fd is not None:  # the file has been replaced since `_restore`
            os.close(fd)
        return SlotEvidence(False, "a process still holds the lock of this slot"), None

    def _restore(self) -> None:
        """Make the folder and the lock files anew if they are not those that we have open."""
        if _is_at(self.owner_path, self._owner_fd) and _is_at(self.lock_path, self._lock_fd):
            return
        _log("warning", "slot.restored", directory=str(self.directory))
        make_folder(self.directory, parents=True)
        check_trusted(self.directory)
        fd = (
            self._owner_fd
            if _is_at(self.owner_path, self._owner_fd)
            else _try_lock(self.owner_path)
        )
        if fd is None:
            raise _owned(self.name, self._living_owner())
        self._own(fd)

    def inhabitants(
        self, group: int | None = None, keeper: ProcessId | None = None
    ) -> set[ProcessId]:
        """Look for every running process that belongs to this slot's server.

        These are recorded processes, members of the server's process group or session,
        descendants of all these, and processes with the slot's token in their environment.

        Args:
            group: Process group (and session) of a server that is known to be ours.
            keeper: The keeper of a dead owner, which started nothing else; it is not included.
        """
        pids = process_table.pids()
        found = {p.pid for p in self._known if process_table.is_alive(p)}
        found |= process_table.bearers(self.token, pids)
        if group is not None:
            found |= process_table.members(group, pids)
        roots = found | ({keeper.pid} if keeper and process_table.is_alive(keeper) else set())
        return self.identified(found | process_table.descendants(roots))

    def lock_holders(self) -> set[ProcessId]:
        """Return which processes have the server lock open. Slower than `inhabitants`: for a lock
        that is held although no inhabitant is left.
        """
        lock_fd = cast("int", self._lock_fd)
        return self.identified(process_table.holders(lock_fd, process_table.pids()))

    def identified(self, pids: set[int]) -> set[ProcessId]:
        """Identify these pids, except zombies, this process, its ancestors, and pid 0 and 1.

        Members of our own session are left out too: a server is started in a session of its own
        that its descendants cannot leave for ours, but a forked worker may hold a copy of a lock.
        """
        if not pids:
            return set()
        untouchable = {0, 1, os.getpid()} | process_table.ancestors(os.getpid())
        our_session = process_table.session_of(0)
        return {
            ProcessId(pid, found.start_ticks, process_table.boot_id())
            for pid in pids - untouchable
            if (found := process_table.row(pid)) is not None
            and not found.is_zombie
            and found.session != our_session
        }

    def owner_for_keeper(self) -> Part:
        """Return the owner's lock for the keeper, which takes it after our death; to be closed.

        Raises:
            OSError: The file cannot be opened.
        """
        return locks.for_keeper(self.owner_path)

    def remember(self, server: ProcessId | None, keeper: ProcessId | None = None) -> None:
        """Record the server of this slot, None just before one is started, and its keeper."""
        host = process_table.identify(os.getpid())
        if host is None:
            raise StateDirError.because("this process cannot be found in the process table")
        if server is not None:
            self._known.add(server)
        members = {"version": _RECORD_VERSION, "host": asdict(host)}
        members["server"] = None if server is None else asdict(server)
        members["keeper"] = None if keeper is None else asdict(keeper)
        try:
            replace_file(self.record_path, json.dumps(members))
        except OSError as error:
            raise unusable(self.record_path, error) from error

    def recall(self) -> ProcessId | None:
        """Return the recorded server, which `take_lock` and `inhabitants` know from then on.

        None if the record is missing, corrupt or not ours.
        """
        if (server := self._recorded("server")) is not None:
            self._known.add(server)
        return server

    def recall_keeper(self) -> ProcessId | None:
        """Return the recorded keeper, on the same terms."""
        return self._recorded("keeper")

    def _recorded(self, name: str) -> ProcessId | None:
        try:
            members = json.loads(read_file(self.record_path, 65536))
            _parse_process(members["host"])
            found = _parse_process(members[name])
            is_ours = members["version"] == _RECORD_VERSION and found.pid > 1
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return found if is_ours else None

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
        return _parse_process(json.loads(read_file(path, 4096)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _parse_process(members: Any) -> ProcessId:
    """Parse an identity; raise ValueError or TypeError for anything else."""
    process = ProcessId(**members)
    kinds = (type(process.pid), type(process.start_ticks), type(process.boot_id))
    if kinds != (int, int, str) or not 0 < process.pid < 1 << 31:
        raise ValueError("not a process")
    return process


def _owned(name: str, pid: int | None) -> SlotOwned:
    who, what = f"process {pid}", "stop it"
    if pid is None:
        who = "a process that its dead owner forked"
    elif pid == os.getpid():
        who, what = "this process", "call the orchestrator that has it"
    elif process_table.group_of(pid) == process_table.group_of(os.getpid()) is not None:
        who, what = f"{who}, a worker of this program", "let one worker have it"
    message = f"slot {name!r} is owned by {who}: {what}, or use another slot name"
    return SlotOwned.because(message, field="slot")


def _try_lock(path: Path) -> int | None:
    """Return a descriptor that holds the file's lock; None while another process holds it."""
    try:
        return locks.take(path)
    except OSError as error:
        raise unusable(path, error) from error


def _is_at(path: Path, fd: int | None) -> bool:
    """Return whether this descriptor is of the file that the path names now."""
    try:
        return fd is not None and os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False
