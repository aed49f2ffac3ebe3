"""The panel at `/`: static files with strict headers.

Only scripts and styles of this origin run, nothing may frame the page, and it reaches no other
host. The files hold no secret and are sent without a key. Two are generated: the style of the
diagram, which the policy forbids inside it, and the settings with a plain control.
"""

from __future__ import annotations

import json
import mimetypes
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from orchestrator.machine import diagram
from orchestrator.settings.fields import ECHOED, SETTINGS, type_of

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
    "Cache-Control": "no-cache",  # after an update, no script may be of the old version
}
"""Sent with every file, by `guard`."""

mimetypes.add_type("text/javascript", ".js")  # some registries say text/plain


def _fields() -> str:
    """Return a module of the panel with the settings that have a label."""
    controls = {int: "number", float: "number", bool: "check"}
    fields = [
        {
            "name": name,
            "label": row.label,
            "control": "secret" if row.is_secret else controls.get(type_of(name), "text"),
            "choices": row.choices or None,
            "blank": row.blank,
            "standard": row.default,
            "isShown": name in ECHOED,
        }
        for name, row in SETTINGS.items()
        if row.label
    ]
    return f"export const FIELDS = {json.dumps(fields, indent=1)};\n"


_GENERATED: Final = {
    "/panel/diagram.css": (diagram.STYLE, "text/css"),
    "/panel/fields.js": (_fields(), "text/javascript"),
}
PATHS: Final = frozenset(
    {"/", *_GENERATED, *(f"/panel/{file.name}" for file in _FOLDER.iterdir() if file.name != _PAGE)}
)


def routes() -> list[BaseRoute]:
    """Return the routes of the panel; they answer GET and HEAD."""
    files = StaticFiles(directory=str(_FOLDER))

    async def page(request: Request) -> Response:
        return await files.get_response(_PAGE, request.scope)

    async def generated(request: Request) -> Response:
        text, media_type = _GENERATED[request.url.path]
        return Response(text, media_type=media_type)

    ours = [Route(path, generated) for path in _GENERATED]
    return [Route("/", page), *ours, Mount("/panel", files)]
