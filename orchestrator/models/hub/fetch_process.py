"""The child process that talks to the Hub (fetcher.py), from its start until it is reaped.

Every byte that it receives or hashes resets the stall clock; a cancel or a stall kills it. The
token is removed from whatever it prints.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Self, cast

from orchestrator.base import launch, threads
from orchestrator.base.log import event_log
from orchestrator.base.redaction import HIDDEN, redact
from orchestrator.base.threads import NoThread
from orchestrator.base.tokens import CancelToken
from orchestrator.base.waker import Waker
from orchestrator.errors import (
    Cancelled,
    HubError,
    HubUnreachable,
    OrchestratorError,
    Problem,
    Stalled,
)
from orchestrator.models.hub import cache
from orchestrator.settings.request import LoadRequest

REAP_S: Final = 0.3
MAX_MESSAGE_BYTES: Final = 1 << 26  # a listing of 100,000 files has about 2^24

_log = event_log("orchestrator.download")


@dataclass(slots=True)
class FetchProgress:
    """How much of a model is on disk, for display."""

    bytes_done: int = 0  # never decreases
    bytes_total: int | None = None
    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # bytes done and in all
    note: str | None = None  # what the download waits for
    on_change: Callable[[], None] = lambda: None


class FetchProcess:
    """One child process, as a context manager: killed and reaped when the block ends."""

    def __init__(
        self,
        request: LoadRequest,
        repo: str,
        token: CancelToken,
        progress: FetchProgress,
        *,
        is_offline: bool = False,  # hash what is in the cache, and send no request
        lists: bool = True,  # request the list of files at once, for `listing`
        listing_tries: int | None = None,
    ) -> None:
        self._request = request
        self._token = token
        self._progress = progress
        self._setup = {
            "path": launch.import_path(),
            "repo": repo,
            "revision": request.revision,
            "token": request.hf_token,
            "cache_dir": str(cache.directory()),
            "stall_timeout_s": request.stall_timeout_s,
            "offline": is_offline,
            "lists": lists,
            "listing_tries": listing_tries,
        }
        self._moved_at = time.monotonic()
        self._seen = 0
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        try:
            command = launch.program(Path(__file__).with_name("fetcher.py"))
        except launch.NoInterpreter as error:
            raise HubError.because(
                f"a download from the Hub needs a Python interpreter, and {error}: download the "
                "file yourself and give its path",
                field="model_path",
            ) from error
        with contextlib.ExitStack() as stack:
            self._waker = stack.enter_context(contextlib.closing(Waker()))
            self._errors = stack.enter_context(launch.output_file())
            self._process = launch.popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,
            )
            stack.callback(self._kill)
            self._token.on_set(self._waker.wake)
            self._send(self._setup)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _kill(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(REAP_S)
        except subprocess.TimeoutExpired:  # the kernel keeps it until its fsync is done
            _log("warning", "download.lingers", pid=self._process.pid)
            with contextlib.suppress(NoThread):  # it stays a zombie
                threads.start(threading.Thread(target=self._process.wait, daemon=True))

    def listing(self, within_s: float | None) -> dict[str, Any]:
        """Return the files of the repo, as the Hub lists them."""
        found = self._receive("listing", within_s)
        self._moved_at = time.monotonic()
        if not isinstance(found, dict):
            raise _not_understood("a listing that is not an object")
        return found

    def about(self, files: dict[str, Any], within_s: float | None) -> dict[str, Any]:
        """Return size and etag of files for which the listing has none."""
        self._send(files)
        return dict(self._receive("files", within_s))

    def check(self, job: dict[str, Any], within_s: float | None) -> None:
        """Check access to the files that are missing, and disk space for them."""
        self._send({**job, "only_check": True})
        self._receive("finished", within_s)

    def fetch(self, job: dict[str, Any], verified: Callable[[str], None]) -> None:
        """Fetch and hash files; return when all are whole. `verified` is called with each name."""
        sizes = {file["name"]: file["size"] for file in job["files"]}
        self._progress.bytes_total = sum(sizes.values())
        self._progress.files = {name: (0, size) for name, size in sizes.items()}
        self._send(job)
        self._receive("finished", None, verified)

    def _send(self, members: dict[str, Any]) -> None:
        stdin = cast("BinaryIO", self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it has exited; its error is still to be read
            stdin.write(json.dumps(members).encode() + b"\n")
            stdin.flush()

    def _receive(
        self, member: str, within_s: float | None, verified: Callable[[str], None] | None = None
    ) -> Any:
        """Return this member of the first message that has it; record progress until then."""
        self._within_s = math.inf if within_s is None else within_s
        ends_at = time.monotonic() + self._within_s
        while True:
            for message in self._messages():
                try:
                    if (failure := message.get("error")) is not None:
                        text = self._without_token(failure["message"])
                        failure = Problem(**{**failure, "message": text}).error()
                    self._record_progress(message)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    what = f"a malformed message ({type(error).__name__}: {error})"
                    raise _not_understood(what) from error
                if failure is not None:
                    raise failure
                if verified is not None and "verified" in message:
                    verified(message["verified"])
                if member in message:
                    return message[member]
            if not self._wait(ends_at):
                raise self._exited()

    def _wait(self, ends_at: float) -> bool:
        """Wait for output; False at its end."""
        stdout = cast("BinaryIO", self._process.stdout)
        stalls_at = self._moved_at + self._request.stall_timeout_s
        left_s = max(0.0, min(stalls_at, ends_at) - time.monotonic())
        woken, is_readable = self._waker.wait(left_s, stdout)
        if self._token.is_set():
            raise Cancelled.because("the download was cancelled")
        if is_readable:
            data = os.read(stdout.fileno(), 1 << 16)
            self._buffer += data
            return bool(data)
        if woken:
            return True
        note = f" ({self._progress.note})" if self._progress.note else ""
        if ends_at <= stalls_at:
            message = f"the Hub did not answer within {self._within_s:g} s{note}: try again later"
            raise HubUnreachable.because(message)
        message = (
            f"no data arrived from the Hub for {self._request.stall_timeout_s:g} s{note}: load it "
            "again to continue the download"
        )
        raise Stalled.because(message, field="stall_timeout_s", reason="download")

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Yield complete messages; lines that a library printed are only logged."""
        end = self._buffer.rfind(b"\n") + 1
        lines = bytes(self._buffer[:end]).splitlines()
        del self._buffer[:end]
        if len(self._buffer) > MAX_MESSAGE_BYTES:
            raise _not_understood(f"a line of more than {len(self._buffer)} bytes")
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if isinstance(message, dict):
                yield message
            else:
                shown = self._without_token(line[:200].decode("utf-8", "replace"))
                _log("warning", "download.noise", line=shown)

    def _record_progress(self, message: dict[str, Any]) -> None:
        progress = self._progress
        waiting = message.get("waiting")
        note = None if waiting is None else self._without_token(waiting)
        if note is not None and note != progress.note:
            _log("info", "download.waiting", reason=note)
        progress.note = note
        if "file" in message:
            name = message["file"]
            progress.files[name] = (message["done"], progress.files[name][1])
            progress.bytes_done = max(progress.bytes_done, message["all"])
            if message["seen"] != self._seen:  # bytes were received or hashed
                self._seen = message["seen"]
                self._moved_at = time.monotonic()
        progress.on_change()

    def _without_token(self, text: str) -> str:
        secret = self._request.hf_token
        return redact(text.replace(secret, HIDDEN) if secret else text)

    def _exited(self) -> OrchestratorError:
        """Return the error of a child that exited without an answer: stderr may say why."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_S)
        self._errors.seek(0)
        text = self._without_token(self._errors.read()[-4000:].decode("utf-8", "replace"))
        lines = text.splitlines() or ["it printed nothing"]
        message = f"the download process exited with {self._process.returncode}: {lines[-1]}"
        return HubError.because(message, log_tail=tuple(lines[-20:]))


def _not_understood(what: str) -> HubError:
    return HubError.because(f"the download process sent {what}: load it again")
