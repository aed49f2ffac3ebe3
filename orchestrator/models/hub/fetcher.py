"""Talks to the Hub and fills its cache: a program of its own, so that ending it ends everything.

Runs as a child process by its path and imports nothing of this package. It decides nothing: it is
told what to list and what to fetch, a line of JSON each on stdin, and tells what happens, a line of
JSON each on stdout. What it keeps is that a file appears under its name only when it is whole: its
bytes go to a partial file, continued from where it ended before, hashed as they are written.

The cache is laid out as huggingface_hub documents it; protocol, authentication and errors are that
library's. `blobs/*.orchestrator.*` are the files only we know.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

OURS = ".orchestrator."
PARTIAL = f"{OURS}incomplete"
CORRUPT = f"{OURS}corrupt"
CHUNK = 1 << 20
MAX_LISTING = 32 << 20
TELL_EVERY_S = 0.05
MAX_FAILURES = 6  # in a row, without a byte between them
LISTING_TRIES = 4  # nothing is lost yet, and somebody waits for the answer
LONGEST_WAIT_S = 8.0
FORGOTTEN_AFTER_S = 7 * 24 * 3600.0
READ_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 10.0

_told = sys.stdout
_telling = threading.Lock()


class Failed(Exception):
    """It cannot go on; the members are those of a problem. One that passes may be tried again."""

    def __init__(
        self, category: str, message: str, *, passes: bool = False, **members: Any
    ) -> None:
        super().__init__(message)
        self.passes = passes
        self.members: dict[str, Any] = {"category": category, "message": message, **members}


def tell(**message: Any) -> None:
    with _telling:
        _told.write(json.dumps(message) + "\n")
        _told.flush()


def main() -> int:
    global _told  # noqa: PLW0603 (set once; what a library prints is for stderr)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        order = json.loads(sys.stdin.readline())
        hub = None if order["offline"] else Hub(order)
        if hub is not None and order["lists"]:
            tell(listing=hub.listing())
        while line := sys.stdin.readline():
            wanted = json.loads(line)
            fetch = Fetch(order, wanted, hub)
            fetch.check() if wanted.get("only_check") else fetch.run()
            tell(done=True)
    except Failed as failed:
        tell(error=failed.members)
    except ImportError as error:
        message = f"{error}: install huggingface_hub for {sys.executable}"
        tell(error=Failed("hub_error", message).members)
    return 0


def _end_with_parent(parent: int) -> None:
    """A pipe would be held open by a fork of the parent; its pid is not."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


# ---------------------------------------------------------------------------------- the network


class Hub:
    """The Hub, as huggingface_hub speaks to it."""

    def __init__(self, order: dict[str, Any]) -> None:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils

        self._order = order
        self._lib = huggingface_hub
        self._errors = errors
        self._endpoint = constants.ENDPOINT
        self._max_size = getattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 50 << 30)
        self._session = huggingface_hub.get_session()
        self._http = sys.modules[type(self._session).__module__.partition(".")[0]]
        headers = utils.build_hf_headers(  # type: ignore[attr-defined]
            token=order["token"], library_name="llama-orchestrator"
        )
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._raise_for_status = utils.hf_raise_for_status  # type: ignore[attr-defined]
        part_s = order["stall_timeout_s"] / 10  # the next try comes before the stall does
        self._timeout = self._http.Timeout(
            min(CONNECT_TIMEOUT_S, part_s), read=min(READ_TIMEOUT_S, part_s)
        )

    def listing(self) -> dict[str, Any]:
        """Every model file of the revision: its size and etag (sha256, or git's hash of it).

        Raises:
            Failed: gated, missing, not allowed, not reachable.
        """
        repo, revision = self._order["repo"], self._order["revision"]
        url = f"{self._endpoint}/api/models/{repo}"
        if revision is not None:
            url += f"/revision/{quote(revision, safe='')}"
        failures = Failures(self._order, self._order["listing_tries"] or LISTING_TRIES)
        while True:
            try:
                info = self._json(f"{url}?blobs=true")
                return {"repo": info["id"], "commit": info["sha"], "files": _files_of(info)}
            except (AttributeError, KeyError, TypeError) as error:
                raise _no_sense(f"{type(error).__name__}: {error}") from error
            except Exception as error:  # noqa: BLE001 (each library's own; sorted by `explain`)
                failures.note(self.explain(error))

    def _json(self, url: str) -> Any:
        text = bytearray()
        with self._get(url, self._headers) as response:
            self._raise_for_status(response)
            _refuse_html(response)
            for chunk in response.iter_bytes():
                text += chunk
                if len(text) > MAX_LISTING:
                    raise _no_sense(f"a listing of more than {MAX_LISTING >> 20} MiB")
        try:
            return json.loads(text)
        except ValueError as error:
            raise _no_sense(str(error), passes=True) from error

    def _get(self, url: str, headers: dict[str, str]) -> Any:
        return self._session.stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=self._timeout
        )

    def check_access(self, repo: str, commit: str, name: str) -> None:
        """Ask whether a file may be had: a repo that is gated lists its files for everybody.

        Raises:
            Failed: gated, not allowed, gone, not reachable.
        """
        url = self._lib.hf_hub_url(repo, name, revision=commit)
        failures = Failures(self._order, self._order["listing_tries"] or LISTING_TRIES)
        while True:
            try:
                response = self._session.request(
                    "HEAD",
                    url,
                    headers=self._headers,
                    follow_redirects=False,  # where its bytes are is asked when they are fetched
                    timeout=self._timeout,
                )
                if response.status_code >= 400:
                    self._raise_for_status(response)
            except Exception as error:  # noqa: BLE001 (each library's own; sorted by `explain`)
                failures.note(self.explain(error))
            else:
                return

    @contextlib.contextmanager
    def body(self, repo: str, commit: str, file: dict[str, Any], start: int) -> Iterator[Any]:
        """Request a file from a byte on, as a response whose body can be read.

        Raises:
            Failed: it is not the file that was listed.
        """
        url = self._lib.hf_hub_url(repo, file["name"], revision=commit)
        headers = {**self._headers, **({"Range": f"bytes={start}-"} if start else {})}
        with self._get(url, headers) as response:
            if response.status_code != 416:
                self._raise_for_status(response)
            _refuse_html(response)
            for answer in (*response.history, response):
                etag = answer.headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"')
                if etag and etag != file["etag"]:
                    raise _changed(file["name"])
            yield response

    def fetch_whole(self, repo: str, commit: str, name: str) -> None:
        """Let the library fetch what plain HTTP does not serve (more than 50 GB: Xet)."""
        token, cache = self._order["token"], self._order["cache_dir"]
        try:
            self._lib.hf_hub_download(repo, name, revision=commit, token=token, cache_dir=cache)
        except Exception as error:
            raise self.explain(error) from error

    def is_too_large(self, size: int) -> bool:
        return bool(size > self._max_size)

    def explain(self, error: Exception) -> Failed:
        """Say what a failure means, and whether it may pass by itself."""
        if isinstance(error, Failed):
            return error
        if isinstance(error, (self._http.LocalProtocolError, UnicodeEncodeError)):
            message = "the token holds what no header can: check hf_token"
            return Failed("hub_unauthorized", message, field="hf_token")
        if isinstance(error, self._http.RequestError):
            return _unreachable(error)
        if isinstance(error, OSError) and error.errno is not None:
            raise error  # the disk's, not the Hub's
        for kind, category, field, message in self._meanings():
            if isinstance(error, kind):
                return Failed(category, message, field=field)
        if (response := getattr(error, "response", None)) is not None:
            return self._of_status(response)
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Failed("hub_error", f"the Hub cannot be used ({what})")

    def _of_status(self, response: Any) -> Failed:
        status, wait_s = response.status_code, _retry_after(response.headers)
        is_hub = str(response.url).startswith(self._endpoint)  # else its CDN, with new links
        if status in {401, 403} and is_hub:
            message = f"the Hub refuses {self._order['repo']} (status {status}): check hf_token"
            return Failed("hub_unauthorized", message, field="hf_token")
        if status == 429:
            message = "the Hub was asked too often: wait, or give hf_token"
            return Failed("hub_rate_limited", message, passes=True, retry_after_s=wait_s)
        passes = status in {408, 425} or status >= 500 or not is_hub
        message = f"the Hub has an error of its own (status {status}): try again later"
        return Failed("hub_unreachable", message, passes=passes, retry_after_s=wait_s)

    def _meanings(self) -> tuple[tuple[type[Exception], str, str, str], ...]:
        """The library's own errors, the specific before the general."""
        errors, repo = self._errors, self._order["repo"]
        token = "the token cannot see it" if "authorization" in self._headers else "give hf_token"
        gone, gated = "model_not_found", "hub_gated"
        terms = f"accept its terms at {self._endpoint}/{repo}, then give hf_token"
        revision = self._order["revision"]
        missing = f"{repo} does not exist on the Hub, or is private: check it, or {token}"
        return (
            (errors.GatedRepoError, gated, "hf_token", f"{repo} is gated: {terms}"),
            (errors.RevisionNotFoundError, gone, "revision", f"{repo} has no {revision!r}"),
            (errors.EntryNotFoundError, gone, "model_path", f"{repo} was changed: load again"),
            (errors.RepositoryNotFoundError, gone, "model_path", missing),
            (errors.HFValidationError, gone, "model_path", f"{repo} is no repo id"),
        )


def _files_of(info: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Only models: a repo may hold ten thousand other files."""
    files = {}
    for file in info["siblings"]:
        if file["rfilename"].lower().endswith(".gguf"):
            etag = file["lfs"]["sha256"] if file.get("lfs") else file.get("blobId")
            files[file["rfilename"]] = (file.get("size"), etag)
    return files


def _refuse_html(response: Any) -> None:
    if "html" in response.headers.get("Content-Type", ""):
        message = "a web page answers in place of the Hub: is there a proxy that wants a sign-in?"
        raise Failed("hub_unreachable", message, reason="not_the_hub")


class Failures:
    """Failures in a row: waits between them, longer and longer, and gives up in the end."""

    def __init__(self, order: dict[str, Any], tries: int = MAX_FAILURES) -> None:
        self._count = 0
        self._tries = tries
        self._patience_s = order["stall_timeout_s"]

    def reset(self) -> None:
        self._count = 0

    def note(self, failed: Failed) -> None:
        """Wait before the next try.

        Raises:
            Failed: it will not pass by itself, or has not for long enough.
        """
        self._count += 1
        wait_s = failed.members.get("retry_after_s")
        if not failed.passes or self._count >= self._tries or (wait_s or 0) >= self._patience_s:
            raise failed
        if wait_s is None:
            wait_s = min(0.25 * 2**self._count, LONGEST_WAIT_S, self._patience_s / 12)
        tell(waiting=failed.members["message"])
        time.sleep(wait_s)


# ------------------------------------------------------------------------------------- the cache


class Fetch:
    """Makes sure that every wanted file is whole and under its name.

    `wanted` is {repo, root, commit, revision, files: [{name, size, etag, verify}]}.
    """

    def __init__(self, order: dict[str, Any], wanted: dict[str, Any], hub: Hub | None) -> None:
        self._order = order
        self._repo, self._commit = wanted["repo"], wanted["commit"]
        self._revision, self._files = wanted["revision"], wanted["files"]
        self._hub = hub
        self._root = Path(wanted["root"])
        self._blobs = self._root / "blobs"
        self._done = {file["name"]: 0 for file in self._files}
        self._seen = 0
        self._state: dict[str, Any] = {}
        self._last = self._state
        self._guard = threading.Lock()
        self._ended = threading.Event()

    def check(self) -> None:
        """Say whether what is missing may be had; where nothing is, note what the revision is."""
        missing = [file for file in self._files if not self._is_there(self._pointer(file), file)]
        if self._hub is None or not missing:
            self._note_revision()
        elif absent := [file for file in missing if self._present(file) < file["size"]]:
            self._check_disk()
            self._hub.check_access(self._repo, self._commit, absent[0]["name"])

    def run(self) -> None:
        ticker = threading.Thread(target=self._tick, daemon=True)
        ticker.start()
        try:
            self._run()
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise self._disk_full() from error
            message = f"the cache cannot be used: {error.strerror}: {error.filename or self._root}"
            raise Failed("cache_dir", message) from error
        finally:
            self._ended.set()
            ticker.join()

    def _run(self) -> None:
        for folder in (self._blobs, self._root / "snapshots"):  # one without the other is damage
            folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        for file in self._files:
            self._count(file, self._present(file))
        for file in self._files:
            self._complete(file)
            self._count(file, file["size"])
        self._note_revision()

    def _note_revision(self) -> None:
        if self._revision is not None and self._hub is not None:
            with contextlib.suppress(OSError):  # a cache that may only be read is one, too
                self._refer(self._root / "refs" / self._revision)

    def _pointer(self, file: dict[str, Any]) -> Path:
        return Path(self._root, "snapshots", self._commit, file["name"])

    def _complete(self, file: dict[str, Any]) -> None:
        name, size, etag = file["name"], file["size"], file["etag"]
        pointer, blob = self._pointer(file), self._blobs / etag
        if not (self._is_whole(pointer, file) or self._is_whole(blob, file)):
            hub = self._hub
            if hub is None:
                message = f"{name} in the cache is damaged: load again while the Hub can be reached"
                raise Failed("hub_corrupt", message)
            self._check_disk()
            if hub.is_too_large(size):
                self._fetch_whole(hub, file)
            else:
                self._download(hub, file, blob)
        self._point(pointer, blob)
        tell(verified=name)

    def _is_whole(self, path: Path, file: dict[str, Any]) -> bool:
        """Is what the cache has what the Hub announced? What is not is set aside."""
        if not path.exists():
            return False
        good: bool = path.stat().st_size == file["size"]
        if good and file["verify"]:
            check = Check(file)
            with open(path, "rb") as data:
                self._feed(check, data, file, file["size"])
            good = check.is_good
        if not good:
            self._set_aside(path, file["etag"])
        return good

    def _set_aside(self, path: Path, etag: str) -> None:
        """Nothing finds it any more. What lies outside of this repo is not ours to move."""
        real = path.resolve()
        if real.is_relative_to(self._root.resolve()):
            os.replace(real, self._blobs / (etag + CORRUPT))
        for link in (path, self._blobs / etag):
            if link.is_symlink():
                link.unlink()

    def _download(self, hub: Hub, file: dict[str, Any], blob: Path) -> None:
        for attempt in (1, 2):
            with self._locked(file, blob) as partial:
                if partial is None:  # somebody else has finished it meanwhile
                    return
                check = self._receive(hub, file, partial)
                if check.is_good:
                    os.fsync(partial.fileno())
                    os.replace(partial.name, blob)
                    blob.with_name(file["etag"] + CORRUPT).unlink(missing_ok=True)
                    return
                partial.truncate(0)
            tell(waiting=f"{file['name']} arrived damaged ({attempt} of 2)")
        raise Failed(
            "hub_corrupt",
            f"{file['name']} arrived damaged twice: what the Hub sends is not what it announces",
        )

    def _receive(self, hub: Hub, file: dict[str, Any], partial: BinaryIO) -> Check:
        """Receive what is missing, however often the connection breaks."""
        check = Check(file)
        partial.seek(0)
        self._feed(check, partial, file, os.fstat(partial.fileno()).st_size)
        failures = Failures(self._order)
        while check.size < file["size"]:
            before = check.size
            try:
                self._receive_on(hub, file, partial, check)
                failed = _unreachable("the answer ended too early")
            except Exception as error:  # noqa: BLE001 (each library's own; sorted by `explain`)
                failed = hub.explain(error)
            if check.size > before:
                failures.reset()
            if check.size < file["size"]:
                failures.note(failed)
        return check

    def _receive_on(self, hub: Hub, file: dict[str, Any], partial: BinaryIO, check: Check) -> None:
        """Receive from one answer: as it comes, so that a kill or a reset loses nothing."""
        size = file["size"]
        with hub.body(self._repo, self._commit, file, check.size) as response:
            start = _starts_at(response, file)
            if start != check.size:  # the whole file once more, or a part nobody asked for
                self._restart(check, partial)
            if start != check.size:
                return
            for chunk in response.iter_raw():
                data = memoryview(chunk)[: size - check.size]
                check.update(data)
                while data:
                    data = data[partial.write(data) :]
                self._count(file, check.size, len(chunk))
                if check.size == size:
                    return

    def _feed(self, check: Check, data: BinaryIO, file: dict[str, Any], present: int) -> None:
        """Hash what is there already."""
        while chunk := data.read(CHUNK):
            check.update(chunk)
            self._count(file, present, len(chunk))

    def _restart(self, check: Check, partial: BinaryIO) -> None:
        partial.truncate(0)
        check.restart()

    def _fetch_whole(self, hub: Hub, file: dict[str, Any]) -> None:
        """Watch the library's own partial file meanwhile: it tells nothing."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.25):
                with contextlib.suppress(OSError):
                    parts = self._blobs.glob(f"{file['etag']}.*.incomplete")
                    size = sum(part.stat().st_blocks * 512 for part in parts)
                    self._count(file, size, abs(size - self._done[file["name"]]))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            hub.fetch_whole(self._repo, self._commit, file["name"])
        finally:
            ended.set()
            watcher.join()
        if not self._is_whole(self._pointer(file), {**file, "verify": True}):
            raise Failed("hub_corrupt", f"{file['name']} does not have the announced hash")

    def _count(
        self, file: dict[str, Any], present: int, worked: int = 0, waiting: str | None = None
    ) -> None:
        """Note how much of a file is on disk; `seen` grows with every byte looked at."""
        name = file["name"]
        self._seen += worked
        self._done[name] = min(present, file["size"])
        done = {"file": name, "done": self._done[name], "all": sum(self._done.values())}
        self._state = {**done, "seen": self._seen, **({"waiting": waiting} if waiting else {})}
        if not worked:
            self._tell()

    def _tell(self) -> None:
        with self._guard:
            if self._last is not self._state:
                self._last = self._state
                tell(**self._last)

    def _tick(self) -> None:
        """Tell it also when what comes next is long in coming."""
        while not self._ended.wait(TELL_EVERY_S):
            self._tell()

    def _present(self, file: dict[str, Any]) -> int:
        blob = self._blobs / file["etag"]
        if any(self._is_there(path, file) for path in (self._pointer(file), blob)):
            return int(file["size"])
        partial = self._blobs / (file["etag"] + PARTIAL)
        return min(partial.stat().st_size, file["size"]) if partial.exists() else 0

    def _is_there(self, path: Path, file: dict[str, Any]) -> bool:
        return path.exists() and bool(path.stat().st_size == file["size"])

    def _check_disk(self) -> None:
        """Before the first byte: what is missing of all files must fit."""
        if self._missing() > self._free():
            raise self._disk_full()

    def _free(self) -> int:
        """Return the bytes that are free where the cache is, or will be."""
        folder = self._blobs
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def _missing(self) -> int:
        return sum({f["etag"]: f["size"] - self._present(f) for f in self._files}.values())

    def _disk_full(self) -> Failed:
        needed, free = self._missing(), self._free()
        message = (
            f"{self._repo} needs {_bytes(needed)} more and {self._root.parent} has {_bytes(free)} "
            "free: free some, or set HF_HUB_CACHE to another volume"
        )
        return Failed("disk_full", message)

    def _sweep(self) -> None:
        """Remove what is ours and nobody has touched for a long time."""
        wanted = {file["etag"] + PARTIAL for file in self._files}
        for path in self._blobs.glob(f"*{OURS}*"):
            with contextlib.suppress(OSError):
                is_old = time.time() - path.lstat().st_mtime > FORGOTTEN_AFTER_S
                if path.name in wanted or not is_old:
                    continue
                if not path.is_symlink():
                    with open(path, "rb") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    @contextlib.contextmanager
    def _locked(self, file: dict[str, Any], blob: Path) -> Iterator[BinaryIO | None]:
        """Open a partial file for this process alone; None when the whole file has appeared."""
        path = self._blobs / (file["etag"] + PARTIAL)
        while True:
            with open(path, "a+b", buffering=0) as partial:
                self._lock(file, partial)
                if self._has_appeared(file, blob, partial):
                    if _is_same(partial, path):
                        path.unlink()
                    yield None
                    return
                if _is_same(partial, path):  # and not one that was renamed or swept meanwhile
                    yield partial
                    return

    def _lock(self, file: dict[str, Any], partial: BinaryIO) -> None:
        size = 0
        while True:
            try:
                fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                before, size = size, os.fstat(partial.fileno()).st_size
                self._count(file, size, abs(size - before), waiting="another process fetches it")
                time.sleep(0.1)
            else:
                return

    def _has_appeared(self, file: dict[str, Any], blob: Path, partial: BinaryIO) -> bool:
        """The very file that was waited for has been hashed by whoever finished it."""
        return blob.exists() and (_is_same(partial, blob) or self._is_whole(blob, file))

    def _point(self, pointer: Path, blob: Path) -> None:
        """Make the file appear under its name, in one step."""
        if not pointer.exists():
            pointer.parent.mkdir(parents=True, exist_ok=True)
            with self._temporary() as path:
                os.symlink(os.path.relpath(blob, pointer.parent), path)
                os.replace(path, pointer)

    def _refer(self, ref: Path) -> None:
        if not ref.exists() or ref.read_text().strip() != self._commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            with self._temporary() as path:
                path.write_text(self._commit)
                os.replace(path, ref)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A name where nobody looks for snapshots or refs."""
        path = self._blobs / f"{os.getpid()}{OURS}tmp"
        path.unlink(missing_ok=True)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


class Check:
    """Size and hash of a file: sha256, or git's blob hash where the etag is one."""

    def __init__(self, file: dict[str, Any]) -> None:
        self._etag, self._announced = file["etag"], file["size"]
        self.restart()

    def restart(self) -> None:
        self.size: int = 0
        self._hash: Any = hashlib.sha256()
        if len(self._etag) == 40:
            self._hash = hashlib.sha1(b"blob %d\0" % self._announced, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        self._hash.update(data)

    @property
    def is_good(self) -> bool:
        is_hash = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self._etag) is not None
        is_right = not is_hash or self._hash.hexdigest() == self._etag
        return self.size == self._announced and is_right


def _is_same(file: BinaryIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _starts_at(response: Any, file: dict[str, Any]) -> int:
    """Return where the body of a response begins in the file; -1 if that cannot be told."""
    start, size = 0, response.headers.get("Content-Length")
    if response.status_code != 200:
        text = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
        if response.status_code != 206 or found is None:
            return -1
        start, size = int(found[1]), found[2]
    if size not in {None, "*", str(file["size"])}:
        raise _changed(file["name"])
    return start


def _unreachable(error: Exception | str) -> Failed:
    why = (str(error) or type(error).__name__).splitlines()[0][:200]
    if "CERTIFICATE" in why or "SSL" in why or "TLS" in why:
        message = f"the Hub cannot be trusted ({why}): check the clock, the proxy and SSL_CERT_FILE"
        return Failed("hub_unreachable", message, reason="tls")
    message = f"the Hub cannot be reached ({why}): check the network, or try again"
    return Failed("hub_unreachable", message, passes=True)


def _no_sense(why: str, *, passes: bool = False) -> Failed:
    message = f"the Hub's answer makes no sense ({why[:200]}): try again later"
    return Failed("hub_unreachable", message, passes=passes)


def _changed(name: str) -> Failed:
    return Failed("hub_corrupt", f"{name} is not what the Hub has listed: load it again")


def _retry_after(headers: Any) -> float | None:
    """Source: RFC 9110, section 10.2.3; the Hub says it in `RateLimit`, too."""
    text = headers.get("Retry-After", "").strip()
    told = re.search(r"\bt=(\d{1,7})", headers.get("RateLimit", ""))
    if found := re.fullmatch(r"(\d{1,7})", text) or told:
        return float(found[1])
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _bytes(size: int) -> str:
    return f"{size} bytes ({size / (1 << 30):.1f} GiB)"


if __name__ == "__main__":
    sys.exit(main())
