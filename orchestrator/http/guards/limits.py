"""How large a body may be: told at once where its length is sent, in the middle where it is not."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.http.problems import http_problem, respond

MAX_BODY_BYTES: Final = 256 << 20
"""Pictures in base64 are tens of MB."""

_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_DIGITS: Final = 18  # of a number that any machine can count to


class LimitBody:
    """ASGI middleware. Nothing of a body is kept: what passes is counted.

    Args:
        max_bytes: The most a request may send. To the app, one that sends more has gone away; the
            client is told why, unless its answer has begun.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = {name: value for name, value in scope.get("headers", ()) if name in _FRAMING}
        if scope["type"] != "http" or not sent:  # no body
            await self._app(scope, receive, send)
            return
        length = sent.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > _DIGITS or int(length) > self._max):
            await self._refuse(scope, receive, send)
            return
        counted = _Counted(self._max, receive, send)
        await self._app(scope, counted.receive, counted.send)
        if counted.is_over and not counted.has_begun:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = http_problem(413, f"the body is larger than {self._max} bytes")
        # closed: the rest of it need not be read to find where the next request begins
        await respond(problem, {"Connection": "close"})(scope, receive, send)


class _Counted:
    """One request, until it is over the limit."""

    def __init__(self, max_bytes: int, receive: Receive, send: Send) -> None:
        self._left = max_bytes
        self._receive = receive
        self._send = send
        self.has_begun = False

    @property
    def is_over(self) -> bool:
        return self._left < 0

    async def receive(self) -> Message:
        if not self.is_over:
            message = await self._receive()
            self._left -= len(message.get("body", b""))
            if not self.is_over:
                return message
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.is_over and not self.has_begun:
            return  # what an app says to somebody who has gone away
        self.has_begun = True
        await self._send(message)
