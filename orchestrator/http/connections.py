"""What a connection to `serve` and `run` may take before its request reaches the app.

Otherwise one client without a key could hold all memory by an endless head, or all descriptors by
connections that stay silent. So heads are bounded in bytes and in time, idle connections in time,
and all connections in number. A refusal reaches a client that is still sending.

No other protocol is spoken here: a request that offers one by `Upgrade` is read like any other.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final
from weakref import WeakKeyDictionary

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from orchestrator.http.guards.limits import LINGER_BYTES, LINGER_S
from orchestrator.http.problems import http_problem

MAX_HEAD_BYTES: Final = 64 << 10
HEAD_S: Final = 10.0
IDLE_S: Final = 15.0
_RESERVED_DESCRIPTORS: Final = 128  # for files, and the pipes of child processes


class _HeadTooLarge(Exception):
    """Raised in a callback; the parser then fails, and `send_400_response` is called."""


class _Tunnel(Exception):
    """Raised in the same way for CONNECT, after which the parser takes no body either."""


class _Places:
    """The connections of one server.

    Attributes:
        taken: All that are open.
        waiting: Those that wait for a request, or the rest of its head; the oldest first.
    """

    def __init__(self) -> None:
        self.taken: set[BoundedProtocol] = set()
        self.waiting: dict[BoundedProtocol, None] = {}


_PLACES: Final[WeakKeyDictionary[ServerState, _Places]] = WeakKeyDictionary()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits; its callbacks have the names that httptools calls."""

    _timer: asyncio.TimerHandle | None = None
    _is_in_head = False
    _head_bytes = 0  # of its complete fields
    _unparsed_bytes = 0  # of the pieces in which the head does not end, but the first
    _head_without_upgrade = b""
    _discarded_bytes: int | None = None  # None until the refusal

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._places = _PLACES.setdefault(self.server_state, _Places())
        self._places.taken.add(self)
        self._await_request()
        if len(self._places.taken) > max_connections():
            oldest = next(iter(self._places.waiting))
            oldest.leave()  # now: the loop may accept many before it reports the end of this one
            oldest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave()
        self._set_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._discarded_bytes is not None:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > LINGER_BYTES:
                self.transport.close()
            return
        had_begun = self._is_in_head
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if had_begun and self._is_in_head and self._discarded_bytes is None:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > MAX_HEAD_BYTES:
                self._refuse_head()

    def _parse(self, data: bytes) -> None:
        """Parse a head that has `Upgrade` once more, without it.

        After such a head httptools reads no body (`cb_on_headers_complete`), and takes its bytes
        for the next request. A server may ignore `Upgrade` (RFC 9110, 7.8), which some clients
        send with every request, such as Java's.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_upgrade + data[upgrade.args[0] :]
            else:
                return

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            self._refuse(400, "this is not a valid HTTP request")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._head_bytes = self._unparsed_bytes = 0
        self._set_timer(HEAD_S)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self._is_in_head:  # a trailer must not be merged into the head (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if (method := self.parser.get_method()) == b"CONNECT":
                raise _Tunnel
            line = b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())
            fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
            self._head_without_upgrade = b"\r\n".join([line, *fields, b"", b""])
            return
        self._is_in_head = False
        self._places.waiting.pop(self, None)
        self._set_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._is_in_head:  # or the end of a head that is parsed once more
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self._is_in_head:  # no pipelined request follows
            self._await_request()

    def _await_request(self) -> None:
        self._places.waiting[self] = None
        self._set_timer(IDLE_S)

    def leave(self) -> None:
        """Give up the place; the connection is closed, or about to be."""
        self._places.taken.discard(self)
        self._places.waiting.pop(self, None)

    def _set_timer(self, seconds: float | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._on_timer) if seconds else None

    def _on_timer(self) -> None:
        if self._is_in_head and self._discarded_bytes is None:
            self._refuse(408, f"the head of a request must arrive within {HEAD_S:g} s")
        else:
            self.transport.close()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLarge

    def _refuse_head(self) -> None:
        self._refuse(431, f"the head of a request must not exceed {MAX_HEAD_BYTES} bytes")

    def _refuse(self, status: int, detail: str) -> None:
        """Answer and close, but not before what the client is still sending has been discarded."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True  # its app has nothing to send any more
            self.cycle.message_event.set()
        answer = http_problem(status, detail, {"Connection": "close"})
        head = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in answer.raw_headers)]
        self.transport.write(b"".join([*head, b"\r\n", answer.body]))
        self._discarded_bytes = 0
        self._set_timer(LINGER_S)
        if self.transport.can_write_eof():
            self.transport.write_eof()


def max_connections() -> int:
    """Return how many connections fit: each may need another one to llama-server."""
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        sys.maxsize
        if soft == resource.RLIM_INFINITY
        else max(8, (soft - _RESERVED_DESCRIPTORS) // 2)
    )
