"""Limits of request bodies, and what is left of a body once it is answered.

A declared length over the limit is refused before the body is read, a body of unknown length as
soon as it exceeds the limit. Nothing is buffered.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.http.bodies import is_longer
from orchestrator.http.problems import http_problem

MAX_BODY_BYTES: Final = 256 << 20  # pictures in base64 are tens of MB
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
BODY_PAUSE_S: Final = 20.0
LINGER_BYTES: Final = 4 * MAX_BODY_BYTES
LINGER_S: Final = 30.0
_LINGER_PAUSE_S: Final = 5.0


def limit_body(app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> ASGIApp:
    """ASGI middleware: a client that exceeds a limit has disconnected, as far as the app can see.

    The client gets 413, or 408 if its body pauses for too long, unless its answer has begun.
    """

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        framing = {name: value for name, value in scope.get("headers", ()) if name in _FRAMING}
        if scope["type"] != "http" or not framing:  # no body
            await app(scope, receive, send)
            return
        length, body = framing.get(b"content-length", b"0"), _Body(receive, max_bytes)
        has_begun = False
        if is_longer(length, max_bytes):
            await body.too_large()(scope, receive, send)
            return

        async def send_unless_refused(message: Message) -> None:
            nonlocal has_begun
            if body.refusal is None or has_begun:
                has_begun = True
                await send(message)

        await app(scope, body.receive, send_unless_refused)
        if body.refusal is not None and not has_begun:
            await body.refusal(scope, receive, send)

    return limited


class _Body:
    """The body of one request, up to its first fault.

    Attributes:
        refusal: The answer to that fault.
    """

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self.refusal: Response | None = None
        self._receive = receive
        self._max_bytes = self._left = max_bytes
        self._is_read = False

    async def receive(self) -> Message:
        if self.refusal is None:
            try:
                async with asyncio.timeout(None if self._is_read else BODY_PAUSE_S):
                    message = await self._receive()
            except TimeoutError:
                self.refusal = _closing(408, f"the body must not pause for {BODY_PAUSE_S:g} s")
            else:
                self._left -= len(message.get("body", b""))
                self._is_read = not message.get("more_body")
                if self._left >= 0:
                    return message
                self.refusal = self.too_large()
        return {"type": "http.disconnect"}

    def too_large(self) -> Response:
        return _closing(413, f"the body must not exceed {self._max_bytes} bytes")


def _closing(status: int, detail: str) -> Response:
    """Close the connection: it is not read any further to find the next request."""
    return http_problem(status, detail, {"Connection": "close"})


def linger(app: ASGIApp, max_bytes: int = LINGER_BYTES) -> ASGIApp:
    """ASGI middleware: read and discard the rest of a body whose answer is complete, so that a
    client that is still sending gets the answer.

    If a connection is closed with unread input, the kernel resets it, and the client may lose what
    it has not read yet (RFC 9112, 9.6). Bounded in bytes and time, because the client decides how
    much it sends.
    """

    async def lingering(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _FRAMING.isdisjoint(dict(scope.get("headers", ()))):
            await app(scope, receive, send)
            return
        is_read = False

        async def receive_to_the_end() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body")  # a disconnect has none either
            return message

        async def discard() -> None:
            left = max_bytes
            while not is_read and left > 0:
                async with asyncio.timeout(_LINGER_PAUSE_S):
                    left -= len((await receive_to_the_end()).get("body", b""))

        async def send_and_discard(message: Message) -> None:
            if is_read or message["type"] != "http.response.body" or message.get("more_body"):
                await send(message)
                return
            await send({**message, "more_body": True})  # all that the client waits for
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await discard()
            await send({"type": "http.response.body", "body": b""})

        await app(scope, receive_to_the_end, send_and_discard)

    return lingering
