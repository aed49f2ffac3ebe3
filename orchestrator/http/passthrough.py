"""`/v1/*`, passed to the Healthy server: streaming both ways, nothing buffered.

A request takes a lease first, so that a swap waits for it (bounded) and no server is stopped under
it; while a load is in flight it is held (bounded in number and in time). A client that goes away
ends its request to the server too. The key of this API and cross-origin rules stay here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final
from urllib.parse import unquote

import httpx
import structlog
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from orchestrator.errors import (
    Cancelled,
    OrchestratorError,
    Problem,
    ServerExited,
    Unavailable,
)
from orchestrator.http.bodies import until_gone
from orchestrator.http.problems import answer_to, http_problem, respond
from orchestrator.orchestrator import AsyncOrchestrator
from orchestrator.views import LeasedServer

Header = tuple[bytes, bytes]

HELD_S: Final = 120.0
MAX_HELD: Final = 256
_RETRY_AFTER_S: Final = 1.0

_HOP_BY_HOP: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
_OURS: Final = frozenset({"host", "authorization", "x-api-key", "cookie", "origin", "referer"})
_TIMEOUT: Final = httpx.Timeout(None, connect=5.0)  # a generation may be silent for minutes
_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=32)
_log = structlog.get_logger("orchestrator.http")


class PassThrough:
    """An ASGI app: whatever comes below `/v1` goes to the server, and back.

    Args:
        orch: Whose server it is.
        held_s: How long a request waits for a load in flight.
        max_held: How many requests may wait; the next one is told to come back.
    """

    def __init__(
        self, orch: AsyncOrchestrator, *, held_s: float = HELD_S, max_held: int = MAX_HELD
    ) -> None:
        self._orch = orch
        self._held_s = held_s
        self._max_held = max_held
        self._held = 0
        self._pool: tuple[LeasedServer, httpx.AsyncClient] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket: the server has none
            await send({"type": "websocket.close", "code": 1000})
            return
        client = _Client(receive)
        exchange = _Exchange(scope, client, send)
        with contextlib.suppress(Cancelled):  # nobody is there to be told
            await until_gone(client.read(), self._serve(exchange))

    async def close(self) -> None:
        """Close the connections to the server."""
        if self._pool is not None:
            await self._pool[1].aclose()

    async def _serve(self, exchange: _Exchange) -> None:
        try:
            async with self._leased() as server:
                await exchange.forward(await self._client_of(server), server)
        except OrchestratorError as error:
            await exchange.refuse(error)

    @contextlib.asynccontextmanager
    async def _leased(self) -> AsyncIterator[LeasedServer]:
        """Hold the request until there is a server, and the server until the request is done.

        Raises:
            Unavailable: too many are held, or it was held for too long; says when to come back.
        """
        if self._held >= self._max_held:
            raise _come_back("too many requests wait for a model")
        async with contextlib.AsyncExitStack() as stack:
            self._held += 1
            try:
                async with asyncio.timeout(self._held_s):
                    server = await stack.enter_async_context(self._orch.lease())
            except TimeoutError:
                raise _come_back(f"no model became Healthy within {self._held_s:g} s") from None
            finally:
                self._held -= 1
            yield server

    async def _client_of(self, server: LeasedServer) -> httpx.AsyncClient:
        """Return the connections of this generation; those of an older one are of no use."""
        if self._pool is None or self._pool[0].generation != server.generation:
            old, client = (
                self._pool,
                httpx.AsyncClient(
                    trust_env=False, timeout=_TIMEOUT, limits=_LIMITS, follow_redirects=False
                ),
            )
            self._pool = server, client
            if old is not None:
                await old[1].aclose()
        return self._pool[1]


class _Client:
    """Who asked: its body as it arrives."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=2)

    async def read(self) -> None:
        """Take what arrives, no faster than it is passed on, until the client goes away."""
        message: Message = {"more_body": True}
        while message.get("more_body"):
            message = await self.receive()
            if message["type"] == "http.disconnect":
                return
            await self._chunks.put(message.get("body", b""))
        await self._chunks.put(None)
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def body(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            if chunk:
                yield chunk


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, client: _Client, send: Send) -> None:
        self._scope = scope
        self._client = client
        self._send = send

    async def forward(self, http: httpx.AsyncClient, server: LeasedServer) -> None:
        """Send the request on, and the answer back as it comes.

        Raises:
            ServerExited: the server ended before it answered.
        """
        target = _target(self._scope)
        if target is None:
            await self._answer(http_problem(404, "there is nothing there"))
            return
        headers = _for_server(self._scope["headers"], server)
        has_body = any(
            name in {b"content-length", b"transfer-encoding"} for name, _ in self._scope["headers"]
        )
        content = self._client.body() if has_body else None
        request = http.build_request(
            self._scope["method"], server.base_url + target, headers=headers, content=content
        )
        try:
            response = await http.send(request, stream=True)
        except httpx.TransportError as error:
            why = f"the server ended before it answered ({type(error).__name__}): try again"
            problem = Problem("server_exited", why, retry_after_s=_RETRY_AFTER_S)
            raise ServerExited(problem) from error
        try:
            await self._begin(response)
            async for chunk in response.aiter_raw():
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
            await self._send({"type": "http.response.body", "body": b""})
        except httpx.TransportError as error:
            # What was sent cannot be taken back: an answer that just stops says that it is cut.
            _log.warning("passthrough.cut", path=self._scope["path"], reason=str(error))
        finally:
            await response.aclose()

    async def refuse(self, error: OrchestratorError) -> None:
        response = answer_to(error, Request(self._scope))
        await response(self._scope, self._client.receive, self._send)

    async def _begin(self, response: httpx.Response) -> None:
        headers = [
            (name, value)
            for name, value in _without(frozenset(), response.headers.raw)
            if not name.startswith(b"access-control-")
        ]
        await self._send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "headers": headers,
            }
        )

    async def _answer(self, members: dict[str, Any]) -> None:
        await respond(members)(self._scope, self._client.receive, self._send)


def _target(scope: Scope) -> str | None:
    """Return path and query below the server's root; None for what is not below `/v1`."""
    raw = scope.get("raw_path") or scope["path"].encode()
    path = raw.decode("latin-1")
    path = path[path.index("/v1/") :] if "/v1/" in path else path
    if any(unquote(part) in {".", ".."} or "/" in unquote(part) for part in path.split("/")):
        return None
    query = scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _for_server(given: Iterable[Header], server: LeasedServer) -> list[Header]:
    """Return what the server is told: its own key, if it has one, instead of this API's."""
    headers = _without(_OURS, given)
    if server.api_key is not None:
        headers.append((b"authorization", f"Bearer {server.api_key}".encode()))
    return headers


def _without(dropped: frozenset[str], headers: Iterable[tuple[bytes, bytes]]) -> list[Header]:
    """Return headers without these, and without what concerns one connection only."""
    given = [(name.lower(), value) for name, value in headers]
    listed = b",".join(value for name, value in given if name == b"connection")
    named = {name.strip().lower() for name in listed.decode("latin-1").split(",")}
    dropped = _HOP_BY_HOP | dropped | named
    return [(name, value) for name, value in given if name.decode("latin-1") not in dropped]


def _come_back(why: str) -> Unavailable:
    return Unavailable(Problem("unavailable", why, retry_after_s=_RETRY_AFTER_S))
