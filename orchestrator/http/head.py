"""HEAD wherever GET is: the status and headers of the same answer, at once (RFC 9110, 9.3.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadRoute(APIRoute):
    """A route that answers HEAD if it answers GET; FastAPI's own routes do not.

    Where several routes of one class have a path, 405 names the methods of all.
    """

    _by_path: ClassVar[dict[str, set[str]]] = {}

    def __init_subclass__(cls) -> None:
        cls._by_path = {}

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self._allowed = self._by_path.setdefault(path, set())
        self._own = self.methods or set()
        self._allowed |= self._own
        if "GET" in self._own:
            self._allowed.add("HEAD")

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(_as_get(scope))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        if method in self._own:
            await super().handle(scope, receive, send)
        elif method == "HEAD" and "GET" in self._own:
            await head_of(super().handle, scope, receive, send)
        else:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(self._allowed))})


def _as_get(scope: Scope) -> Scope:
    return {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope


async def head_of(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
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
