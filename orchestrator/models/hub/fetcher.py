"""Download files of a Hub repo into the cache: a program, so that killing it stops everything.

It is started by its path and imports nothing of this package. The parent sends what to list and
what to fetch, and receives reports, as lines of JSON. A file appears under its name only when it is
whole: its bytes go to a partial file, are hashed as they are written, and a later run continues it.
The cache has the layout that huggingface_hub documents; protocol, authentication and errors are
that library's. Only `blobs/*.orchestrator.*` are files of our own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

if sys.platform == "win32":
    import _winapi
    import msvcrt
else:
    import fcntl

OURS = ".orchestrator."
PARTIAL = f"{OURS}incomplete"
CORRUPT = f"{OURS}corrupt"
CHUNK_BYTES = 1 << 20
REPORT_EVERY_S = 0.05
SWEEP_AFTER_S = 7 * 24 * 3600.0
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}  # by a file system that has no links
PR_SET_PDEATHSIG = 1  # of the thread that started this; it waits for the end of this
_EXCLUSIVE_AT_ONCE = 0x3
_LOCK_VIOLATION = 33
_OPEN_ALWAYS = 4
UNLOCKABLE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}

if TYPE_CHECKING:
    from orchestrator.models.hub.fetcher_hub import Failed, Hub, starts_at, unreachable
else:
    client = ModuleType("fetcher_hub")
    SourceFileLoader(client.__name__, f"{__file__[:-3]}_hub.py").exec_module(client)
    Failed, Hub = client.Failed, client.Hub
    starts_at, unreachable = client.starts_at, client.unreachable

_stdout = sys.stdout
_reporting = threading.RLock()


def report(**message: Any) -> None:
    with _reporting:
        _stdout.write(json.dumps(message) + "\n")
        _stdout.flush()


def main() -> int:
    global _stdout  # noqa: PLW0603 (set once; what libraries print goes to stderr)
    parent = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also while this is stopped
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    _stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        setup = json.loads(sys.stdin.readline())
        sys.path[:] = setup["path"]  # where the parent imports from
        hub = None if setup["offline"] else Hub(setup, lambda reason: report(waiting=reason))
        if hub is not None and setup["lists"]:
            report(listing=hub.listing())
        while line := sys.stdin.readline():
            job = json.loads(line)
            if hub is not None and "unknown" in job:
                report(files={name: hub.size_and_etag(job, name) for name in job["unknown"]})
                continue
            fetch = Fetch(job, hub)
            fetch.check() if job.get("only_check") else fetch.run()
            report(finished=True)
    except Failed as failed:
        report(error=failed.members)
    except ImportError as error:
        message = f"{error}: install huggingface_hub for {sys.executable}"
        report(error=Failed("hub_error", message).members)
    return 0


def _exit_with_parent(parent: int) -> None:
    """Poll the parent's pid: a fork of the parent would keep a pipe open."""
    if sys.platform == "win32":  # a process keeps the number of its parent there
        with contextlib.suppress(OSError):  # it has ended already
            handle = _winapi.OpenProcess(_winapi.SYNCHRONIZE, False, parent)
            _winapi.WaitForSingleObject(handle, _winapi.INFINITE)
    else:
        while os.getppid() == parent:
            time.sleep(0.1)
    os._exit(1)


def lock(file: BinaryIO) -> None:
    """Lock a file until it is closed. Raises BlockingIOError, or OSError: there are no locks."""
    if sys.platform == "win32":
        # OVERLAPPED: the last byte there can be, because nobody may read or write what is locked
        place = (ctypes.c_uint64 * 4)(0, 0, (1 << 63) - 1, 0)
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(file.fileno()))
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        if not kernel.LockFileEx(handle, _EXCLUSIVE_AT_ONCE, 0, 1, 0, place):
            error = ctypes.get_last_error()
            raise BlockingIOError if error == _LOCK_VIOLATION else ctypes.WinError(error)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def repeating(interval_s: float, call: Callable[[], object]) -> Iterator[None]:
    """Call a function every so often, on a thread, until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(interval_s):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class File:
    pointer: Path
    blob: Path
    name: str
    size: int
    etag: str  # SHA-256 or git's blob hash; its own name in a cache without links
    verify: bool  # hash it even if it is there

    @property
    def partial(self) -> Path:
        return self.blob.with_name(self.etag + PARTIAL)

    @property
    def bytes_on_disk(self) -> int:
        if self.is_at(self.pointer) or self.is_at(self.blob):
            return self.size
        return min(self.partial.stat().st_size, self.size) if self.partial.exists() else 0

    def is_at(self, path: Path) -> bool:
        return path.exists() and path.stat().st_size == self.size


def opener(path: str, flags: int) -> int:
    """Open a file that may be renamed and removed meanwhile."""
    if sys.platform == "win32":
        access, everything = _winapi.GENERIC_READ | _winapi.GENERIC_WRITE, 0x7
        handle = _winapi.CreateFile(path, access, everything, 0, _OPEN_ALWAYS, 0, 0)
        return msvcrt.open_osfhandle(handle, flags)
    return os.open(path, flags, 0o666)


def _bytes_written(path: Path) -> int:
    if sys.platform == "win32":
        return path.stat().st_size
    return path.stat().st_blocks * 512


class Fetch:
    """Completes files; `job` is {repo, root, commit, revision, files: [members of `File`]}."""

    def __init__(self, job: dict[str, Any], hub: Hub | None) -> None:
        self._hub = hub
        self._repo, self._commit = job["repo"], job["commit"]
        self._revision, self._root = job["revision"], Path(job["root"])
        self._blobs, top = self._root / "blobs", self._root / "snapshots" / self._commit
        self._files = [File(top / f["name"], self._blobs / f["etag"], **f) for f in job["files"]]
        self._done = {file.name: 0 for file in self._files}
        self._seen = 0
        self._progress: dict[str, Any] = {}
        self._reported = self._progress

    def check(self) -> None:
        """Check access and disk space for missing files; without any, record the revision."""
        missing = [file for file in self._files if not file.is_at(file.pointer)]
        if self._hub is None or not missing:
            self._record_revision()
            return
        if not os.access(folder := self._folder(), os.W_OK | os.X_OK):
            what = f"is not whole in the model cache, and {folder} cannot be written"
            message = f"{self._repo} {what}: make it writable, or set HF_HUB_CACHE"
            raise Failed("cache_dir", message)
        if absent := [file for file in missing if file.bytes_on_disk < file.size]:
            self._check_disk()
            self._hub.check_access(self._repo, self._commit, absent[0].name)

    def run(self) -> None:
        try:
            with repeating(REPORT_EVERY_S, self._report):
                if not all(file.is_at(file.pointer) for file in self._files):
                    self._make_folders()
                    self._sweep()
                for file in self._files:
                    self._count(file, file.bytes_on_disk)
                for file in self._files:
                    self._complete(file)
                    self._count(file, file.size)
                self._record_revision()
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                self._check_disk(is_full=True)
            what = f"{error.strerror}: {error.filename or self._root}"
            message = f"the model cache cannot be used ({what}): check it, or set HF_HUB_CACHE"
            raise Failed("cache_dir", message) from error

    def _folder(self) -> Path:
        return next(f for f in (self._blobs, *self._blobs.parents) if f.exists())

    def _make_folders(self) -> None:
        for folder in (self._blobs, self._root / "snapshots"):  # one alone is damage
            folder.mkdir(parents=True, exist_ok=True)

    def _record_revision(self) -> None:
        if self._revision is None or self._hub is None:
            return
        ref = self._root / "refs" / self._revision
        with contextlib.suppress(OSError):  # a read-only cache can be used, too
            if not ref.exists() or ref.read_text().strip() != self._commit:
                self._create(ref, lambda path: path.write_text(self._commit))

    def _complete(self, file: File) -> None:
        if not (self._is_whole(file.pointer, file) or self._is_whole(file.blob, file)):
            if self._hub is None:
                message = f"{file.name} in the cache is damaged: load it again while online"
                raise Failed("hub_corrupt", message)
            self._check_disk()
            if file.size > self._hub.max_file_bytes:
                self._fetch_whole(self._hub, file)
            else:
                self._download(self._hub, file)
        self._link(file)
        report(verified=file.name)

    def _link(self, file: File, *, is_new: bool = False) -> None:
        """Link a file to its blob; without links it is the new blob, or a copy of an old one, which
        other commits may have.
        """

        def symlink(path: Path) -> None:
            if os.environ.get("HF_HUB_DISABLE_SYMLINKS", "").upper() in {"1", "ON", "YES", "TRUE"}:
                raise OSError(errno.ENOSYS, "links are not wanted")
            path.symlink_to(os.path.relpath(file.blob, file.pointer.parent))

        if file.pointer.exists():
            return
        try:
            self._create(file.pointer, symlink)
        except OSError as error:
            if sys.platform != "win32" and error.errno not in UNSUPPORTED:
                raise
            if is_new:
                os.replace(file.blob, file.pointer)
            else:
                self._create(file.pointer, lambda path: shutil.copyfile(file.blob, path))

    def _is_whole(self, path: Path, file: File) -> bool:
        """Is the file what the Hub announced? One that is not is set aside."""
        if not path.exists():
            return False
        is_good = file.is_at(path)
        if is_good and file.verify:
            check = Check(file)
            with open(path, "rb") as data:
                self._hash_present(check, data, file.size)
            is_good = check.is_good
        if not is_good:
            self._make_folders()
            real = path.resolve()
            if real.is_relative_to(self._root.resolve()):  # a file elsewhere is not ours to move
                os.replace(real, file.blob.with_name(file.etag + CORRUPT))
            for link in (path, file.blob):
                if link.is_symlink():
                    link.unlink()
        return is_good

    def _download(self, hub: Hub, file: File) -> None:
        self._make_folders()
        damaged, path = 0, file.partial
        while damaged < 2:
            with open(path, "a+b", buffering=0, opener=opener) as partial:
                if path == file.partial and not self._lock(file, partial):
                    path = self._own_partial(file)
                    continue
                is_current = _is_same(partial, path)  # not renamed or swept meanwhile
                # one that became the blob was hashed by the process that had the lock
                is_theirs = _is_same(partial, file.blob) or _is_same(partial, file.pointer)
                if is_theirs or self._is_whole(file.blob, file):
                    if is_current:
                        path.unlink()
                    return
                if not is_current:
                    continue
                if self._receive(hub, file, partial).is_good:
                    os.fsync(partial.fileno())
                    os.replace(path, file.blob)
                    file.blob.with_name(file.etag + CORRUPT).unlink(missing_ok=True)
                    self._link(file, is_new=True)
                    return
                partial.truncate(0)
            damaged += 1
            report(waiting=f"{file.name} arrived with a wrong hash (download {damaged} of 2)")
        message = f"{file.name} had a wrong hash after two downloads: try again later"
        raise Failed("hub_corrupt", message)

    def _lock(self, file: File, partial: BinaryIO) -> bool:
        """Wait for the lock of a partial file; False where the file system has no locks."""
        while True:
            try:
                lock(partial)
            except BlockingIOError:
                size = os.fstat(partial.fileno()).st_size
                self._count_growth(file, size, "another process is downloading it")
                time.sleep(0.1)
            except OSError as error:
                if error.errno in UNLOCKABLE:
                    return False
                raise
            else:
                return True

    def _own_partial(self, file: File) -> Path:
        """Return a partial file of this process only, with what one that has ended here left."""
        here = f"{file.etag}{OURS}{platform.node()}."
        mine = self._blobs / f"{here}{os.getpid()}.incomplete"
        others = [p for p in self._blobs.iterdir() if p.name.startswith(here)]
        left = next((p for p in others if _has_ended(p.name.split(".")[-2])), file.partial)
        with contextlib.suppress(FileNotFoundError):
            os.rename(left, mine)
        file.partial.unlink(missing_ok=True)
        return mine

    def _receive(self, hub: Hub, file: File, partial: BinaryIO) -> Check:
        """Receive what is missing, in as many requests as it takes."""
        check, failures = Check(file), 0
        present = partial.seek(0, os.SEEK_END)
        partial.seek(0)
        self._hash_present(check, partial, present)
        while check.size < file.size:
            before = check.size
            try:
                self._receive_once(hub, partial, check)
                failed = unreachable("the answer ended too early")
            except Exception as error:  # noqa: BLE001 (each library's own; `explain` sorts them)
                failed = hub.explain(error)
            failures = 1 if check.size > before else failures + 1
            if check.size < file.size:
                hub.wait(failed, failures)
        return check

    def _receive_once(self, hub: Hub, partial: BinaryIO, check: Check) -> None:
        """Write each chunk at once and unbuffered, so that a kill or a reset loses nothing."""
        file = check.file
        with hub.body(self._repo, self._commit, file, check.size) as response:
            start = starts_at(response, file.name, file.size)
            if start != check.size:  # the whole file again, or another part than was requested
                partial.truncate(0)
                check.restart()
                if start != 0:
                    return
            for chunk in response.iter_raw():
                data = memoryview(chunk)[: file.size - check.size]
                check.update(data)
                while data:
                    data = data[partial.write(data) :]
                self._count(file, check.size, len(chunk))
                if check.size == file.size:
                    return

    def _hash_present(self, check: Check, data: BinaryIO, present: int) -> None:
        while chunk := data.read(CHUNK_BYTES):
            check.update(chunk)
            self._count(check.file, present, len(chunk))

    def _fetch_whole(self, hub: Hub, file: File) -> None:
        def watch() -> None:  # the library reports nothing, but its partial file grows
            with contextlib.suppress(OSError):
                parts = self._blobs.glob(f"{file.etag}.*.incomplete")
                self._count_growth(file, sum(_bytes_written(part) for part in parts))

        with repeating(0.25, watch):
            hub.fetch_whole(self._repo, self._commit, file.name)
        if not self._is_whole(file.pointer, replace(file, verify=True)):
            raise Failed("hub_corrupt", f"{file.name} arrived with a wrong hash: try again later")

    def _count(self, file: File, present: int, worked: int = 0, waiting: str | None = None) -> None:
        """Record progress: bytes of a file on disk, and bytes received or hashed just now."""
        self._seen += worked
        self._done[file.name] = done = min(present, file.size)
        about = {"file": file.name, "done": done, "all": sum(self._done.values())}
        self._progress = {**about, "seen": self._seen, "waiting": waiting}
        if not worked:
            self._report()

    def _count_growth(self, file: File, size: int, waiting: str | None = None) -> None:
        self._count(file, size, abs(size - self._done[file.name]), waiting)

    def _report(self) -> None:
        with _reporting:
            if self._reported is not self._progress:
                self._reported = self._progress
                report(**self._reported)

    def _check_disk(self, *, is_full: bool = False) -> None:
        """Raise if what is missing of all files does not fit, or did not."""
        missing = {file.etag: file.size - file.bytes_on_disk for file in self._files}
        needed, free = sum(missing.values()), shutil.disk_usage(self._folder()).free
        if is_full or needed > free:
            message = (
                f"{self._repo} needs {_bytes(needed)} more and {self._root.parent} has "
                f"{_bytes(free)} free: free some space, or set HF_HUB_CACHE to another volume"
            )
            raise Failed("disk_full", message)

    def _sweep(self) -> None:
        """Remove files of ours that were not touched for a long time and are not in use."""
        wanted = {file.partial for file in self._files}
        for path in self._blobs.glob(f"*{OURS}*"):
            with contextlib.suppress(OSError):
                if path in wanted or time.time() - path.lstat().st_mtime <= SWEEP_AFTER_S:
                    continue
                if not path.is_symlink():
                    with open(path, "rb") as file:
                        lock(file)
                path.unlink()

    def _create(self, path: Path, make: Callable[[Path], object]) -> None:
        """Create or replace a file atomically; the temporary one is where no tool looks."""
        self._make_folders()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._blobs / f"{os.getpid()}{OURS}tmp"
        temporary.unlink(missing_ok=True)
        try:
            make(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class Check:
    """Size and hash of a file: SHA-256, or git's blob hash where the etag is one."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.restart()

    def restart(self) -> None:
        self.size: int = 0
        self._hash: Any = hashlib.sha256()
        if len(self.file.etag) == 40:
            self._hash = hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        self._hash.update(data)

    @property
    def is_good(self) -> bool:
        is_hash = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self.file.etag)
        is_right = not is_hash or self._hash.hexdigest() == self.file.etag
        return self.size == self.file.size and is_right


def _is_same(file: BinaryIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _has_ended(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError) as error:
        return isinstance(error, ProcessLookupError)
    return False


def _bytes(size: int) -> str:
    return f"{size} bytes ({size / (1 << 30):.1f} GiB)"


if __name__ == "__main__":
    sys.exit(main())
