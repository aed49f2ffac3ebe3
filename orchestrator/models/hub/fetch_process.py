"""The process that fetches (fetcher.py), from its start until it is gone.

What it tells is progress, and any byte it moves or looks at resets the stall clock; a cancel and a
stall end it by a kill. What it says of a failure leaves this module without the token.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Self, cast

from orchestrator.base import launch
from orchestrator.base.log import event_log
from orchestrator.base.redaction import HIDDEN, redact
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
"""How long a killed child is waited for."""

MAX_MESSAGE_BYTES: Final = 1 << 26
"""The longest line that is read from it; a listing of 100,000 files has about 2^24."""

_log = event_log("orchestrator.download")


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


class FetchProcess:
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
        lists: bool = True,
        listing_tries: int | None = None,
    ) -> None:
        self._request = request
        self._token = token
        self._progress = progress
        self._order = {
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
        self._within_s = math.inf
        self._buffer = bytearray()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        python = launch.interpreter()
        if python is None:
            raise HubError.because(
                "to fetch from the Hub needs a Python interpreter, and this program is none: "
                "download the file and give its path",
                field="model_path",
            )
        with contextlib.ExitStack() as stack:
            self._waker = stack.enter_context(contextlib.closing(Waker()))
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._process = launch.popen(
                (python, "-P", str(Path(__file__).with_name("fetcher.py"))),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,
            )
            stack.callback(self._end)
            self._token.on_set(self._waker.wake)
            self._log(self._order)
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
            _log("warning", "download.lingers", pid=self._process.pid)
            threading.Thread(target=self._process.wait, daemon=True).start()

    def listing(self, within_s: float | None) -> dict[str, Any]:
        """Return what the Hub says is in the repo.

        Args:
            within_s: How long that may take in all; None = as long as the stall clock allows.
        """
        for message in self._messages(within_s):
            if "listing" in message:
                self._moved_at = time.monotonic()
                found = message["listing"]
                if not isinstance(found, dict):
                    raise _not_understood("a listing that is none")
                return found
        raise self._ended()

    def check(self, order: dict[str, Any], within_s: float | None) -> None:
        """Have it said whether what is missing of the files may be had, and has room.

        Raises:
            HubError, ModelNotFound, DiskFull: it cannot be fetched.
        """
        self._log({**order, "only_check": True})
        for message in self._messages(within_s):
            if message.get("done") is True:
                return
        raise self._ended()

    def fetch(self, order: dict[str, Any], verified: Callable[[str], None]) -> None:
        """Have the files fetched and hashed; returns when all are whole."""
        sizes = {file["name"]: file["size"] for file in order["files"]}
        self._progress.bytes_total = sum(sizes.values())
        self._progress.files = {name: (0, size) for name, size in sizes.items()}
        self._log(order)
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
        self._within_s = math.inf if within_s is None else within_s
        ends_at = time.monotonic() + self._within_s
        while True:
            for message in self._lines():
                try:
                    failure = self._failure_in(message)
                    self._note(message)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise _not_understood(f"{type(error).__name__}: {error}") from error
                if failure is not None:
                    raise failure.error()
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
        self._take(data)
        return bool(data)

    def _take(self, data: bytes) -> None:
        self._buffer += data

    def _too_late(self, *, is_stalled: bool) -> OrchestratorError:
        why = f" ({self._progress.note})" if self._progress.note else ""
        if not is_stalled:
            return HubUnreachable.because(
                f"the Hub did not answer within {self._within_s:g} s{why}"
            )
        message = (
            f"nothing arrived from the Hub for {self._request.stall_timeout_s:g} s{why}; what is "
            "there is kept, and another load goes on from there"
        )
        return Stalled.because(message, field="stall_timeout_s", reason="download")

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Yield what is a message; what a library of its own prints is passed over."""
        end = self._buffer.rfind(b"\n") + 1
        lines = bytes(self._buffer[:end]).splitlines()
        del self._buffer[:end]
        if len(self._buffer) > MAX_MESSAGE_BYTES:
            raise _not_understood(f"a line without end, of {len(self._buffer)} bytes so far")
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

    def _failure_in(self, message: dict[str, Any]) -> Problem | None:
        failure = message.get("error")
        if failure is None:
            return None
        text = self._without_token(failure["message"])
        return Problem(**{**failure, "message": text})

    def _note(self, message: dict[str, Any]) -> None:
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
            if message["seen"] != self._seen:  # a byte was received, or looked at
                self._seen = message["seen"]
                self._moved_at = time.monotonic()
        progress.on_change()

    def _log(self, members: dict[str, Any]) -> None:
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


def _not_understood(what: str) -> HubError:
    return HubError.because(f"the process that downloads says what nobody understands: {what}")
