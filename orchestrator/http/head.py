"""HEAD wherever GET is: the status and headers of the same answer, at once (RFC 9110, 9.3.2)."""

from __future__ import annotations

import asyncio

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadRoute(APIRoute):
    """A route that answers HEAD if it answers GET; FastAPI's own routes do not."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(_as_get(scope))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods = self.methods or set()
        if "GET" not in methods or scope["method"] == "GET":
            await super().handle(scope, receive, send)
        elif scope["method"] == "HEAD":
            await _head(super().handle, scope, receive, send)
        else:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted({*methods, "HEAD"}))})


def _as_get(scope: Scope) -> Scope:
    return {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope


async def _head(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without the body, and do not wait for it: a stream has no end."""
    try:
        async with asyncio.timeout(None) as answering:

            async def send_head(message: Message) -> None:
                if message["type"] == "http.response.start":
                    await send(message)
                    await send({"type": "http.response.body", "body": b""})
                    answering.reschedule(0.0)

            await app(_as_get(scope), receive, send_head)
    except TimeoutError:
        if not answering.expired():
            raise
