"""What the remote facades have in common: where their requests go, and the methods that only read.

Requests wait on threads, so one client of the standard library serves facades of both kinds. A
caller that goes away closes its connection, which withdraws it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, TypeVar

from orchestrator.base import workers
from orchestrator.base.addresses import is_loopback
from orchestrator.runtime.answers import LoadProgress, PastLoad, Status
from orchestrator.runtime.asks import Ask, events_of, past_loads, quick, strings_in
from orchestrator.runtime.events import Event
from orchestrator.runtime.service import Exchange, Json, Lines, Service
from orchestrator.server.output import MAX_LINES

_T = TypeVar("_T")
MAX_LOADS: Final = 256
_PATHS: Final = ("model_path", "mmproj_path")
STATUS: Final = quick("/status", Status.from_dict)


class Connection:
    """A service, and the path below which the routes of one facade are."""

    def __init__(self, service: Service, prefix: str) -> None:
        self.service: Service = service
        self.prefix: str = prefix

    def below(self, path: str) -> Connection:
        """Return the connection for what is below a path."""
        return Connection(self.service, self.prefix + path)

    def now(self, ask: Ask[_T]) -> _T:
        """Send a request and block for its answer."""
        return self._exchange(ask).json(ask.parse)

    async def answer(self, ask: Ask[_T]) -> _T:
        """Send a request and wait for its answer."""
        exchange = self._exchange(ask)
        try:
            return await workers.waited(partial(exchange.json, ask.parse))
        finally:
            exchange.abort()  # the thread of a cancelled call still waits

    def events(
        self, after: int | None, *, has_progress: bool = False
    ) -> Generator[Event, None, None]:
        """Iterate over the events from now on, or after that with an id."""
        lines = self._events(after).open()
        return events_of(self.service, lines, has_progress=has_progress)

    def events_async(
        self, after: int | None, *, has_progress: bool = False
    ) -> AsyncGenerator[Event, None]:
        """As `events`, for asyncio; the request is sent at once."""
        exchange = self._events(after)
        return self._follow(exchange, workers.shared().submit(exchange.open), has_progress)

    async def _follow(
        self, exchange: Exchange, opening: Future[Lines], has_progress: bool
    ) -> AsyncGenerator[Event, None]:
        async with _opened(exchange, opening) as lines:
            events = events_of(self.service, lines, has_progress=has_progress)
            while (event := await workers.waited(partial(next, events, None))) is not None:
                yield event

    def followed_logs(self, lines: int) -> Lines:
        """Iterate over the last lines of output and those to come."""
        return self._logs(lines).open()

    async def followed_logs_async(self, lines: int) -> AsyncGenerator[str, None]:
        """As `followed_logs`, for asyncio."""
        async with _opened(self._logs(lines)) as output:
            while (line := await workers.waited(partial(next, output, None))) is not None:
                yield line

    @contextlib.contextmanager
    def changes(self) -> Generator[Callable[[], object], None, None]:
        """Yield a function that blocks until something has happened."""
        with contextlib.closing(self._events(None).open()) as lines:
            yield partial(next, lines)

    @contextlib.asynccontextmanager
    async def changes_async(self) -> AsyncIterator[Callable[[], object]]:
        """As `changes`, without blocking the event loop until the first one."""
        async with _opened(self._events(None)) as lines:
            yield partial(next, lines)

    def from_here(self, path: str) -> str:
        """Make the path of an existing file absolute: a service on this machine may run in another
        folder.
        """
        is_here = is_loopback(self.service.base.hostname or "")
        return os.path.abspath(path) if is_here and os.path.exists(path) else path

    def located(self, fields: Mapping[str, Any]) -> Json:
        """Return the fields of a load with paths as `from_here` makes them."""
        paths = {name: fields[name] for name in _PATHS if fields.get(name) is not None}
        return {**fields, **{name: self.from_here(os.fspath(one)) for name, one in paths.items()}}

    def _exchange(self, ask: Ask[_T]) -> Exchange:
        path = self.prefix + ask.path
        return Exchange(self.service, ask.method, path, ask.body, timeout_s=ask.timeout_s)

    def _events(self, after: int | None) -> Exchange:
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        return Exchange(self.service, "GET", f"{self.prefix}/events", headers=headers)

    def _logs(self, lines: int) -> Exchange:
        shown = min(max(1, lines), MAX_LINES)
        return Exchange(self.service, "GET", f"{self.prefix}/logs?follow=true&lines={shown}")


class Connected:
    """A facade on a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def url(self) -> str:
        """The URL of the service."""
        return self._connection.service.url

    @property
    def api_key(self) -> str | None:
        """The key that is sent with every request."""
        return self._connection.service.api_key


class RemoteSlot(Connected):
    """What is read of one slot."""

    def status(self) -> Status:
        """Return the present state; see `Orchestrator.status`."""
        return self._connection.now(STATUS)

    def progress(self) -> LoadProgress:
        """Return the phase and the bytes of the load in flight; see `Orchestrator.progress`."""
        return self._connection.now(quick("/load-progress", LoadProgress.from_dict))

    def logs(self, lines: int = 200) -> tuple[str, ...]:
        """Return the last lines of output of the server, oldest first."""
        if lines < 1:
            return ()
        ask = quick(f"/logs?lines={min(lines, MAX_LINES)}", strings_in("lines"))
        return self._connection.now(ask)

    def history(self, limit: int = 20) -> list[PastLoad]:
        """Return the last loads, newest first."""
        if limit < 1:
            return []
        ask = quick(f"/loads?limit={min(limit, MAX_LOADS)}", past_loads)
        return self._connection.now(ask)


@contextlib.asynccontextmanager
async def _opened(exchange: Exchange, opening: Future[Lines] | None = None) -> AsyncIterator[Lines]:
    try:
        yield await asyncio.wrap_future(opening or workers.shared().submit(exchange.open))
    finally:
        exchange.abort()
