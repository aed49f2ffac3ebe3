"""What every answer says to browsers beside its content.

A type is what it is said to be; and what the API answers is true for a moment only, and nobody
else's to embed. What an answer says of itself is left alone.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_TYPED: Final = ((b"x-content-type-options", b"nosniff"),)
_FLEETING: Final = (
    *_TYPED,
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class AnswerHeaders:
    """ASGI middleware.

    Args:
        fleeting: Paths whose answers are not to be kept, and what is below them.
    """

    def __init__(self, app: ASGIApp, fleeting: tuple[str, ...]) -> None:
        self._app = app
        self._fleeting = fleeting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        added = _FLEETING if scope["path"].startswith(self._fleeting) else _TYPED

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = message.get("headers", [])
                names = {name.lower() for name, _ in given}
                message["headers"] = [*given, *(pair for pair in added if pair[0] not in names)]
            await send(message)

        await self._app(scope, receive, with_headers)
