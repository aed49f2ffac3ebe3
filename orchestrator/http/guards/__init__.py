"""What a request must pass before it reaches a route, and the headers of every answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.http import pages
from orchestrator.http.paths import own_path

Check = Callable[[Scope], Response | None]
"""Returns the refusal of a request, or None."""

PROBED_PATHS: Final = ("/healthz", "/readyz")
"""For load balancers: no key, and no Host with HTTP/1.0."""

_ALL: Final = {"X-Content-Type-Options": "nosniff"}
_API: Final = {**_ALL, "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}


def guard(app: ASGIApp, checks: Sequence[Check], not_stored: tuple[str, ...]) -> ASGIApp:
    """ASGI middleware: refuse requests, and tell browsers what they may do with answers.

    No type is guessed, answers of the API are neither stored nor embedded by other origins, and the
    panel's files carry their policy. A header that an answer sets itself is left alone.

    Args:
        checks: The first refusal is sent.
        not_stored: Prefixes of the paths of the API.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        refusal = next(filter(None, (check(scope) for check in checks)), None)
        if refusal and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        path = own_path(scope)
        ours = _API if path.startswith(not_stored) else _ALL
        added = pages.HEADERS if path in pages.PATHS else ours

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                for name, value in added.items():
                    headers.setdefault(name, value)
            await send(message)

        await (refusal or app)(scope, receive, send_with_headers)

    return guarded
