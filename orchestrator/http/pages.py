"""The panel at `/`: plain files, sent with headers that leave a browser no room.

Only scripts and styles of this origin run, nothing may frame the page, and nothing inside it
reaches another host. The files hold no secret: they are sent without a key. The drawing of the
machine is styled by a file made from the same text that is inside the drawing (`diagram.STYLE`),
because a style inside it would not be allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orchestrator.machine import diagram

_FOLDER: Final = resources.files("orchestrator.http") / "panel"
_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_PAGE: Final = "index.html"
_DRAWING: Final = "diagram.css"
CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # an update of this package must not meet old scripts
}


def _names() -> tuple[str, ...]:
    found = (file.name for file in _FOLDER.iterdir())
    return (*sorted(n for n in found if n.rpartition(".")[2] in _TYPES), _DRAWING)


_FILES: Final = {"/" if name == _PAGE else f"/panel/{name}": name for name in _names()}
PATHS: Final = frozenset(_FILES)
"""What is sent without a key."""


def routes() -> list[Route]:
    """Return the routes of the panel; they answer GET and HEAD."""
    return [Route(path, _sender(name)) for path, name in _FILES.items()]


def _sender(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        body, tag = _content(name)
        headers = {**HEADERS, "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=_TYPES[name.rpartition(".")[2]])

    return send


@lru_cache
def _content(name: str) -> tuple[bytes, str]:
    body = diagram.STYLE.encode() if name == _DRAWING else (_FOLDER / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
