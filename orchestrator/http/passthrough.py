"""`/v1/*`, passed to the Healthy server: streaming both ways, nothing buffered.

A request takes a lease first, so that a swap waits for it (bounded) and the server is not stopped
under it. While a load is in flight, requests are held (bounded in number and time). A client that
disconnects ends its request to the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Final
from urllib.parse import unquote

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.errors import NotLoaded, Problem, Unavailable, WrongKind
from orchestrator.http.activity.activity import Activity, Asked
from orchestrator.http.bodies import Client
from orchestrator.http.guards.keys import grant_of
from orchestrator.http.paths import own_path
from orchestrator.http.problems import AsciiJSON, Responder, http_problem
from orchestrator.http.shutdown import HOST, Shutdown
from orchestrator.http.upstream import (
    RETRY_AFTER_S,
    Header,
    Server,
    Upstream,
    headers_for,
    send_on,
)
from orchestrator.runtime.answers import LeasedServer
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.settings.fields import Kind

HELD_S: Final = 120.0
MAX_HELD: Final = 256
_LISTINGS: Final = {("GET", "/v1/models"), ("HEAD", "/v1/models")}  # empty without a model
_KINDS: Final[dict[str, Kind]] = {
    **dict.fromkeys(("chat/completions", "completions", "responses", "messages"), "chat"),
    "embeddings": "embedding",
    **dict.fromkeys(("rerank", "reranking"), "rerank"),
}
"""The kind of server that a route needs; other routes are passed to any."""


class PassThrough:
    """An ASGI app that passes requests below `/v1` to the server of an orchestrator.

    Args:
        orch: The orchestrator.
        held_s: Seconds that a request waits for a load in flight.
        max_held: How many requests may wait; the next one gets 503 with `Retry-After`.
        shutdown: What ends the wait early.
        activity: What hears of the requests; None = nothing.
    """

    def __init__(
        self,
        orch: AsyncOrchestrator,
        *,
        held_s: float = HELD_S,
        max_held: int = MAX_HELD,
        shutdown: Shutdown = HOST,
        activity: Activity | None = None,
    ) -> None:
        self._orch = orch
        self._activity = activity
        self._responder = Responder(orch.known_paths)
        self._held_s = held_s
        self._max_held = max_held
        self._shutdown = shutdown
        self.held: int = 0
        self._upstream = Upstream()
        orch.observe(partial(self._upstream.hear, ""))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket: llama-server has none
            await send({"type": "websocket.close", "code": 1000})
            return
        target = target_of(scope)
        if target is None:
            await http_problem(404, "the path leads out of /v1")(scope, receive, send)
            return
        route = scope["method"], target.partition("?")[0]
        activity = None if route in _LISTINGS else self._activity
        asked = Asked(activity, route[1], grant_of(scope).name)
        try:
            await self._pass_on(scope, receive, partial(asked.send, send), target, asked)
        except ClientDisconnect:
            asked.client_left()
        except Exception as error:
            if asked.has_begun:
                raise
            if isinstance(error, NotLoaded) and route in _LISTINGS:
                await AsciiJSON({"object": "list", "data": []})(scope, receive, send)
                return
            answer = await self._responder.failure(Request(scope), error)
            await answer(scope, receive, partial(asked.send, send))
        finally:
            asked.end()

    async def _pass_on(
        self, scope: Scope, receive: Receive, send: Send, target: str, asked: Asked
    ) -> None:
        async with _Client(receive).connected() as client, contextlib.AsyncExitStack() as stack:
            await client.begin()
            server = await self._leased(stack)
            asked.got_server(server.model)
            check_kind(server.kind, target)
            judge = self._orch.judge_of_prompts(server.generation)
            where = Server(server.base_url, server.api_key, server.generation)
            given = scope["headers"]
            response = await self._upstream.request(
                scope["method"], target, headers_for(given), client.body(given), where
            )
            await send_on(scope, response, send, judge=judge)

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._upstream.close()

    async def _leased(self, stack: contextlib.AsyncExitStack) -> LeasedServer:
        """Lease the server until the stack is closed; hold the request until one is Healthy."""
        if (server := stack.enter_context(self._orch.leased_at_once())) is not None:
            return server
        if self.held >= self._max_held:
            raise _retry_later("too many requests wait for a model")
        self.held += 1
        try:
            async with asyncio.timeout(self._held_s) as scope:
                with self._shutdown.ending(scope):
                    return await stack.enter_async_context(self._orch.lease())
        except TimeoutError:
            if self._shutdown.has_begun:
                raise self._shutdown.error() from None
            raise _retry_later(f"no model became Healthy within {self._held_s:g} s") from None
        finally:
            self.held -= 1


def below(app: ASGIApp, prefix: str, other: ASGIApp) -> ASGIApp:
    """ASGI middleware: requests below a path go to another app, because a router and a framework
    cost as much time as the pass-through itself.
    """

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        is_below = scope["type"] != "lifespan" and own_path(scope).startswith(prefix)
        await (other if is_below else app)(scope, receive, send)

    return dispatch


class _Client(Client):
    """The body of a request as it arrives, and then the client's disconnect."""

    async def begin(self) -> None:
        """Read the first chunk of the body; most requests have no other."""
        self._first = await self._read()

    def body(self, headers: Iterable[Header]) -> bytes | AsyncIterator[bytes] | None:
        """Return the body, whole or as it arrives; None if there is none."""
        if not self._is_whole:
            return self._chunks()
        names = {name for name, _ in headers}
        return self._first if self._first or b"content-length" in names else None

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield self._first
        while not self._is_whole:
            yield await self._read()


def target_of(scope: Scope) -> str | None:
    """Return path and query for the server; None if the path leads out of `/v1`."""
    raw = scope.get("raw_path") or scope["path"].encode()
    path = raw.decode("latin-1")
    path = path[path.index("/v1/") :] if "/v1/" in path else path
    if path.startswith("/v1/v1/"):  # `base_url` of a remote lease, used as that of one's own server
        path = path.removeprefix("/v1")
    if "." in path or "%" in path:
        parts = [unquote(part) for part in path.split("/")]
        if any(part in {".", ".."} or "/" in part for part in parts):
            return None
    query = scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def check_kind(kind: Kind, target: str) -> None:
    """Refuse a route that a server of this kind does not answer."""
    route = target.partition("?")[0].removeprefix("/v1/").rstrip("/")
    if _KINDS.get(route, kind) != kind:
        message = f"/v1/{route} needs a model of kind {_KINDS[route]}, not {kind}"
        raise WrongKind.because(message, field="kind")


def _retry_later(why: str) -> Unavailable:
    return Unavailable(Problem("unavailable", why, retry_after_s=RETRY_AFTER_S))
