"""`/v1/*`, passed to the Healthy server: streaming both ways, nothing buffered.

A request takes a lease first, so that a swap waits for it (bounded) and the server is not stopped
under it. While a load is in flight, requests are held (bounded in number and time). A client that
disconnects ends its request to the server. API keys and cross-origin headers are not passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Final
from urllib.parse import unquote

import aiohttp
from fastapi import HTTPException
from multidict import CIMultiDict
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from orchestrator.base.log import escaped, event_log
from orchestrator.base.tokens import Generation
from orchestrator.errors import NotLoaded, Problem, ServerExited, Unavailable, WrongKind
from orchestrator.http.bodies import Client
from orchestrator.http.paths import own_path
from orchestrator.http.problems import AsciiJSON, Responder, http_problem
from orchestrator.http.shutdown import HOST, Shutdown
from orchestrator.machine.commands import Kill
from orchestrator.runtime.answers import LeasedServer
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.runtime.snapshot import StepReport
from orchestrator.settings.fields import Kind

Header = tuple[bytes, bytes]

HELD_S: Final = 120.0
MAX_HELD: Final = 256
_RETRY_AFTER_S: Final = 1.0
_CONNECT_S: Final = 5.0
_KEEPALIVE_S: Final = 1.0  # each idle connection takes one of llama-server's few HTTP threads
_LISTINGS: Final = {("GET", "/v1/models"), ("HEAD", "/v1/models")}  # empty without a model
_LOST: Final = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)
_CACHED: Final = re.compile(rb'"cache_n":\s*(\d{1,9})\b')  # tokens of the prompt, in llama.cpp
_FINAL: Final = range(200, 600)  # other statuses an ASGI server cannot send
_UNSENDABLE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # in the value of a header

_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade expect".split()
)
_KINDS: Final[dict[str, Kind]] = {
    **dict.fromkeys(("chat/completions", "completions", "responses", "messages"), "chat"),
    "embeddings": "embedding",
    **dict.fromkeys(("rerank", "reranking"), "rerank"),
}
"""The kind of server that a route needs; other routes are passed to any."""
_DROPPED: Final = _HOP_BY_HOP.union(b"host authorization x-api-key cookie origin referer".split())
_NEVER_ADDED: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_log = event_log("orchestrator.http")


class PassThrough:
    """An ASGI app that passes requests below `/v1` to the server of an orchestrator.

    Args:
        orch: The orchestrator.
        held_s: Seconds that a request waits for a load in flight.
        max_held: How many requests may wait; the next one gets 503 with `Retry-After`.
        shutdown: What ends the wait early.
    """

    def __init__(
        self,
        orch: AsyncOrchestrator,
        *,
        held_s: float = HELD_S,
        max_held: int = MAX_HELD,
        shutdown: Shutdown = HOST,
    ) -> None:
        self._orch = orch
        self._responder = Responder(orch.known_paths)
        self._held_s = held_s
        self._max_held = max_held
        self._shutdown = shutdown
        self.held: int = 0
        self._sessions: dict[Generation | None, aiohttp.ClientSession] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: set[asyncio.Task[None]] = set()
        orch.observe(self._look)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket: llama-server has none
            await send({"type": "websocket.close", "code": 1000})
            return
        target = _target(scope)
        if target is None:
            await http_problem(404, "the path leads out of /v1")(scope, receive, send)
            return
        has_begun = False
        try:
            async with _Client(receive).connected() as client, contextlib.AsyncExitStack() as stack:
                await client.begin()
                server = await self._leased(stack)
                _check_kind(server.kind, target)
                judge = self._orch.judge_of_prompts(server.generation)
                response = await self._requested(scope, target, client, server)
                has_begun = True
                await self._forward(scope, response, send, judge)
        except ClientDisconnect:
            return
        except Exception as error:
            if has_begun:
                raise
            asked = scope["method"], target.partition("?")[0]
            if isinstance(error, NotLoaded) and asked in _LISTINGS:
                await AsciiJSON({"object": "list", "data": []})(scope, receive, send)
                return
            answer = await self._responder.failure(Request(scope), error)
            await answer(scope, receive, send)

    def _look(self, report: StepReport) -> None:
        """Close the connections to a server that is about to be stopped, on the owner's thread: an
        open one holds up its end.
        """
        for command in report.commands:
            if isinstance(command, Kill) and command.child is not None and self._loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    self._loop.call_soon_threadsafe(self._part_from, command.child.generation)

    def _part_from(self, generation: Generation) -> None:
        if (session := self._sessions.pop(generation, None)) is not None:
            closing = asyncio.ensure_future(session.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close the connections to the server."""
        while self._sessions:
            await self._sessions.popitem()[1].close()

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

    async def _session(self, generation: Generation | None) -> aiohttp.ClientSession:
        """Return the session that reuses connections to this generation; None: that reuses none."""
        if generation and generation not in self._sessions:
            for old in [self._sessions.pop(key) for key in (*self._sessions,) if key]:
                await old.close()
        if generation not in self._sessions:
            self._loop = asyncio.get_running_loop()
            keepalive_s = _KEEPALIVE_S if generation else None
            self._sessions[generation] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0, force_close=not generation, keepalive_timeout=keepalive_s
                ),
                trace_configs=[_REUSE],
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=_NEVER_ADDED,
                trust_env=False,
            )
        return self._sessions[generation]

    async def _requested(
        self, scope: Scope, target: str, client: _Client, server: LeasedServer
    ) -> aiohttp.ClientResponse:
        """Send the request to the server, and return its response as soon as that begins.

        A request that may be answered with a stream gets a fresh connection, because llama-server
        closes it after a stream whatever its headers say. A server may close a kept connection at
        the moment when it is used again, without having read the request: that request is sent once
        more, on a fresh one. Nothing else is, because it may have been executed.
        """
        body = client.body(scope["headers"])
        may_stream = body is not None and (not isinstance(body, bytes) or b'"stream"' in body)
        generation = None if may_stream else server.generation
        while True:
            session, attempt = await self._session(generation), SimpleNamespace(is_reused=False)
            try:
                response = await session.request(
                    scope["method"],
                    URL(server.base_url + target, encoded=True),
                    headers=_headers_for(scope["headers"], server),
                    data=body,
                    allow_redirects=False,
                    trace_request_ctx=attempt,
                )
            except (aiohttp.ClientError, TimeoutError) as error:
                if not (attempt.is_reused and isinstance(error, _LOST)):
                    raise await _failure(server, error) from error
                generation = None
                continue
            if response.status not in _FINAL:
                response.close()
                raise HTTPException(502, f"the server answered with status {response.status}")
            if any(_UNSENDABLE.search(value) for _, value in response.raw_headers):
                response.close()
                raise HTTPException(502, "the server's answer has a control character in its head")
            return response

    async def _forward(
        self,
        scope: Scope,
        response: aiohttp.ClientResponse,
        send: Send,
        judge: Callable[[int], None] | None,
    ) -> None:
        """Send the answer on as it comes; `judge` hears how much of its prompt was cached."""
        headers = [
            (name, value)
            for name, value in _without(_HOP_BY_HOP, response.raw_headers)
            if not name.startswith(b"access-control-")
        ]
        start = {"type": "http.response.start", "status": response.status, "headers": headers}
        before = b""
        try:
            await send(start)
            while chunk := await response.content.readany():
                if judge is not None:
                    if (found := _CACHED.search(before + chunk)) is not None:
                        judge(int(found[1]))
                        judge = None
                    before = chunk[-32:]
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except aiohttp.ClientError as error:
            # The status is sent already: an answer without its end shows that it was cut.
            _log("warning", "passthrough.cut", path=scope["path"], reason=_reason(error))
        finally:
            response.close()


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

    async def _read(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._is_whole = not message.get("more_body")
        if self._is_whole:
            self.watch()
        return bytes(message.get("body", b""))


async def _mark_reused(_: object, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.is_reused = True


_REUSE: Final = aiohttp.TraceConfig()
_REUSE.on_connection_reuseconn.append(_mark_reused)


async def _failure(server: LeasedServer, error: Exception) -> Exception:
    """Return what to tell the client of a request that got no answer."""
    if isinstance(error, TimeoutError):
        return HTTPException(502, f"the server accepted no connection within {_CONNECT_S:g} s")
    if not isinstance(error, aiohttp.ClientConnectionError):
        return HTTPException(502, f"the server's answer is not HTTP: {_reason(error)}")
    url = URL(server.base_url)
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(url.host, url.port)
    except OSError:
        why = "the server ended before it answered: try again"
        return ServerExited(Problem("server_exited", why, retry_after_s=_RETRY_AFTER_S))
    writer.close()
    why = "it may have refused the request unread, or executed it"
    return HTTPException(502, f"the server closed the connection before it answered: {why}")


def _reason(error: Exception) -> str:
    """Return what is wrong with an answer; it may quote the server."""
    return escaped(" ".join(getattr(error, "message", str(error)).split())[:200])


def _target(scope: Scope) -> str | None:
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


def _check_kind(kind: Kind, target: str) -> None:
    """Refuse a route that a server of this kind does not answer."""
    route = target.partition("?")[0].removeprefix("/v1/").rstrip("/")
    if _KINDS.get(route, kind) != kind:
        message = f"/v1/{route} needs a model of kind {_KINDS[route]}, not {kind}"
        raise WrongKind.because(message, field="kind")


def _headers_for(headers: Iterable[Header], server: LeasedServer) -> CIMultiDict[str]:
    """Return the client's headers for the server, with the server's own key."""
    passed_on = CIMultiDict(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in _without(_DROPPED, headers)
    )
    if server.api_key is not None:
        passed_on["Authorization"] = f"Bearer {server.api_key}"
    return passed_on


def _without(dropped: frozenset[bytes], headers: Iterable[Header]) -> list[Header]:
    """Return the headers without these, and without those that `Connection` lists (RFC 9110)."""
    given = [(name.lower(), value) for name, value in headers]
    for name, value in given:
        if name == b"connection":
            dropped |= {listed.strip().lower() for listed in value.split(b",")}
    return [(name, value) for name, value in given if name not in dropped]


def _retry_later(why: str) -> Unavailable:
    return Unavailable(Problem("unavailable", why, retry_after_s=_RETRY_AFTER_S))
