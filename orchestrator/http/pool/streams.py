"""Streams of a pool's events, and of one model's output."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Annotated

from fastapi import Depends, Header
from fastapi.sse import ServerSentEvent

from orchestrator.http.pool.visible import Eyes, Visible
from orchestrator.http.shutdown import Shutdown
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.runtime.answers import LoadProgress

Sent = AsyncGenerator[ServerSentEvent, None]


class Streams:
    """What begins a stream of events, and what is in it. It ends when its key is withdrawn.

    Attributes:
        of_all: Gives the stream of all models to a route, and ends it with its answer: the
            framework leaves one that waits to be read.
    """

    def __init__(self, pool: AsyncModelPool, eyes: Eyes, shutdown: Shutdown) -> None:
        self._pool = pool
        self._shutdown = shutdown

        viewed = Depends(eyes.seen)

        async def of_all(
            after: int = Depends(self.position), seen: Visible = viewed
        ) -> AsyncIterator[Sent]:
            async with contextlib.aclosing(self.events(after, seen)) as stream:
                yield stream

        self.of_all: Callable[..., AsyncIterator[Sent]] = of_all

    async def position(self, last_event_id: Annotated[int | None, Header(ge=0)] = None) -> int:
        """Taken before the answer begins, so that it misses no event after that."""
        newest = self._pool.feed.events.last_id
        if last_event_id is None:
            return newest
        return last_event_id if last_event_id <= newest else 0  # of an earlier pool

    async def events(self, after: int, seen: Visible, name: str | None = None) -> Sent:
        """Yield the events after a position, of one model or of all that are seen, and progress
        between them.
        """
        sent: dict[str, LoadProgress] = {}
        events = self._shutdown.until(self._pool.events(after))
        async with contextlib.aclosing(events) as stream:
            async for event in stream:
                if not seen.holds:
                    return
                if event is None:
                    for model, step in self._pool.progresses():
                        if self._is_meant(model, name, seen) and step != sent.get(model):
                            # it has the id of the event before it, from which one can resume
                            sent[model] = step
                            data = {"model": model, **step.as_dict()}
                            yield ServerSentEvent(id=str(after), event="progress", data=data)
                    continue
                after = event.id
                if self._is_meant(event.model, name, seen):
                    yield ServerSentEvent(id=str(after), event=event.kind, data=event.data)

    def _is_meant(self, model: str | None, name: str | None, seen: Visible) -> bool:
        return name in (None, model) and model is not None and seen.grant.sees(model)
