"""`/v1/*`, passed to the Healthy server: streaming both ways, nothing buffered.

A request takes a lease first, so that a swap waits for it (bounded) and no server is stopped under
it; while a load is in flight it is held (bounded in number and in time). A client that goes away
ends its request to the server too. The key of this API and cross-origin rules stay here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final, Self
from urllib.parse import unquote

import aiohttp
import structlog
from multidict import CIMultiDict
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from orchestrator.base.tokens import Generation
from orchestrator.errors import OrchestratorError, Problem, ServerExited, Unavailable, WrongKind
from orchestrator.http.problems import Answers, http_problem, respond
from orchestrator.runtime.answers import LeasedServer
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.settings.fields import Kind

Header = tuple[bytes, bytes]

HELD_S: Final = 120.0
MAX_HELD: Final = 256
_RETRY_AFTER_S: Final = 1.0
_CONNECT_S: Final = 5.0
_KEPT_S: Final = 1.0  # each kept connection takes one of llama-server's few HTTP threads

_HOP_BY_HOP: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
        *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"),
    }
)
_KINDS: Final[dict[str, Kind]] = {
    **dict.fromkeys(("chat/completions", "completions", "responses", "messages"), "chat"),
    "embeddings": "embedding",
    **dict.fromkeys(("rerank", "reranking"), "rerank"),
}
"""What a server must be for, by route; every other route is passed."""
_OURS: Final = frozenset(
    {b"host", b"authorization", b"x-api-key", b"cookie", b"origin", b"referer"}
)
_NEVER_ADDED: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
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
        self._told = Answers(orch.known_paths)
        self._held_s = held_s
        self._max_held = max_held
        self.held: int = 0
        self._kept: tuple[Generation, aiohttp.ClientSession] | None = None
        self._fresh: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket: the server has none
            await send({"type": "websocket.close", "code": 1000})
            return
        target = _target(scope)
        if target is None:
            await respond(http_problem(404, "there is nothing there"))(scope, receive, send)
            return
        client = _Client(receive)
        try:
            await client.begin()
            async with client:
                lease = self._orch.lease()
                server = await self._granted(lease)
                try:
                    _check_kind(server.kind, target)
                    await self._forward(scope, target, client, server, send)
                finally:
                    await lease.__aexit__(None, None, None)
        except _GoneError:
            return  # nobody is there to be told
        except OrchestratorError as error:
            await self._told.failure(error, Request(scope))(scope, receive, send)

    async def close(self) -> None:
        """Close the connections to the server."""
        for session in (self._kept and self._kept[1], self._fresh):
            if session is not None:
                await session.close()

    async def _granted(
        self, lease: contextlib.AbstractAsyncContextManager[LeasedServer]
    ) -> LeasedServer:
        """Hold the request until there is a server, and from then on that server.

        Raises:
            Unavailable: too many are held, or it was held for too long; says when to come back.
        """
        if self.held >= self._max_held:
            raise _come_back("too many requests wait for a model")
        self.held += 1
        try:
            async with asyncio.timeout(self._held_s):
                return await lease.__aenter__()
        except TimeoutError:
            raise _come_back(f"no model became Healthy within {self._held_s:g} s") from None
        finally:
            self.held -= 1

    async def _kept_for(self, generation: Generation) -> aiohttp.ClientSession:
        """Return the kept connections of this generation; those of an older one are of no use."""
        if self._kept is None or self._kept[0] != generation:
            old, session = self._kept, _session(keepalive_timeout=_KEPT_S)
            self._kept = generation, session
            if old is not None:
                await old[1].close()
        return self._kept[1]

    async def _asked(
        self, server: LeasedServer, method: str, target: str, headers: list[Header], client: _Client
    ) -> aiohttp.ClientResponse:
        """Send the request on and return the answer as it begins.

        Not over a kept connection where the answer may be a stream: llama-server closes after one,
        whatever its headers say. And a server may let go of a kept one in the very moment it is
        used; then the request is sent again, which is safe as it changes nothing there.

        Raises:
            ServerExited: the server ended before it answered.
        """
        if self._fresh is None:
            self._fresh = _session(force_close=True)
        body = client.body(headers)
        may_stream = body is not None and (not isinstance(body, bytes) or b'"stream"' in body)
        sessions = [] if may_stream else [await self._kept_for(server.generation)]
        failure: Exception | None = None
        for session in (*sessions, self._fresh):
            try:
                return await session.request(
                    method,
                    URL(server.base_url + target, encoded=True),
                    headers=_headers_for(headers, server),
                    data=body,
                    allow_redirects=False,
                )
            except (aiohttp.ClientError, TimeoutError) as error:
                failure = error
        why = f"the server ended before it answered ({type(failure).__name__}): try again"
        raise ServerExited(Problem("server_exited", why, retry_after_s=_RETRY_AFTER_S)) from failure

    async def _forward(
        self, scope: Scope, target: str, client: _Client, server: LeasedServer, send: Send
    ) -> None:
        response = await self._asked(server, scope["method"], target, scope["headers"], client)
        try:
            await _send_back(response, send)
        except aiohttp.ClientError as error:
            # What was sent cannot be taken back: an answer that just stops says that it is cut.
            _log.warning("passthrough.cut", path=scope["path"], reason=str(error))
        finally:
            response.close()


def _session(**connections: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, **connections),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=_NEVER_ADDED,
        trust_env=False,
    )


class Below:
    """ASGI middleware: what comes below a path goes to another app, past the router and all that
    a framework puts around it, which together take as long as the pass-through itself.
    """

    def __init__(self, app: ASGIApp, *, prefix: str, app_below: ASGIApp) -> None:
        self._app = app
        self._prefix = prefix
        self._below = app_below

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = "" if scope["type"] == "lifespan" else scope["path"]
        is_below = path.removeprefix(scope.get("root_path", "")).startswith(self._prefix)
        await (self._below if is_below else self._app)(scope, receive, send)


class _GoneError(Exception):
    """The client has gone away."""


class _Client:
    """Who asked: its body as it arrives, and whether it is still there.

    Inside `async with`, the task ends with `_GoneError` when the client goes away. That is noticed
    once its body has been read: whoever still sends is still there.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._first = b""
        self._is_whole = False
        self._is_gone = False
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Take the first piece of the body; most requests are no longer than that."""
        self._first, self._is_whole = await self._next()

    def body(self, headers: Iterable[Header]) -> bytes | AsyncIterator[bytes] | None:
        """Return the body, whole or as it arrives; None when there is none."""
        if not self._is_whole:
            return self._rest()
        names = {name for name, _ in headers}
        return self._first if self._first or b"content-length" in names else None

    async def _rest(self) -> AsyncIterator[bytes]:
        chunk, is_whole = self._first, False
        while True:
            if chunk:
                yield chunk
            if is_whole:
                break
            chunk, is_whole = await self._next()
        self._watch()

    async def _next(self) -> tuple[bytes, bool]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        return message.get("body", b""), not message.get("more_body")

    def _watch(self) -> None:
        self._watcher = asyncio.ensure_future(self._leave())

    async def _leave(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        if self._task is not None:
            self._task.cancel()

    async def __aenter__(self) -> Self:
        if self._is_whole:
            self._watch()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        if self._is_gone and self._task is not None:
            self._task.uncancel()
            if kind is asyncio.CancelledError and not self._task.cancelling():
                raise _GoneError


async def _send_back(response: aiohttp.ClientResponse, send: Send) -> None:
    """Send the answer back, each piece as it comes."""
    await send(
        {
            "type": "http.response.start",
            "status": response.status,
            "headers": [
                header
                for header in _without(_HOP_BY_HOP, response.raw_headers)
                if not header[0].startswith(b"access-control-")
            ],
        }
    )
    content = response.content
    while chunk := await content.readany():
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _target(scope: Scope) -> str | None:
    """Return path and query below the server's root; None for what is not below `/v1`."""
    raw = scope.get("raw_path") or scope["path"].encode()
    path = raw.decode("latin-1")
    path = path[path.index("/v1/") :] if "/v1/" in path else path
    if "." in path or "%" in path:
        parts = [unquote(part) for part in path.split("/")]
        if any(part in {".", ".."} or "/" in part for part in parts):
            return None
    query = scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _check_kind(kind: Kind, target: str) -> None:
    """Refuse a route that a server of this kind does not answer.

    Raises:
        WrongKind: names kind and route.
    """
    route = target.partition("?")[0].removeprefix("/v1/").rstrip("/")
    if _KINDS.get(route, kind) != kind:
        message = f"/v1/{route} wants a model of kind {_KINDS[route]}: what runs is of kind {kind}"
        raise WrongKind.because(message, field="kind")


def _headers_for(headers: Iterable[Header], server: LeasedServer) -> CIMultiDict[str]:
    """Return what the server gets to see of the client's headers: its own key, if it has one,
    instead of this API's.
    """
    given = _without(_HOP_BY_HOP | _OURS, headers)
    shown = CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in given)
    if server.api_key is not None:
        shown["Authorization"] = f"Bearer {server.api_key}"
    return shown


def _without(dropped: frozenset[bytes], headers: Iterable[Header]) -> list[Header]:
    """Return headers without these, and without what concerns one connection only (RFC 9110)."""
    given = [(name.lower(), value) for name, value in headers]
    named = [value for name, value in given if name == b"connection"]
    if named:
        dropped |= {name.strip().lower() for value in named for name in value.split(b",")}
    return [(name, value) for name, value in given if name not in dropped]


def _come_back(why: str) -> Unavailable:
    return Unavailable(Problem("unavailable", why, retry_after_s=_RETRY_AFTER_S))
