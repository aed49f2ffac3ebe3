"""Requests that are sent on to a server, and its answers on their way back: nothing is buffered.

API keys and cross-origin headers are not passed on. Connections are reused for a moment, within one
generation of a model's server.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Final, NamedTuple, Protocol
from weakref import WeakSet

import aiohttp
from fastapi import HTTPException
from multidict import CIMultiDict
from starlette.types import Scope, Send
from yarl import URL

from orchestrator.base.log import escaped, event_log
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem, ServerExited
from orchestrator.machine.commands import Kill
from orchestrator.runtime.snapshot import StepReport

Header = tuple[bytes, bytes]
Body = bytes | AsyncIterator[bytes] | None

RETRY_AFTER_S: Final = 1.0
_CONNECT_S: Final = 5.0
_KEEPALIVE_S: Final = 1.0  # each idle connection takes one of llama-server's few HTTP threads
_LOST: Final = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)
_CACHED: Final = re.compile(rb'"cache_n":\s*(\d{1,9})\b')  # tokens of the prompt, in llama.cpp
_FINAL: Final = range(200, 600)  # other statuses an ASGI server cannot send
_UNSENDABLE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # in the value of a header

_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade expect".split()
)
_DROPPED: Final = _HOP_BY_HOP.union(b"host authorization x-api-key cookie origin referer".split())
_CREDENTIALS: Final = frozenset({b"authorization", b"x-api-key"})
_LENGTH: Final = frozenset({b"content-length"})
_NEVER_ADDED: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_log = event_log("orchestrator.http")


class Server(NamedTuple):
    """Where a request is sent.

    Attributes:
        name: Of the model, where there are several.
        generation: 0 for a server that is not ours.
    """

    url: str
    api_key: str | None
    generation: Generation
    name: str = ""


class Rewrites(Protocol):
    """What changes an answer on its way."""

    def feed(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes: ...


class Upstream:
    """The connections to servers."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, Generation] | None, aiohttp.ClientSession] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._answers: dict[tuple[str, Generation], WeakSet[aiohttp.ClientResponse]] = {}

    def hear(self, name: str, report: StepReport) -> None:
        """Close the connections to a server that is about to be stopped, on the owner's thread: an
        open one holds up its end.
        """
        for command in report.commands:
            if isinstance(command, Kill) and command.child is not None and self._loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    key = name, command.child.generation
                    self._loop.call_soon_threadsafe(self._part_from, key)

    def _part_from(self, key: tuple[str, Generation]) -> None:
        for response in self._answers.pop(key, ()):
            if not response.content.is_eof():  # a session that is closed would not end it
                response.content.set_exception(aiohttp.ClientConnectionError("it was stopped"))
        if (session := self._sessions.pop(key, None)) is not None:
            closing = asyncio.ensure_future(session.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all connections."""
        while self._sessions:
            await self._sessions.popitem()[1].close()

    async def _session(self, key: tuple[str, Generation] | None) -> aiohttp.ClientSession:
        """Return the session that reuses connections to this server; None: that reuses none."""
        if key and key not in self._sessions:
            olds = [one for one in self._sessions if one and one[0] == key[0]]
            for old in [self._sessions.pop(one) for one in olds]:
                await old.close()
            for one in olds:
                self._answers.pop(one, None)
        if key not in self._sessions:
            self._loop = asyncio.get_running_loop()
            keepalive_s = _KEEPALIVE_S if key else None
            self._sessions[key] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0, force_close=not key, keepalive_timeout=keepalive_s
                ),
                trace_configs=[_REUSE],
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=_NEVER_ADDED,
                trust_env=False,
            )
        return self._sessions[key]

    async def request(
        self, method: str, target: str, headers: CIMultiDict[str], body: Body, server: Server
    ) -> aiohttp.ClientResponse:
        """Send the request to the server, and return its response as soon as that begins.

        A request that may be answered with a stream gets a fresh connection, because llama-server
        closes it after a stream whatever its headers say. A server may close a kept connection at
        the moment when it is used again, without having read the request: that request is sent once
        more, on a fresh one. Nothing else is, because it may have been executed.
        """
        if server.api_key is not None:
            headers["Authorization"] = f"Bearer {server.api_key}"
        may_stream = body is not None and (not isinstance(body, bytes) or b'"stream"' in body)
        key = None if may_stream else (server.name, server.generation)
        while True:
            session, attempt = await self._session(key), SimpleNamespace(is_reused=False)
            try:
                response = await session.request(
                    method,
                    URL(server.url + target, encoded=True),
                    headers=headers,
                    data=body,
                    allow_redirects=False,
                    trace_request_ctx=attempt,
                )
            except (aiohttp.ClientError, TimeoutError) as error:
                if not (attempt.is_reused and isinstance(error, _LOST)):
                    raise await _failure(server, error) from error
                key = None
                continue
            if response.status not in _FINAL:
                response.close()
                raise HTTPException(502, f"the server answered with status {response.status}")
            if any(_UNSENDABLE.search(value) for _, value in response.raw_headers):
                response.close()
                raise HTTPException(502, "the server's answer has a control character in its head")
            if key is not None:
                self._answers.setdefault(key, WeakSet()).add(response)
            return response


async def send_on(
    scope: Scope,
    response: aiohttp.ClientResponse,
    send: Send,
    *,
    first: bytes | None = None,
    judge: Callable[[int], None] | None = None,
    rewrites: Rewrites | None = None,
) -> None:
    """Send the answer on as it comes.

    Args:
        first: What has been read of its body.
        judge: Hears how much of its prompt was cached.
        rewrites: Changes the answer, and so its length.
    """
    headers = headers_back(response, frozenset() if rewrites is None else _LENGTH)
    start = {"type": "http.response.start", "status": response.status, "headers": headers}
    before = b""
    try:
        await send(start)
        while chunk := await response.content.readany() if first is None else first:
            first = None
            if judge is not None:
                if (found := _CACHED.search(before + chunk)) is not None:
                    judge(int(found[1]))
                    judge = None
                before = chunk[-32:]
            if rewrites is not None:
                chunk = rewrites.feed(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        rest = rewrites.finish() if rewrites is not None else b""
        await send({"type": "http.response.body", "body": rest})
    except aiohttp.ClientError as error:
        # The status is sent already: an answer without its end shows that it was cut.
        _log("warning", "passthrough.cut", path=scope["path"], reason=_reason(error))
    finally:
        response.close()


def headers_for(
    headers: Iterable[Header], dropped: frozenset[bytes] = frozenset()
) -> CIMultiDict[str]:
    """Return the client's headers for a server, without these and those that end with us."""
    return CIMultiDict(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in _without(_DROPPED | dropped, headers)
    )


def headers_through(headers: Iterable[Header]) -> CIMultiDict[str]:
    """Return the client's headers for a service of ours, which judges its keys."""
    kept = _without(_DROPPED - _CREDENTIALS | _LENGTH, headers)
    return CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in kept)


def headers_back(
    response: aiohttp.ClientResponse, dropped: frozenset[bytes] = frozenset()
) -> list[Header]:
    """Return the headers of an answer for the client."""
    return [
        (name, value)
        for name, value in _without(_HOP_BY_HOP | dropped, response.raw_headers)
        if not name.startswith(b"access-control-")
    ]


def _without(dropped: frozenset[bytes], headers: Iterable[Header]) -> list[Header]:
    """Return the headers without these, and without those that `Connection` lists (RFC 9110)."""
    given = [(name.lower(), value) for name, value in headers]
    for name, value in given:
        if name == b"connection":
            dropped |= {listed.strip().lower() for listed in value.split(b",")}
    return [(name, value) for name, value in given if name not in dropped]


async def _mark_reused(_: object, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.is_reused = True


_REUSE: Final = aiohttp.TraceConfig()
_REUSE.on_connection_reuseconn.append(_mark_reused)


async def _failure(server: Server, error: Exception) -> Exception:
    """Return what to tell the client of a request that got no answer."""
    if isinstance(error, TimeoutError):
        return HTTPException(502, f"the server accepted no connection within {_CONNECT_S:g} s")
    if not isinstance(error, aiohttp.ClientConnectionError):
        return HTTPException(502, f"the server's answer is not HTTP: {_reason(error)}")
    if not server.generation:
        return HTTPException(502, f"the server of {server.name} gives no answer")
    url = URL(server.url)
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(url.host, url.port)
    except OSError:
        why = "the server ended before it answered: try again"
        return ServerExited(Problem("server_exited", why, retry_after_s=RETRY_AFTER_S))
    writer.close()
    why = "it may have refused the request unread, or executed it"
    return HTTPException(502, f"the server closed the connection before it answered: {why}")


def _reason(error: Exception) -> str:
    """Return what is wrong with an answer; it may quote the server."""
    return escaped(" ".join(getattr(error, "message", str(error)).split())[:200])
