"""What has been asked below `/v1`: each request is followed, and told when it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Final

from starlette.types import Message, Send

from orchestrator.base import workers
from orchestrator.base.background import Background
from orchestrator.base.log import event_log
from orchestrator.errors import Unavailable
from orchestrator.http.activity.heard import NOTHING, Heard
from orchestrator.http.activity.store import Served, Store
from orchestrator.http.activity.usage import STEP_S, Meter, Moment
from orchestrator.server.memory import available_bytes

FILE: Final = "activity.db"
CLIENT_LEFT: Final = 499  # as nginx has it
_PATH_CHARACTERS: Final = 200
_BETWEEN_S: Final = 0.05  # two writes, so that many requests are one
_READ_S: Final = 5.0
_TOLD_S: Final = 0.5
_EVENT: Final = b"data: {"
_log = event_log("orchestrator.http")


def _lost(count: int) -> None:
    _log("warning", "activity.lost", count=count)


_BEHIND: Final = Background("llama-activity", _lost)


class Activity:
    """The requests of one app. All but `recent` is for its event loop and never blocks.

    Args:
        folder: Returns the private folder of its file, once there is one.
        look: Returns what the models do now.

    Attributes:
        meter: Counts over time.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        look: Callable[[], Mapping[str, Moment]],
    ) -> None:
        self._look = look
        self._store = Store(lambda: folder() / FILE)
        self._ended: deque[Served] = deque()
        self._written_at = 0.0
        self.meter: Meter = Meter(time.time)

    def end(self, served: Served, counted: int) -> None:
        """Take a request that has ended."""
        self.meter.ended(served, counted)
        self._ended.append(served)
        if len(self._ended) == 1:
            wait_s = self._written_at + _BETWEEN_S - time.monotonic()
            if wait_s <= 0:
                self._write()
            else:
                asyncio.get_running_loop().call_later(wait_s, self._write)

    def _write(self) -> None:
        self._written_at = time.monotonic()
        rows = tuple(self._ended)
        self._ended.clear()
        if rows:
            _BEHIND.put(lambda: self._store.write(rows))

    async def recent(self, is_meant: Callable[[Served], bool], limit: int) -> list[Served]:
        """Return the newest requests that are meant, newest first."""
        self._write()
        found: Future[list[Served]] = Future()

        def read() -> None:
            if not found.set_running_or_notify_cancel():  # who asked has given up
                return
            try:
                found.set_result(self._store.read(is_meant, limit))
            except Exception as error:  # noqa: BLE001 (the caller gets it)
                found.set_exception(error)

        _BEHIND.put(read)
        try:
            async with asyncio.timeout(_READ_S):
                return await asyncio.wrap_future(found)
        except TimeoutError:
            message = "the disk does not answer: try again later"
            raise Unavailable.because(message) from None

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Look at the models now and then; at the end everything is written."""
        sampling = asyncio.ensure_future(self._sample())
        try:
            yield
        finally:
            sampling.cancel()
            self._write()
            _BEHIND.put(self._store.close)
            await workers.waited(_BEHIND.flush)

    async def sample(self) -> None:
        """Note what the models do now."""
        free = await workers.waited(available_bytes)
        self.meter.sample(self._look(), None if free is None else free >> 20)

    async def _sample(self) -> None:
        while True:
            try:
                await self.sample()
            except Exception:  # noqa: BLE001 (a plot is worth nothing that this could end)
                _log("exception", "activity.no_sample")
            await asyncio.sleep(STEP_S)


class Asked:
    """One request from its arrival to its end.

    Args:
        activity: What hears of it; None = nothing.
        key: The name of its key.

    Attributes:
        model: The model that it is for, as soon as that is known.
        has_begun: Whether its answer has.
    """

    __slots__ = (
        *("_activity", "_at", "_began", "_counted", "_first_s", "_heard", "_is_stream", "_key"),
        *("_new", "_path", "_status", "_told_at", "_waited_s", "has_begun", "model"),
    )

    def __init__(self, activity: Activity | None, path: str, key: str | None) -> None:
        self._activity = activity
        self._path = path[:_PATH_CHARACTERS]
        self._key = key
        self._at = time.time()
        self._began = time.monotonic()
        self._waited_s = 0.0
        self._first_s: float | None = None
        self._status = CLIENT_LEFT
        self._is_stream = False
        self._counted = self._new = 0
        self._told_at = self._began
        self._heard = Heard()
        self.model: str | None = None
        self.has_begun: bool = False

    def got_server(self, model: str | None) -> float:
        """Note that it waits no longer; return for how many seconds it has."""
        self.model = model
        self._waited_s = time.monotonic() - self._began
        return self._waited_s

    async def send(self, send: Send, message: Message) -> None:
        """Send on a message of the answer, and hear what it says."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            self._status = message["status"]
            self._is_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        elif data := message.get("body"):
            if self._first_s is None:
                self._first_s = time.monotonic() - self._began
            self._heard.feed(data)
            if self._is_stream:
                self._new += data.count(_EVENT)
                if time.monotonic() > self._told_at + _TOLD_S:
                    self._tell()
        await send(message)

    def _tell(self) -> None:
        """Have the tokens counted that have come since the last time: each is an event."""
        self._told_at = time.monotonic()
        if self._activity is not None and self._new:
            self._activity.meter.tokens((self.model, self._key), self._new)
            self._counted += self._new
        self._new = 0

    def client_left(self) -> None:
        """Note that the client went away before the end of the answer."""
        self._status = CLIENT_LEFT

    def end(self) -> None:
        """Tell of it, once."""
        if self._activity is None:
            return
        self._tell()
        tokens = self._heard.tokens() if self._first_s is not None else NOTHING
        self._activity.end(
            Served(
                at=round(self._at, 3),
                model=self.model,
                key=self._key,
                path=self._path,
                status=self._status,
                prompt_tokens=tokens.prompt,
                cached_tokens=tokens.cached,
                completion_tokens=tokens.completion,
                tokens_per_s=None if tokens.per_s is None else round(tokens.per_s, 2),
                wait_s=round(self._waited_s, 4),
                first_byte_s=None if self._first_s is None else round(self._first_s, 4),
                total_s=round(time.monotonic() - self._began, 4),
            ),
            self._counted,
        )
