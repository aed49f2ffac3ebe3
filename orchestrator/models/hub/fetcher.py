"""Download files of a Hub repo into the cache: a program, so that killing it stops everything.

It is started by its path and imports nothing of this package. The parent sends what to list and
what to fetch, and receives reports, as lines of JSON. A file appears under its name only when it is
whole: its bytes go to a partial file, are hashed as they are written, and a later run continues it.
The cache has the layout that huggingface_hub documents; protocol, authentication and errors are
that library's. Only `blobs/*.orchestrator.*` are files of our own.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

OURS = ".orchestrator."
PARTIAL = f"{OURS}incomplete"
CORRUPT = f"{OURS}corrupt"
CHUNK_BYTES = 1 << 20
MAX_LISTING_BYTES = 32 << 20
REPORT_EVERY_S = 0.05
MAX_FAILURES = 6  # in a row, without a byte in between
LISTING_TRIES = 4  # fewer: nothing has been downloaded yet, and a caller waits for the answer
MAX_BACKOFF_S = 8.0
SWEEP_AFTER_S = 7 * 24 * 3600.0
CONNECT_S = 10.0
READ_S = 20.0

_stdout = sys.stdout
_reporting = threading.RLock()


class Failed(Exception):
    """Ends the program, unless it is transient; `members` are those of the parent's `Problem`."""

    def __init__(
        self, category: str, message: str, *, is_transient: bool = False, **members: Any
    ) -> None:
        super().__init__(message)
        self.is_transient = is_transient
        self.members: dict[str, Any] = {"category": category, "message": message, **members}


def report(**message: Any) -> None:
    with _reporting:
        _stdout.write(json.dumps(message) + "\n")
        _stdout.flush()


def main() -> int:
    global _stdout  # noqa: PLW0603 (set once; what libraries print goes to stderr)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    _stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        setup = json.loads(sys.stdin.readline())
        hub = None if setup["offline"] else Hub(setup)
        if hub is not None and setup["lists"]:
            report(listing=hub.listing())
        while line := sys.stdin.readline():
            job = json.loads(line)
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
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


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


class Hub:
    """Requests to the Hub, with huggingface_hub's session, headers and errors."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils

        self._setup = setup
        self._lib, self._errors = huggingface_hub, errors
        self._endpoint = constants.ENDPOINT
        self.max_file_bytes: int = getattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 50 << 30)
        self._session = huggingface_hub.get_session()
        self._http = sys.modules[type(self._session).__module__.partition(".")[0]]
        headers = utils.build_hf_headers(  # type: ignore[attr-defined]
            token=setup["token"], library_name="llama-orchestrator"
        )
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._raise_for_status = utils.hf_raise_for_status  # type: ignore[attr-defined]
        part_s = setup["stall_timeout_s"] / 10  # so that further tries come before the stall
        self._timeout = self._http.Timeout(min(CONNECT_S, part_s), read=min(READ_S, part_s))

    def listing(self) -> Any:
        """Return repo, commit and model files: name to size and etag (SHA-256 or git's hash)."""
        url = f"{self._endpoint}/api/models/{self._setup['repo']}"
        if (revision := self._setup["revision"]) is not None:
            url += f"/revision/{quote(revision, safe='')}"
        return self._retried(lambda: self._listing(f"{url}?blobs=true"))

    def check_access(self, repo: str, commit: str, name: str) -> None:
        """Ask for a file's headers: a gated repo lists its files for everyone."""
        url = self._lib.hf_hub_url(repo, name, revision=commit)

        def head() -> None:  # the CDN is asked when the bytes are fetched
            with self._stream("HEAD", url, follow_redirects=False) as response:
                if response.status_code >= 400:
                    self._raise_for_status(response)

        self._retried(head)

    def _retried(self, request: Callable[[], Any]) -> Any:
        failures, most = 0, self._setup["listing_tries"] or LISTING_TRIES
        while True:
            try:
                return request()
            except Exception as error:  # noqa: BLE001 (each library's own; `explain` sorts them)
                failures += 1
                self.wait(self.explain(error), failures, most)

    def wait(self, failed: Failed, failures: int, most: int = MAX_FAILURES) -> None:
        """Wait after so many failures in a row; raise the last, and any that is not transient."""
        patience_s, wait_s = self._setup["stall_timeout_s"], failed.members.get("retry_after_s")
        is_last = failures >= most or (wait_s or 0) >= patience_s
        if is_last or not failed.is_transient:
            raise failed
        if wait_s is None:
            wait_s = min(0.25 * 2**failures, MAX_BACKOFF_S, patience_s / 12)
        report(waiting=failed.members["message"])
        time.sleep(wait_s)

    def _listing(self, url: str) -> dict[str, Any]:
        text, files = bytearray(), {}
        with self._stream("GET", url) as response:
            self._raise_for_status(response)
            _refuse_html(response)
            for chunk in response.iter_bytes():
                text += chunk
                if len(text) > MAX_LISTING_BYTES:
                    raise _unusable(f"a listing of more than {MAX_LISTING_BYTES >> 20} MiB")
        try:
            info = json.loads(text)
            for file in info["siblings"]:
                if (name := file["rfilename"]).lower().endswith(".gguf"):
                    etag = file["lfs"]["sha256"] if file.get("lfs") else file.get("blobId")
                    files[name] = file.get("size"), etag
            return {"repo": info["id"], "commit": info["sha"], "files": files}
        except ValueError as error:
            raise _unusable(str(error), is_transient=True) from error
        except (AttributeError, KeyError, TypeError) as error:
            raise _unusable(f"{type(error).__name__}: {error}") from error

    def _stream(self, method: str, url: str, **more: Any) -> Any:
        about = {"headers": self._headers, "follow_redirects": True, "timeout": self._timeout}
        return self._session.stream(method, url, **{**about, **more})

    @contextlib.contextmanager
    def body(self, repo: str, commit: str, file: File, start: int) -> Iterator[Any]:
        """Request a file from a byte on; yield the response, its body unread."""
        url = self._lib.hf_hub_url(repo, file.name, revision=commit)
        headers = {**self._headers, **({"Range": f"bytes={start}-"} if start else {})}
        with self._stream("GET", url, headers=headers) as response:
            if response.status_code != 416:
                self._raise_for_status(response)
            _refuse_html(response)
            for answer in (*response.history, response):
                etag = answer.headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"')
                if etag and etag != file.etag:
                    raise _changed(file)
            yield response

    def fetch_whole(self, repo: str, commit: str, name: str) -> None:
        """Leave a file to the library: over 50 GB the Hub serves it by Xet only."""
        token, cache = self._setup["token"], self._setup["cache_dir"]
        try:
            self._lib.hf_hub_download(repo, name, revision=commit, token=token, cache_dir=cache)
        except Exception as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> Failed:
        """Return the failure that an error of any of the libraries means."""
        if isinstance(error, Failed):
            return error
        if isinstance(error, (self._http.LocalProtocolError, UnicodeEncodeError)):
            message = "the token has characters that HTTP headers cannot carry: check hf_token"
            return Failed("hub_unauthorized", message, field="hf_token")
        if isinstance(error, self._http.RequestError):
            return _unreachable(error)
        if isinstance(error, OSError) and error.errno is not None:
            raise error  # of the disk, not of the Hub
        for kind, category, field, message in self._meanings():
            if isinstance(error, kind):
                return Failed(category, message, field=field)
        if (response := getattr(error, "response", None)) is not None:
            return self._failed_by_status(response)
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Failed("hub_error", f"the Hub cannot be used ({what})")

    def _failed_by_status(self, response: Any) -> Failed:
        status, wait_s = response.status_code, _retry_after(response.headers)
        is_hub = str(response.url).startswith(self._endpoint)  # else its CDN: a retry has new links
        if status in {401, 403} and is_hub:
            message = f"the Hub refused {self._setup['repo']} (status {status}): check hf_token"
            return Failed("hub_unauthorized", message, field="hf_token")
        if status == 429:
            message = "the Hub received too many requests: wait, or give hf_token"
            return Failed("hub_rate_limited", message, is_transient=True, retry_after_s=wait_s)
        is_transient = status in {408, 425} or status >= 500 or not is_hub
        message = f"the Hub failed with status {status}: try again later"
        return Failed("hub_unreachable", message, is_transient=is_transient, retry_after_s=wait_s)

    def _meanings(self) -> tuple[tuple[type[Exception], str, str, str], ...]:
        """Errors of the library, specific ones first: class, category, field, message."""
        errors, repo = self._errors, self._setup["repo"]
        token = "what hf_token may read" if "authorization" in self._headers else "give hf_token"
        gone, gated = "model_not_found", "hub_gated"
        terms = f"accept its terms at {self._endpoint}/{repo}, then give hf_token"
        unknown = f"{repo} has no revision {self._setup['revision']!r}: check revision"
        moved = f"{repo} has just changed on the Hub: load it again"
        missing = f"{repo} does not exist on the Hub, or is private: check its name, or {token}"
        return (
            (errors.GatedRepoError, gated, "hf_token", f"{repo} is gated: {terms}"),
            (errors.RevisionNotFoundError, gone, "revision", unknown),
            (errors.EntryNotFoundError, gone, "model_path", moved),
            (errors.RepositoryNotFoundError, gone, "model_path", missing),
            (errors.HFValidationError, gone, "model_path", f"{repo} is not a valid repo id"),
        )


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
        elif absent := [file for file in missing if file.bytes_on_disk < file.size]:
            self._check_disk()
            self._hub.check_access(self._repo, self._commit, absent[0].name)

    def run(self) -> None:
        try:
            with repeating(REPORT_EVERY_S, self._report):
                for folder in (self._blobs, self._root / "snapshots"):  # one alone is damage
                    folder.mkdir(parents=True, exist_ok=True)
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
        if not file.pointer.exists():
            target = os.path.relpath(file.blob, file.pointer.parent)
            self._create(file.pointer, lambda path: path.symlink_to(target))
        report(verified=file.name)

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
            real = path.resolve()
            if real.is_relative_to(self._root.resolve()):  # a file elsewhere is not ours to move
                os.replace(real, file.blob.with_name(file.etag + CORRUPT))
            for link in (path, file.blob):
                if link.is_symlink():
                    link.unlink()
        return is_good

    def _download(self, hub: Hub, file: File) -> None:
        damaged = 0
        while damaged < 2:
            with open(file.partial, "a+b", buffering=0) as partial:
                self._lock(file, partial)
                is_current = _is_same(partial, file.partial)  # not renamed or swept meanwhile
                # one that became the blob was hashed by the process that had the lock
                if _is_same(partial, file.blob) or self._is_whole(file.blob, file):
                    if is_current:
                        file.partial.unlink()
                    return
                if not is_current:
                    continue
                if self._receive(hub, file, partial).is_good:
                    os.fsync(partial.fileno())
                    os.replace(file.partial, file.blob)
                    file.blob.with_name(file.etag + CORRUPT).unlink(missing_ok=True)
                    return
                partial.truncate(0)
            damaged += 1
            report(waiting=f"{file.name} arrived with a wrong hash (download {damaged} of 2)")
        message = f"{file.name} had a wrong hash after two downloads: try again later"
        raise Failed("hub_corrupt", message)

    def _lock(self, file: File, partial: BinaryIO) -> None:
        while True:
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(partial.fileno()).st_size
            self._count_growth(file, size, "another process is downloading it")
            time.sleep(0.1)

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
                failed = _unreachable("the answer ended too early")
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
            start = _starts_at(response, file)
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
                self._count_growth(file, sum(part.stat().st_blocks * 512 for part in parts))

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
        folder = next(f for f in (self._blobs, *self._blobs.parents) if f.exists())
        needed, free = sum(missing.values()), shutil.disk_usage(folder).free
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
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _create(self, path: Path, make: Callable[[Path], object]) -> None:
        """Create or replace a file atomically; the temporary one is where no tool looks."""
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


def _starts_at(response: Any, file: File) -> int:
    """Return where in the file the body of a response begins; -1 if it does not say."""
    start, size = 0, response.headers.get("Content-Length")
    if response.status_code != 200:
        text = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
        if response.status_code != 206 or found is None:
            return -1
        start, size = int(found[1]), found[2]
    if size not in {None, "*", str(file.size)}:
        raise _changed(file)
    return start


def _refuse_html(response: Any) -> None:
    if "html" in response.headers.get("Content-Type", ""):
        message = "a web page was received instead of the Hub's answer: sign in to the proxy first"
        raise Failed("hub_unreachable", message, reason="not_the_hub")


def _unreachable(error: Exception | str) -> Failed:
    why = (str(error) or type(error).__name__).splitlines()[0][:200]
    if "CERTIFICATE" in why or "SSL" in why or "TLS" in why:
        message = f"the Hub's certificate is not trusted ({why}): check clock, proxy, SSL_CERT_FILE"
        return Failed("hub_unreachable", message, reason="tls")
    message = f"the Hub cannot be reached ({why}): check the network, or try again"
    return Failed("hub_unreachable", message, is_transient=True)


def _unusable(why: str, *, is_transient: bool = False) -> Failed:
    message = f"the Hub's answer cannot be used ({why[:200]}): try again later"
    return Failed("hub_unreachable", message, is_transient=is_transient)


def _changed(file: File) -> Failed:
    return Failed("hub_corrupt", f"{file.name} has changed since the Hub listed it: load it again")


def _retry_after(headers: Any) -> float | None:
    """Source: RFC 9110, section 10.2.3; the Hub also sends it in `RateLimit`."""
    text = headers.get("Retry-After", "").strip()
    limit = re.search(r"\bt=(\d{1,7})", headers.get("RateLimit", ""))
    if found := re.fullmatch(r"(\d{1,7})", text) or limit:
        return float(found[1])
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _bytes(size: int) -> str:
    return f"{size} bytes ({size / (1 << 30):.1f} GiB)"


if __name__ == "__main__":
    sys.exit(main())
