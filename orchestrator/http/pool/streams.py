"""Streams of a pool's events, and of one model's output."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Annotated

from fastapi import Depends, Header
from fastapi.sse import ServerSentEvent

from orchestrator.http.shutdown import Shutdown
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.runtime.answers import LoadProgress

Sent = AsyncGenerator[ServerSentEvent, None]


class Streams:
    """What begins a stream of events, and what is in it.

    Attributes:
        of_all: Gives the stream of all models to a route, and ends it with its answer: the
            framework leaves one that waits to be read.
    """

    def __init__(self, pool: AsyncModelPool, shutdown: Shutdown) -> None:
        self._pool = pool
        self._shutdown = shutdown

        async def of_all(after: int = Depends(self.position)) -> AsyncIterator[Sent]:
            async with contextlib.aclosing(self.events(after)) as stream:
                yield stream

        self.of_all: Callable[..., AsyncIterator[Sent]] = of_all

    async def position(self, last_event_id: Annotated[int | None, Header(ge=0)] = None) -> int:
        """Taken before the answer begins, so that it misses no event after that."""
        newest = self._pool.feed.events.last_id
        if last_event_id is None:
            return newest
        return last_event_id if last_event_id <= newest else 0  # of an earlier pool

    async def events(self, after: int, name: str | None = None) -> Sent:
        """Yield the events after a position, of one model or of all, and progress between them."""
        sent: dict[str, LoadProgress] = {}
        events = self._shutdown.until(self._pool.events(after))
        async with contextlib.aclosing(events) as stream:
            async for event in stream:
                if event is None:
                    for model, step in self._pool.progresses():
                        if name in (None, model) and step != sent.get(model):
                            # it has the id of the event before it, from which one can resume
                            sent[model] = step
                            data = {"model": model, **step.as_dict()}
                            yield ServerSentEvent(id=str(after), event="progress", data=data)
                    continue
                after = event.id
                if name in (None, event.model):
                    yield ServerSentEvent(id=str(after), event=event.kind, data=event.data)
