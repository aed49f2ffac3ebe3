"""A fake Hugging Face Hub: plain data, served to the real client, with faults on demand.

`Hub` owns two servers on 127.0.0.1: the Hub, and its CDN on a port of its own, to which LFS files
are redirected and to which no token may be sent. It answers as the Hub does as far as
`huggingface_hub` can tell, logs every request, and applies each fault to the answers it matches, in
the order in which the faults were added. Nothing hangs for ever: `Injected.release` ends what one
fault holds up, `Hub.stop` everything. tests/hub/test_fake_hub.py compares it with the client.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Literal, Self, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

if sys.platform == "linux":
    import fcntl
    import termios

T = TypeVar("T")
HeaderChanges = Mapping[str, str | None]  # None leaves one out

DEADLINE_S = 30.0
_CHUNK_BYTES = 256 * 1024
_LARGE_BYTES = 10 * 1024 * 1024
_LFS_SUFFIXES = (".gguf", ".dat", ".bin", ".safetensors")
_ROUTE = re.compile(
    r"(?:/api/models)?/([^/]+(?:/[^/]+)?)(?:/(revision|resolve)/([^/]+)(?:/(.*))?)?"
)
_RANGE = re.compile(r"bytes=(?!-$)(\d*)-(\d*)")


@dataclass(frozen=True)
class Blob:
    """The bytes of a file; `read(start, length)` returns at most so many, and none at the end."""

    size: int
    read: Callable[[int, int], bytes] = field(repr=False)

    @classmethod
    def of(cls, content: Content) -> Blob:
        if isinstance(content, bytes):
            return cls(len(content), lambda start, length: content[start : start + length])
        if isinstance(content, Path):
            return cls(content.stat().st_size, lambda start, n: _read_file(content, start, n))
        return content

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = self.size if stop is None else stop
        while start < stop:
            chunk = self.read(start, min(_CHUNK_BYTES, stop - start))
            assert chunk, f"the file behind a blob is shorter than {self.size}"
            yield chunk
            start += len(chunk)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git stores instead of an LFS file."""
        spec = "https://git-lfs.github.com/spec/v1"
        return f"version {spec}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


Content = bytes | Path | Blob


def _read_file(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), length, start)


def is_lfs(name: str, blob: Blob) -> bool:
    """Is it in LFS, by the rules of a new model repository?"""
    return name.endswith(_LFS_SUFFIXES) or blob.size > _LARGE_BYTES


def blob_id(name: str, blob: Blob) -> str:
    """Return git's hash, which is the ETag of a file outside of LFS."""
    stored = Blob.of(blob.pointer) if is_lfs(name, blob) else blob
    return hashlib.sha1(b"blob %d\0" % stored.size + b"".join(stored.chunks())).hexdigest()


class Repo:
    """A model repository, with commits and branches.

    Args:
        name: In its own case; other spellings are redirected to it.
        files: The first commit of `main`.
        private: Only readers can see it.
        gated: Anyone can list it, and only readers can get its files.
        readers: Tokens.
        aliases: Former names, which are redirected.
        lists_sizes: Whether a listing has sizes and hashes; a mirror's may have names only.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[str, Content],
        *,
        private: bool = False,
        gated: bool = False,
        readers: Iterable[str] = (),
        aliases: Iterable[str] = (),
        lists_sizes: bool = True,
    ) -> None:
        self.name = name
        self.private = private
        self.gated = gated
        self.readers = frozenset(readers)
        self.aliases = tuple(aliases)
        self.lists_sizes = lists_sizes
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, Blob]] = {}
        self.push(files)

    @property
    def commit(self) -> str:
        """The commit of `main`."""
        return self.branches["main"]

    def push(self, files: Mapping[str, Content], *, branch: str = "main") -> str:
        """Make the branch consist of exactly these files, and return the new commit."""
        blobs = {name: Blob.of(content) for name, content in sorted(files.items())}
        about = [self.name, len(self.commits), [(name, blob.size) for name, blob in blobs.items()]]
        commit = hashlib.sha1(json.dumps(about).encode()).hexdigest()
        self.commits[commit] = blobs
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, or of a commit."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """A request; `at` is monotonic time in seconds, and header names are in lower case."""

    at: float
    server: Literal["hub", "cdn"]
    method: str
    target: str
    headers: Mapping[str, str] = field(repr=False, hash=False)

    @property
    def host(self) -> str:
        return self.headers.get("host", "")

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query))

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def has_token(self) -> bool:
        return "authorization" in self.headers

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass(frozen=True)
class Answer:
    """An answer: the bytes of a blob from `start` to `stop`, with the faults to apply to them."""

    status: int
    headers: HeaderChanges
    blob: Blob
    start: int
    stop: int
    kind: Literal["file", "json", "other"] = "other"
    faults: tuple[Injected, ...] = ()

    def all_headers(self) -> dict[str, str]:
        found: dict[str, str | None] = {"Content-Length": str(self.stop - self.start)}
        if self.status == 206:
            found["Content-Range"] = f"bytes {self.start}-{self.stop - 1}/{self.blob.size}"
        return {k: v for k, v in (found | dict(self.headers)).items() if v is not None}

    def body(self) -> Iterator[bytes]:
        chunks = self.blob.chunks(self.start, self.stop)
        for injected in self.faults:
            chunks = injected.fault.spoil(chunks, injected)
        return chunks


def _text(status: int, text: str, headers: HeaderChanges, kind: str = "text/plain") -> Answer:
    blob = Blob.of(text.encode())
    about = {"Content-Type": f"{kind}; charset=utf-8", **headers}
    return Answer(status, about, blob, 0, blob.size, "json" if "json" in kind else "other")


def _json(status: int, found: Any, headers: HeaderChanges) -> Answer:
    return _text(status, json.dumps(found), headers, "application/json")


def _error(status: int, code: str | None, message: str, commit: str | None = None) -> Answer:
    about = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
    return _json(status, {"error": message}, about)


def _redirect(status: int, location: str, headers: HeaderChanges) -> Answer:
    return _text(status, f"Redirecting to {location}", {**headers, "Location": location})


def _file(request: Request, blob: Blob, etag: str, headers: HeaderChanges) -> Answer:
    """Answer with a blob, or with the requested part of it (RFC 9110, section 14)."""
    about = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **headers}
    about["Content-Type"] = "application/octet-stream"
    whole = Answer(200, about, blob, 0, blob.size, "file")
    part = _RANGE.fullmatch(request.range or "")
    if request.method != "GET" or part is None:
        return whole
    if part[1]:
        start, stop = int(part[1]), int(part[2]) + 1 if part[2] else blob.size
    else:
        start, stop = max(0, blob.size - int(part[2])), blob.size
    if start >= blob.size:
        return _text(416, "", {"Content-Range": f"bytes */{blob.size}"})
    if start >= stop:
        return whole
    return replace(whole, status=206, start=start, stop=min(stop, blob.size))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong with the answers it matches.

    Positions are bytes in the body of one answer. A fault of file bodies matches only answers that
    have one, so a redirect to the file does not use it up.

    Attributes:
        path: Part of the path or the query; the CDN's query has the name of the file.
        method: "GET" or "HEAD"; empty for both.
        times: How many answers it hits; None = all.
        status: Answer with this status, and with `Retry-After: <retry_after_s>`.
        hang: Send nothing until released.
        headers: Sent instead; None removes one.
        redirect: Answer 302 to this URL; the other headers stay.
        html: Answer 200 with a web page, as a captive portal does.
        truncate_json: Half of the document, as a complete answer.
        ignore_range: Answer a range request with 200 and the whole file.
        shift_range: Send a part so many bytes further on; Content-Range says so.
        bytes_per_s: Send a file at this rate, in twenty pieces a second, until released.
        flip_at: Invert this byte of a file.
        stall_after: Send so much of a file, and nothing more until released.
        cut_after: Send so much of a file, less than Content-Length, and close (FIN).
        reset_after: Send so much of a file, wait until the client's kernel has it, and reset (RST).
    """

    path: str = ""
    method: str = ""
    times: int | None = None
    status: int | None = None
    retry_after_s: int | None = None
    hang: bool = False
    headers: HeaderChanges = field(default_factory=dict)
    redirect: str | None = None
    html: bool = False
    truncate_json: bool = False
    ignore_range: bool = False
    shift_range: int = 0
    bytes_per_s: int | None = None
    flip_at: int | None = None
    stall_after: int | None = None
    cut_after: int | None = None
    reset_after: int | None = None

    def matches(self, request: Request, answer: Answer) -> bool:
        if self.path not in unquote(request.target) or self.method not in ("", request.method):
            return False
        if self.ignore_range or self.shift_range:
            return answer.status == 206
        if self.truncate_json:
            return answer.kind == "json"
        body = (self.bytes_per_s, self.flip_at, self.stall_after, self.cut_after, self.reset_after)
        is_about_body = any(found is not None for found in body)
        return not is_about_body or (answer.kind == "file" and request.method == "GET")

    def apply(self, answer: Answer, injected: Injected) -> Answer:
        if self.hang:
            injected.hold()
        if self.status is not None:
            after = {"Retry-After": None if self.retry_after_s is None else str(self.retry_after_s)}
            answer = replace(_json(self.status, {"error": "injected fault"}, after), kind="other")
        if self.html:
            answer = _text(200, "<!DOCTYPE html><html>Sign in to go on.</html>", {}, "text/html")
        if self.redirect is not None:
            answer = _redirect(302, self.redirect, answer.headers)
        if self.truncate_json:
            answer = replace(answer, stop=answer.stop // 2)
        if self.ignore_range:
            answer = replace(answer, status=200, start=0, stop=answer.blob.size)
        if self.shift_range:
            stop = min(answer.stop + self.shift_range, answer.blob.size)
            answer = replace(answer, start=answer.start + self.shift_range, stop=stop)
        return replace(
            answer, headers={**answer.headers, **self.headers}, faults=(*answer.faults, injected)
        )

    def spoil(self, chunks: Iterator[bytes], injected: Injected) -> Iterator[bytes]:
        size = _CHUNK_BYTES if self.bytes_per_s is None else max(1, self.bytes_per_s // 20)
        ends = [at for at in (self.stall_after, self.cut_after, self.reset_after) if at is not None]
        sent = 0
        for piece in chain([b""], _pieces(chunks, size, min(ends, default=0))):
            if self.flip_at is not None and 0 <= (at := self.flip_at - sent) < len(piece):
                yield piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
            else:
                yield piece
            sent += len(piece)
            if sent == self.stall_after:
                injected.hold()
            if sent == self.cut_after:
                raise _Closed
            if sent == self.reset_after:
                raise _Aborted
            if self.bytes_per_s is not None:
                injected.hold(len(piece) / self.bytes_per_s)


def _pieces(chunks: Iterator[bytes], size: int, border: int) -> Iterator[bytes]:
    """Cut into pieces of at most this size, one of which ends at the border."""
    at = 0
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            stop = min(start + size, len(chunk))
            if at < border < at + stop - start:
                stop = start + border - at
            yield chunk[start:stop]
            at, start = at + stop - start, stop


class _Closed(Exception):
    """Close the connection."""


class _Aborted(Exception):
    """Reset the connection."""


class Injected:
    """An active fault: `hits` answers were hit by it, and it holds `held` of them up now."""

    def __init__(self, fault: Fault, hub: Hub) -> None:
        self.fault = fault
        self.hits = 0
        self.held = 0
        self._hub = hub
        self._is_released = False

    def release(self) -> None:
        """Let its answers continue, and hold none up from now on."""
        with self._hub.changed:
            self._is_released = True
            self._hub.changed.notify_all()

    def remove(self) -> None:
        """Deactivate it, and let its answers continue."""
        with self._hub.changed:
            if self in self._hub.faults:
                self._hub.faults.remove(self)
            self.release()

    def takes(self, request: Request, answer: Answer) -> bool:
        """Return whether it hits this answer, and count it."""
        with self._hub.changed:
            takes = self.hits != self.fault.times and self.fault.matches(request, answer)
            self.hits += takes
            return takes

    def hold(self, for_s: float | None = None) -> None:
        """Wait until released; raise if the hub stops meanwhile."""
        hub = self._hub
        with hub.changed:
            self.held += 1
            hub.changed.notify_all()
            hub.changed.wait_for(lambda: self._is_released or not hub.is_running, for_s)
            self.held -= 1
            hub.changed.notify_all()
            if not hub.is_running:
                raise ConnectionAbortedError


class Hub:
    """The two servers, their repositories, and the log of requests; runs as a context manager.

    A token that is not a reader of any repository is refused everywhere, as the Hub does.

    Attributes:
        changed: Notified when something was logged, sent, held up or released.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.faults: list[Injected] = []
        self.is_running = False
        self._bugs: list[BaseException] = []
        self._tokens: set[str] = set()
        self._repos: dict[str, Repo] = {}
        self._on_cdn: dict[str, Blob] = {}
        self._log: list[Request] = []
        self._sent: dict[Request, int] = {}
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.close()

    def start(self) -> None:
        """Listen, on the same ports each time."""
        self.is_running = True
        for server in self._servers:
            server.start()

    def stop(self) -> None:
        """Refuse connections, close open ones, and return when no thread is left.

        The ports stay bound, so that no other program gets them before the next `start`.
        """
        with self.changed:
            was_running, self.is_running = self.is_running, False
            self.changed.notify_all()
        if was_running:
            self._servers = [server.stop() for server in self._servers]
        if self._bugs:
            raise self._bugs.pop()

    def close(self) -> None:
        """Release the ports of a stopped hub."""
        for server in self._servers:
            server.server_close()

    def add(self, repo: Repo) -> Repo:
        self._tokens |= repo.readers
        for name in (repo.name, *repo.aliases):
            self._repos[name.lower()] = repo
        return repo

    def fail(self, fault: Fault | None = None, **about: Any) -> Injected:
        """Activate a fault, such as `fail(stall_after=1000, times=1)`, by the fields of `Fault`."""
        injected = Injected(fault or Fault(**about), self)
        with self.changed:
            self.faults.append(injected)
        return injected

    def clear(self) -> None:
        """Clear the log and remove the faults."""
        with self.changed:
            self._log.clear()
            self._sent.clear()
            for injected in list(self.faults):
                injected.remove()

    @property
    def requests(self) -> list[Request]:
        with self.changed:
            return list(self._log)

    def seen(self, path: str = "", method: str = "", server: str = "") -> list[Request]:
        """Return the requests that have this in their target, in order."""
        return [
            request
            for request in self.requests
            if path in unquote(request.target)
            and method in ("", request.method)
            and server in ("", request.server)
        ]

    def sent(self, path: str = "") -> int:
        """Return how many bytes of files were sent, for targets with this in them."""
        with self.changed:
            return sum(n for request, n in self._sent.items() if path in unquote(request.target))

    def wait_for(self, condition: Callable[[], T]) -> T:
        """Return the first true value of a condition, checked whenever something changed."""
        with self.changed:
            value = self.changed.wait_for(condition, DEADLINE_S)
            assert value, f"not within {DEADLINE_S:g} s; there were {self._log}"
            return value

    def answer(self, request: Request) -> Answer:
        """Log a request and return its answer with the faults that hit it; may block."""
        with self.changed:
            self._log.append(request)
            self.changed.notify_all()
            faults = list(self.faults)
        answer = self._from_cdn(request) if request.server == "cdn" else self._from_hub(request)
        for injected in faults:
            if injected.takes(request, answer):
                answer = injected.fault.apply(answer, injected)
        return answer

    def count(self, request: Request, size: int) -> None:
        with self.changed:
            self._sent[request] = self._sent.get(request, 0) + size
            self.changed.notify_all()

    def note_bug(self, error: BaseException) -> None:
        self._bugs.append(error)

    def _from_cdn(self, request: Request) -> Answer:
        sha256 = request.path.removeprefix("/cdn/")
        blob = self._on_cdn.get(sha256)
        if blob is None or request.query.get("sig") != _signature(sha256):
            return _text(403, "<Error><Code>AccessDenied</Code></Error>", {}, "application/xml")
        # The real CDN's ETag is not the file's sha256 either.
        return _file(request, blob, f"cdn-{sha256[:24]}", {})

    def _from_hub(self, request: Request) -> Answer:
        match = _ROUTE.fullmatch(urlsplit(request.target).path)
        if match is None:
            return _error(404, None, "Sorry, we can't find the page you are looking for.")
        name, kind, revision, file = (unquote(part or "") for part in match.groups())
        repo = self._repos.get(name.lower())
        refusal = self._refusal(repo, request.token, wants_file=kind == "resolve")
        if refusal is not None:
            return refusal
        assert repo is not None
        if name != repo.name:
            return _redirect(307, request.target.replace(match[1], repo.name, 1), {})
        commit = repo.resolve(revision or "main")
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "resolve":
            return self._resolve(request, repo, commit, file)
        return _json(200, _info(repo, commit, "blobs" in request.query), {})

    def _refusal(self, repo: Repo | None, token: str | None, *, wants_file: bool) -> Answer | None:
        if token is not None and token not in self._tokens:
            return _error(401, None, "Invalid credentials in Authorization header")
        is_reader = repo is not None and token in repo.readers
        if repo is None or (repo.private and not is_reader):
            if token is None:
                return _error(401, "RepoNotFound", "Invalid username or password.")
            return _error(404, "RepoNotFound", "Repository not found")
        if not repo.gated or is_reader or not wants_file:
            return None
        restricted = f"Access to model {repo.name} is restricted"
        if token is None:
            excuse = "You must have access to it and be authenticated to access it. Please log in."
            return _error(401, "GatedRepo", f"{restricted}. {excuse}")
        excuse = f"Visit https://huggingface.co/{repo.name} to ask for access."
        return _error(403, "GatedRepo", f"{restricted} and you are not authorized. {excuse}")

    def _resolve(self, request: Request, repo: Repo, commit: str, file: str) -> Answer:
        blob = repo.commits[commit].get(file)
        about = {"X-Repo-Commit": commit}
        if blob is None:
            return _error(404, "EntryNotFound", "Entry not found", commit)
        if not is_lfs(file, blob):
            return _file(request, blob, blob_id(file, blob), about)
        sha256 = blob.sha256
        about |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(blob.size)}
        self._on_cdn[sha256] = blob
        signed = f"sig={_signature(sha256)}&filename={quote(file)}"
        about["ETag"] = about["X-Linked-ETag"]
        return _redirect(302, f"{self.cdn}/cdn/{sha256}?{signed}", about)


def _signature(sha256: str) -> str:
    return hashlib.sha1(f"signed {sha256}".encode()).hexdigest()


def _info(repo: Repo, commit: str, has_metadata: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for name, blob in repo.commits[commit].items():
        sibling: dict[str, Any] = {"rfilename": name}
        if has_metadata and repo.lists_sizes:
            sibling |= {"size": blob.size, "blobId": blob_id(name, blob)}
            if is_lfs(name, blob):
                size = {"size": blob.size, "pointerSize": len(blob.pointer)}
                sibling["lfs"] = {"sha256": blob.sha256, **size}
        siblings.append(sibling)
    access = {"private": repo.private, "gated": "manual" if repo.gated else False}
    names = {"id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0]}
    return {**names, "sha": commit, **access, "tags": ["gguf"], "siblings": siblings}


class _Server(ThreadingHTTPServer):
    """One port: always bound, listening between `start` and `stop`."""

    request_queue_size = 64

    def __init__(self, hub: Hub, name: Literal["hub", "cdn"], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self.hub = hub
        self.name = name
        self._open: dict[socket.socket, threading.Thread] = {}
        self._accepting = threading.Thread(target=self._accept, daemon=True, name=f"fake-{name}")
        self.server_bind()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would look up the host name
        self.server_port = self.server_address[1]

    def start(self) -> None:
        self.server_activate()
        self._accepting.start()

    def stop(self) -> _Server:
        """Stop for good, and return a new one on the same port, not started."""
        if sys.platform == "win32":
            self.socket.close()  # wakes accept
        else:
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes accept(2), with EINVAL
        self._accepting.join(DEADLINE_S)
        threads = dict(self._open)
        for connection in threads:
            with contextlib.suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._accepting, *threads.values()):
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"{thread} does not end"
        self.server_close()
        return _Server(self.hub, self.name, self.server_port)

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self.socket.accept()
            except OSError:
                return
            self._open[connection] = threading.Thread(
                target=self._serve, args=(connection, address), daemon=True, name="fake-connection"
            )
            self._open[connection].start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        self.process_request_thread(connection, address)
        del self._open[connection]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):  # the client went away
            self.hub.note_bug(error)


class _Handler(BaseHTTPRequestHandler):
    """One persistent connection."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(time.monotonic(), self.server.name, self.command, self.path, headers)
        try:
            self._send(request, self.server.hub.answer(request))
        except _Closed:
            self.close_connection = True
        except _Aborted:
            self._reset()

    do_HEAD = do_GET  # noqa: N815

    def _send(self, request: Request, answer: Answer) -> None:
        headers = answer.all_headers()
        if "Content-Length" not in headers:
            headers["Connection"] = "close"
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in answer.body() if self.command == "GET" else ():
            self.wfile.write(chunk)
            if answer.kind == "file":
                self.server.hub.count(request, len(chunk))

    def _reset(self) -> None:
        self.close_connection = True
        while self.server.hub.is_running and self._is_unacknowledged():
            time.sleep(0.0005)  # the kernel has no event for it
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _is_unacknowledged(self) -> bool:
        if sys.platform != "linux":
            return False
        return any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))  # tcp(7), SIOCOUTQ

    def log_message(self, *_: object) -> None:
        """Print nothing."""
