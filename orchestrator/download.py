"""Hub models: what of one is in the cache, and the rest of it, fetched.

The choice of files is made here; the Hub is spoken to by a child process (fetcher.py), so that a
cancel is a kill, in any phase and whatever it hangs in. Nothing is believed to be whole that was
not hashed once: what has been is written down, by size, time and inode.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Self, cast

import structlog

from orchestrator import forks, gguf_file, hub_cache, variants
from orchestrator.errors import (
    CacheDirError,
    Cancelled,
    HubCorrupt,
    HubError,
    HubUnreachable,
    InvalidModel,
    InvalidRequest,
    ModelNotFound,
    OrchestratorError,
    Problem,
    Stalled,
)
from orchestrator.hub_cache import CachedRepo
from orchestrator.models import identity_of
from orchestrator.redaction import HIDDEN, redact
from orchestrator.request import FileIdentity, HubModel, LoadRequest, ModelFiles
from orchestrator.tokens import CancelToken
from orchestrator.waker import Waker

FRESHNESS_S: Final = 2.0
"""How long the Hub may take to say that a cached revision is the newest."""

REAP_S: Final = 0.3
"""How long a killed child is waited for."""

_MAX_BYTES: Final = 1 << 50
_FALLS_BACK: Final = frozenset({"hub_unreachable", "hub_rate_limited", "hub_error"})
_log = structlog.get_logger("orchestrator.download")


@dataclass(slots=True)
class FetchProgress:
    """Bytes on disk of the model, for display; bytes never decrease.

    Attributes:
        files: Bytes on disk and in all, of every file, by name.
        note: What it waits for, if it waits.
    """

    bytes_done: int = 0
    bytes_total: int | None = None
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    note: str | None = None
    on_change: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files of one commit that make a model."""

    repo: CachedRepo
    commit: str
    chosen: variants.Chosen
    listed: Mapping[str, tuple[int, str]]  # name -> size and etag; empty if nobody wrote it down

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.chosen.weights, *filter(None, (self.chosen.projector,)))

    def size_and_etag(self, name: str) -> tuple[int, str]:
        return self.listed.get(name) or self.repo.size_and_etag(self.commit, name)


class Hub:
    """The Hub as one orchestrator sees it.

    Args:
        records: Folder of our own, for listings and for what was hashed.
    """

    def __init__(self, records: Path) -> None:
        self._records = records

    # ----------------------------------------------------------------------- without the network

    def look_up(self, request: LoadRequest) -> ModelFiles:
        """Return the model as the cache has it; one that is not whole there has no weights.

        Raises:
            InvalidRequest: the request contradicts itself (field `gguf_variant` or `revision`).
        """
        repo, variant = _reference(request)
        wanted = self._cached(repo, variant, request)
        if wanted is not None and (files := _on_disk(wanted, request)) is not None:
            return files
        return ModelFiles((), None, variant, HubModel(repo, request.revision))

    def _cached(self, repo: str, variant: str | None, request: LoadRequest) -> Wanted | None:
        """Return what would be used of what is known: by the listing of the commit if there is
        one, else by the files another tool has put there.
        """
        cached = hub_cache.find(repo)
        commit = cached.commit(request.revision) if cached else None
        if cached is None or commit is None:
            return None
        listed = self._listing(repo, commit)
        names = listed or dict.fromkeys(cached.names(commit))
        with contextlib.suppress(ModelNotFound):
            return Wanted(cached, commit, _choose(names, variant, request), listed)
        return None

    # ---------------------------------------------------------------------------- with the network

    def fetch(
        self, request: LoadRequest, token: CancelToken, progress: FetchProgress
    ) -> ModelFiles:
        """Make the model whole on disk, and return it. Blocks; ends early when the token is set.

        A whole cached revision is used without any network when it is pinned or offline, and when
        the Hub cannot be asked; its note says so.

        Raises:
            Cancelled: the token was set.
            ModelNotFound, HubError, DiskFull, Stalled: see `orchestrator.errors`.
        """
        if token.is_set():
            raise Cancelled.because("the download was cancelled")
        repo, variant = _reference(request)
        known = self._cached(repo, variant, request)
        files = _on_disk(known, request) if known else None
        if known and files and _needs_no_hub(known, request, variant):
            try:
                return self._verified(known, files, request, token, progress)
            except HubCorrupt:
                if hub_cache.is_offline():
                    raise
                files = None  # set aside, and fetched once more
        if hub_cache.is_offline():
            raise _not_cached(repo, variant, request)
        try:
            return self._fetched(request, token, progress, is_patient=files is None)
        except OrchestratorError as error:
            if not files or not known or error.problem.category not in _FALLS_BACK:
                raise
            _log.warning("hub.fell_back", repo=repo, reason=error.message)
            note = f"the cached revision is used: {error.message}"
            found = self._verified(known, files, request, token, progress)
            return replace(found, hub=found.hub and replace(found.hub, note=note))

    def _fetched(
        self,
        request: LoadRequest,
        token: CancelToken,
        progress: FetchProgress,
        *,
        is_patient: bool,
    ) -> ModelFiles:
        repo, variant = _reference(request)
        tries = None if is_patient else 1
        with _Fetcher(request, repo, token, progress, listing_tries=tries) as fetcher:
            listing = fetcher.listing(None if is_patient else FRESHNESS_S)
            wanted = self._of_listing(listing, repo, variant, request)
            fetcher.fetch(self._order(wanted, request), self._note_verified(wanted))
        found = _identities(wanted)
        if found is None:
            message = f"{repo} was fetched and is gone: does another program clean the cache?"
            raise CacheDirError.because(message, field="model_path")
        return _model(wanted, found, request)

    def _verified(
        self,
        wanted: Wanted,
        files: ModelFiles,
        request: LoadRequest,
        token: CancelToken,
        progress: FetchProgress,
    ) -> ModelFiles:
        """Return files of the cache, hashed once; what other tools fetched nobody has hashed."""
        order = self._order(wanted, request)
        if any(file["verify"] for file in order["files"]):
            with _Fetcher(request, wanted.repo.repo, token, progress, is_offline=True) as fetcher:
                fetcher.fetch(order, self._note_verified(wanted))
        progress.bytes_done = progress.bytes_total = files.size_bytes
        return files

    def _of_listing(
        self, listing: dict[str, Any], repo: str, variant: str | None, request: LoadRequest
    ) -> Wanted:
        """Believe nothing of a listing that could lead out of the cache."""
        commit, name = listing["commit"], str(listing["repo"])
        if not hub_cache.is_commit(commit):
            raise HubUnreachable.because("the Hub's answer makes no sense (no commit): try again")
        listed = {
            name: (size, etag)
            for name, (size, etag) in listing["files"].items()
            if hub_cache.is_file_name(name)
            and hub_cache.is_etag(etag)
            and isinstance(size, int)
            and 0 <= size < _MAX_BYTES
        }
        if (cached := hub_cache.find(repo)) is None:
            cached = hub_cache.place(name if name.lower() == repo.lower() else repo)
        chosen = _choose(listed, variant, request)
        self._write(self._listing_file(repo, commit), {"files": listed})
        return Wanted(cached, commit, chosen, listed)

    def _order(self, wanted: Wanted, request: LoadRequest) -> dict[str, Any]:
        """Say what to fetch: what has not been hashed by anybody yet is to be verified."""
        files = []
        for name in wanted.names:
            size, etag = wanted.size_and_etag(name)
            paths = wanted.repo.path(wanted.commit, name), wanted.repo.blob(etag)
            known = any(self._is_verified(path, etag) for path in paths)
            files.append({"name": name, "size": size, "etag": etag, "verify": not known})
        return {
            "repo": wanted.repo.repo,
            "root": str(wanted.repo.root),
            "commit": wanted.commit,
            "revision": None
            if hub_cache.is_commit(request.revision)
            else request.revision or "main",
            "files": files,
        }

    # ------------------------------------------------------------------------------ our own notes

    def _listing_file(self, repo: str, commit: str) -> Path:
        return self._records / f"{_key(repo.lower(), commit)}.json"

    def _listing(self, repo: str, commit: str) -> dict[str, tuple[int, str]]:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            text = self._listing_file(repo, commit).read_text(encoding="utf-8")
            files = json.loads(text)["files"]
            return {str(name): (int(size), str(etag)) for name, (size, etag) in files.items()}
        return {}

    def _is_verified(self, path: Path, etag: str) -> bool:
        mark = self._mark(path, etag)
        return mark is not None and mark.exists()

    def _note_verified(self, wanted: Wanted) -> Callable[[str], None]:
        def note(name: str) -> None:
            path = wanted.repo.path(wanted.commit, name)
            _, etag = wanted.size_and_etag(name)
            if (mark := self._mark(path, etag)) is not None:
                self._write(mark, {"name": name})

        return note

    def _mark(self, path: Path, etag: str) -> Path | None:
        """Return the note that says that this very file was hashed."""
        with contextlib.suppress(OSError):
            at = path.stat()
            key = _key(etag, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns)
            return self._records / f"{key}.hashed"
        return None

    def _write(self, path: Path, members: dict[str, Any]) -> None:
        """Write a note; without it, the next time takes longer."""
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(members), encoding="utf-8")
            os.replace(temporary, path)


class _Fetcher:
    """One child process at work, from its start until it is gone.

    What it tells is progress; a cancel and a stall end it by a kill.
    """

    def __init__(
        self,
        request: LoadRequest,
        repo: str,
        token: CancelToken,
        progress: FetchProgress,
        *,
        is_offline: bool = False,
        listing_tries: int | None = None,
    ) -> None:
        self._request = request
        self._token = token
        self._progress = progress
        self._order = {
            "repo": repo,
            "revision": request.revision,
            "token": request.hf_token,
            "cache_dir": str(hub_cache.directory()),
            "stall_timeout_s": request.stall_timeout_s,
            "offline": is_offline,
            "listing_tries": listing_tries,
        }
        self._moved_at = time.monotonic()
        self._seen = 0
        self._buffer = bytearray()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        python = forks.interpreter()
        if python is None:
            raise HubError.because(
                "to fetch from the Hub needs a Python interpreter, and this program is none: "
                "download the file and give its path",
                field="model_path",
            )
        with contextlib.ExitStack() as stack:
            self._waker = stack.enter_context(contextlib.closing(Waker()))
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._process = forks.popen(
                (python, "-P", str(Path(__file__).with_name("fetcher.py"))),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,
            )
            stack.callback(self._end)
            self._token.on_set(self._waker.wake)
            self._say(self._order)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        """Gone means gone: killed, reaped, and nothing of it left behind.

        A kernel may keep it until what it syncs is on the disk; nobody has to wait for that.
        """
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(REAP_S)
        except subprocess.TimeoutExpired:
            _log.warning("download.lingers", pid=self._process.pid)
            threading.Thread(target=self._process.wait, daemon=True).start()

    def listing(self, within_s: float | None) -> dict[str, Any]:
        """Return what the Hub says is in the repo.

        Args:
            within_s: How long that may take in all; None = as long as the stall clock allows.
        """
        for message in self._messages(within_s):
            if "listing" in message:
                self._moved_at = time.monotonic()
                found: dict[str, Any] = message["listing"]
                return found
        raise self._ended()

    def fetch(self, order: dict[str, Any], verified: Callable[[str], None]) -> None:
        """Have the files fetched and hashed; returns when all are whole."""
        sizes = {file["name"]: file["size"] for file in order["files"]}
        self._progress.bytes_total = sum(sizes.values())
        self._progress.files = {name: (0, size) for name, size in sizes.items()}
        self._say(order)
        for message in self._messages(None):
            if "verified" in message:
                verified(message["verified"])
            elif message.get("done") is True:
                return
        raise self._ended()

    def _messages(self, within_s: float | None) -> Iterator[dict[str, Any]]:
        """Yield what it tells; progress is taken note of on the way.

        Raises:
            Cancelled, Stalled, HubUnreachable: it was ended.
            OrchestratorError: it has given up, and says why.
        """
        ends_at = math.inf if within_s is None else time.monotonic() + within_s
        while True:
            for message in self._lines():
                if (failure := message.get("error")) is not None:
                    text = self._without_token(failure["message"])
                    raise Problem(**{**failure, "message": text}).error()
                self._note(message)
                yield message
            if not self._wait(ends_at):
                return

    def _wait(self, ends_at: float) -> bool:
        """Wait for more; False when there will be none."""
        stdout = cast("BinaryIO", self._process.stdout)
        stalls_at = self._moved_at + self._request.stall_timeout_s
        left_s = max(0.0, min(stalls_at, ends_at) - time.monotonic())
        woken, is_ready = self._waker.wait(left_s, stdout)
        if self._token.is_set():
            raise Cancelled.because("the download was cancelled")
        if not is_ready:
            if not woken:
                raise self._too_late(is_stalled=stalls_at < ends_at)
            return True
        data = os.read(stdout.fileno(), 1 << 16)
        self._buffer += data
        return bool(data)

    def _too_late(self, *, is_stalled: bool) -> OrchestratorError:
        why = f" ({self._progress.note})" if self._progress.note else ""
        if not is_stalled:
            return HubUnreachable.because(f"the Hub did not answer within {FRESHNESS_S:g} s{why}")
        message = (
            f"nothing arrived from the Hub for {self._request.stall_timeout_s:g} s{why}; what is "
            "there is kept, and another load goes on from there"
        )
        return Stalled.because(message, field="stall_timeout_s", reason="download")

    def _lines(self) -> Iterator[dict[str, Any]]:
        end = self._buffer.rfind(b"\n") + 1
        lines = bytes(self._buffer[:end]).splitlines()
        del self._buffer[:end]
        for line in lines:
            yield json.loads(line)

    def _note(self, message: dict[str, Any]) -> None:
        progress = self._progress
        waiting = message.get("waiting")
        note = None if waiting is None else self._without_token(waiting)
        if note is not None and note != progress.note:
            _log.info("download.waiting", reason=note)
        progress.note = note
        if "file" in message:
            name = message["file"]
            progress.files[name] = (message["done"], progress.files[name][1])
            progress.bytes_done = max(progress.bytes_done, message["all"])
            if message["seen"] != self._seen:  # a byte was received, or looked at
                self._seen = message["seen"]
                self._moved_at = time.monotonic()
        progress.on_change()

    def _say(self, members: dict[str, Any]) -> None:
        stdin = cast("BinaryIO", self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it has ended; its last words come
            stdin.write(json.dumps(members).encode() + b"\n")
            stdin.flush()

    def _without_token(self, text: str) -> str:
        secret = self._request.hf_token
        return redact(text.replace(secret, HIDDEN) if secret else text)

    def _ended(self) -> OrchestratorError:
        """It ended without saying why: its own errors may."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_S)
        self._errors.seek(0)
        text = self._without_token(self._errors.read()[-4000:].decode("utf-8", "replace"))
        lines = text.splitlines() or ["it printed nothing"]
        message = f"the download ended by itself ({self._process.returncode}): {lines[-1]}"
        return HubError.because(message, log_tail=tuple(lines[-20:]))


# ---------------------------------------------------------------------------------------- helpers


def is_hub(model_path: str) -> bool:
    """Could this be a repo on the Hub?"""
    return variants.split_reference(model_path) is not None


def _reference(request: LoadRequest) -> tuple[str, str | None]:
    """Return the repo and the variant that was asked for.

    Raises:
        InvalidRequest: two different variants, or a revision that cannot be one.
    """
    repo, variant = variants.split_reference(request.model_path) or (request.model_path, None)
    given = request.gguf_variant
    if variant is not None and given is not None and variant.lower() != given.lower():
        raise InvalidRequest.because(
            f"gguf_variant is {given!r}, and model_path says {variant!r}: give one of them",
            field="gguf_variant",
        )
    if request.revision is not None and not hub_cache.is_revision(request.revision):
        raise InvalidRequest.because(
            "revision is no branch, tag or commit of the Hub: check it", field="revision"
        )
    return repo, variant or given


def _choose(
    names: Mapping[str, object], variant: str | None, request: LoadRequest
) -> variants.Chosen:
    where, _ = _reference(request)
    chosen = variants.choose(names, variant, where=where)
    return replace(chosen, projector=None) if request.mmproj_path is not None else chosen


def _needs_no_hub(wanted: Wanted, request: LoadRequest, variant: str | None) -> bool:
    """A commit never changes; but which variant is meant, a part of one cannot tell."""
    is_settled = bool(wanted.listed) or variant is not None
    return hub_cache.is_offline() or (hub_cache.is_commit(request.revision) and is_settled)


def _not_cached(repo: str, variant: str | None, request: LoadRequest) -> HubUnreachable:
    cached = hub_cache.find(repo)
    commit = cached.commit(request.revision) if cached else None
    names = sorted(cached.names(commit)) if cached and commit else []
    found = ", ".join(name for name in names if name.endswith(".gguf"))[:1000] or "nothing"
    return HubUnreachable.because(
        f"{variant or 'the preferred variant'} of {repo} at {request.revision or 'main'} is not "
        f"whole in the cache, which has {found}; HF_HUB_OFFLINE is set: unset it, or name what is "
        "there",
        field="model_path",
        reason="offline",
    )


def _on_disk(wanted: Wanted, request: LoadRequest) -> ModelFiles | None:
    """Return the model if every file is there, of the right size and a whole GGUF by its header."""
    found = _identities(wanted)
    with contextlib.suppress(InvalidModel):
        return None if found is None else _model(wanted, found, request)
    return None


def _identities(wanted: Wanted) -> list[FileIdentity] | None:
    found: list[FileIdentity] = []
    for name in wanted.names:
        file = _identity(wanted.repo.path(wanted.commit, name))
        if file is None or file.size_bytes != wanted.size_and_etag(name)[0]:
            return None
        found.append(file)
    return found


def _model(wanted: Wanted, found: list[FileIdentity], request: LoadRequest) -> ModelFiles:
    """Raises InvalidModel: what the Hub has is not a GGUF."""
    for file in found:
        gguf_file.inspect(file, "model_path")
    weights, projector = found[: len(wanted.chosen.weights)], found[len(wanted.chosen.weights) :]
    hub = HubModel(wanted.repo.repo, request.revision, wanted.commit)
    return ModelFiles(tuple(weights), next(iter(projector), None), wanted.chosen.variant, hub)


def _identity(path: Path) -> FileIdentity | None:
    """Under its own name: llama.cpp finds the parts of a split model by the name of the first."""
    with contextlib.suppress(OSError):
        return replace(identity_of(path), path=os.path.abspath(path))
    return None


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
