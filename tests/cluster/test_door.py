"""The door of a replica: shut, it lets nobody in and waits for those who are inside."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from orchestrator.cluster.door import Door
from tests.kit.shell.harness import asyncio_test

KEY = [(b"proxy-authorization", b"Bearer key")]


def scope(path: str) -> Scope:
    return {"type": "http", "method": "GET", "path": path, "headers": KEY, "query_string": b""}


async def nothing() -> Message:
    return {"type": "http.disconnect"}


@asyncio_test
async def test_it_waits_for_answers_and_not_for_event_streams() -> None:
    go, begun = asyncio.Event(), asyncio.Semaphore(0)
    statuses: list[int] = []

    async def app(_: Scope, __: Receive, send: Send) -> None:
        begun.release()
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    door = Door(app, "key")
    stream = asyncio.ensure_future(door(scope("/api/events"), nothing, send))
    answer = asyncio.ensure_future(door(scope("/v1/completions"), nothing, send))
    await begun.acquire()
    await begun.acquire()
    shut = asyncio.ensure_future(door.shut(60))
    await asyncio.sleep(0)
    await door(scope("/v1/completions"), nothing, send)
    assert statuses == [503], "nobody is let in any more"
    assert not shut.done()
    go.set()
    await asyncio.wait_for(shut, 5)
    await asyncio.gather(stream, answer)
    assert statuses == [503, 200, 200]


@asyncio_test
async def test_it_does_not_wait_for_ever() -> None:
    async def app(*_: Any) -> None:
        await asyncio.Event().wait()

    async def send(_: Message) -> None: ...

    door = Door(app, "key")
    stuck = asyncio.ensure_future(door(scope("/v1/completions"), nothing, send))
    await asyncio.sleep(0)
    await asyncio.wait_for(door.shut(0.01), 5)
    stuck.cancel()
