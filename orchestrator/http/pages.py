"""The panel at `/`: static files, sent with headers that leave a browser no room.

Only scripts and styles of this origin run, nothing may frame the page, and nothing inside it
reaches another host. The files hold no secret: they are sent without a key. Two are made here: the
style of the drawing, which may not be inside it, and the settings that get a plain control.
"""

from __future__ import annotations

import json
import mimetypes
from importlib import resources
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from orchestrator.machine import diagram
from orchestrator.settings.fields import SETTINGS, SHOWN, type_of

_FOLDER: Final = resources.files("orchestrator.http") / "panel"
_PAGE: Final = "index.html"
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


mimetypes.add_type("text/javascript", ".js")  # some registries say text/plain


def _fields() -> str:
    """Return the settings that have a label, as a module of the panel's."""
    controls = {int: "number", float: "number", bool: "check"}
    told = [
        {
            "name": name,
            "label": row.label,
            "control": "secret" if row.is_secret else controls.get(type_of(name), "text"),
            "choices": row.choices or None,
            "blank": row.blank,
            "standard": row.default,
            "isShown": name in SHOWN,
        }
        for name, row in SETTINGS.items()
        if row.label
    ]
    return f"export const FIELDS = {json.dumps(told, indent=1)};\n"


_MADE: Final = {
    "/panel/diagram.css": (diagram.STYLE, "text/css"),
    "/panel/fields.js": (_fields(), "text/javascript"),
}
PATHS: Final = frozenset(
    {"/", *_MADE, *(f"/panel/{file.name}" for file in _FOLDER.iterdir() if file.name != _PAGE)}
)
"""What is sent without a key."""


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def routes() -> list[BaseRoute]:
    """Return the routes of the panel; they answer GET and HEAD."""
    files = _Files(directory=str(_FOLDER))

    async def page(request: Request) -> Response:
        return await files.get_response(_PAGE, request.scope)

    async def made(request: Request) -> Response:
        text, kind = _MADE[request.url.path]
        return Response(text, headers=HEADERS, media_type=kind)

    return [Route("/", page), *(Route(path, made) for path in _MADE), Mount("/panel", files)]
