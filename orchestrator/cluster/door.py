"""The door of a replica's listener: for fronts only, and shut before the pool is closed.

A pool that is closed ends its servers at once. So first nobody is let in any more, and who is
inside gets the rest of the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.http.paths import own_path
from orchestrator.http.problems import http_problem

FRONT_HEADER: Final = "proxy-authorization"
"""It has the key of a listener: RFC 9110 gives it to the next proxy only."""


class Door:
    """ASGI middleware.

    Args:
        key: That fronts have from the reports of the replica.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._sent = f"Bearer {key}".encode()
        self._inside = 0  # requests below /v1: event streams would never leave
        self._is_shut = False
        self._empty = asyncio.Event()
        self._empty.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
        elif own_path(scope).startswith("/v1/"):
            self._inside += 1
            self._empty.clear()
            try:
                await self._app(scope, receive, send)
            finally:
                self._inside -= 1
                if not self._inside:
                    self._empty.set()
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        sent = Headers(scope=scope).get(FRONT_HEADER, "").encode("latin-1", "replace")
        if not hmac.compare_digest(sent, self._sent):
            return http_problem(401, "this listener is for the fronts of its cluster")
        if self._is_shut:
            why = "this replica is shutting down"
            return http_problem(503, why, {"Retry-After": "1"}, "shutting_down")
        return None

    async def shut(self, within_s: float) -> None:
        """Let nobody in from now on, and wait until all have left."""
        self._is_shut = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._empty.wait()
