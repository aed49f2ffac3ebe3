"""A limit on the size of request bodies, and what is left of a body once it is answered.

A declared length over the limit is refused before the body is read, a body of unknown length as
soon as it exceeds the limit. Nothing is buffered.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.http.problems import http_problem

MAX_BODY_BYTES: Final = 256 << 20  # pictures in base64 are tens of MB
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_MAX_DIGITS: Final = 18  # int() refuses thousands of them
_LINGER_BYTES: Final = 4 * MAX_BODY_BYTES
_LINGER_S: Final = 30.0
_LINGER_PAUSE_S: Final = 5.0


def limit_body(app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> ASGIApp:
    """ASGI middleware: a client that exceeds the limit has disconnected, as far as the app can see.

    The client gets 413, unless its answer has begun.
    """
    # closed, so that the rest of the body need not be read to find the next request
    headers = {"Connection": "close"}
    refusal = http_problem(413, f"the body must not exceed {max_bytes} bytes", headers)

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        framing = {name: value for name, value in scope.get("headers", ()) if name in _FRAMING}
        if scope["type"] != "http" or not framing:  # no body
            await app(scope, receive, send)
            return
        length = framing.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > _MAX_DIGITS or int(length) > max_bytes):
            await refusal(scope, receive, send)
            return
        left, has_begun = max_bytes, False

        async def receive_counted() -> Message:
            nonlocal left
            if left >= 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if left >= 0:
                    return message
            return {"type": "http.disconnect"}

        async def send_unless_over(message: Message) -> None:
            nonlocal has_begun
            if left >= 0 or has_begun:
                has_begun = True
                await send(message)

        await app(scope, receive_counted, send_unless_over)
        if left < 0 and not has_begun:
            await refusal(scope, receive, send)

    return limited


def linger(app: ASGIApp, max_bytes: int = _LINGER_BYTES) -> ASGIApp:
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
                async with asyncio.timeout(_LINGER_S):
                    await discard()
            await send({"type": "http.response.body", "body": b""})

        await app(scope, receive_to_the_end, send_and_discard)

    return lingering
