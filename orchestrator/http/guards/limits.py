"""A limit on the size of request bodies.

A declared length over the limit is refused before the body is read, a body of unknown length as
soon as it exceeds the limit. Nothing is buffered.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.http.problems import http_problem

MAX_BODY_BYTES: Final = 256 << 20  # pictures in base64 are tens of MB
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_MAX_DIGITS: Final = 18  # int() refuses thousands of them


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
