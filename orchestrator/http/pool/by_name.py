"""`/v1/*` of a pool: each request goes to the model that it names."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from orchestrator.http.problems import Responder, http_problem
from orchestrator.http.shutdown import Shutdown
from orchestrator.pool.pool import AsyncModelPool


class ByName:
    """An ASGI app that passes requests below `/v1` to the servers of a pool."""

    def __init__(self, pool: AsyncModelPool, responder: Responder, shutdown: Shutdown) -> None:
        self._pool = pool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await http_problem(404, "not yet")(scope, receive, send)

    async def close(self) -> None:
        """Close the connections to the servers."""
