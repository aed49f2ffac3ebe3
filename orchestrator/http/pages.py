"""The panel at `/` and Swagger UI at `/docs`: static files with strict headers.

Only scripts and styles of this origin run, nothing may frame a page, and none reaches another
host. The panel's files hold no secret and are sent without a key. Two are generated: the style of
the diagram, which the policy forbids inside it, and the settings with a plain control. Links are
relative, so that the pages work below any path.
"""

from __future__ import annotations

import json
import mimetypes
import os
from importlib import resources
from pathlib import Path
from typing import Final

from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.http.head import head_of
from orchestrator.machine import diagram
from orchestrator.settings.fields import ECHOED, SETTINGS, type_of

_FOLDER: Final = resources.files("orchestrator.http") / "panel"
_SLOT: Final = "index.html"  # a slot alone, or one model of a pool
_POOL: Final = "pool.html"
MODEL: Final = "/model"
"""The page of one model, which a pool has: `?name=` says of which."""
_SWAGGER_UI: Final = resources.files("fastapi_swagger.resources")
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


_DOCS: Final = """\
<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>llama-orchestrator: API</title>
  <link rel="icon" href="panel/icon.svg" type="image/svg+xml">
  <link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
  <div id="swagger-ui"></div>
  <noscript>This page needs JavaScript. The document itself:
    <a href="openapi.json">openapi.json</a>.</noscript>
  <script src="docs/swagger-ui-bundle.js"></script>
  <script src="docs/start.js"></script>
</body>
</html>
"""
_START: Final = """\
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""
_PANEL_TEXTS: Final = {
    "/panel/diagram.css": (diagram.STYLE, "text/css"),
    "/panel/fields.js": (_fields(), "text/javascript"),
}
_DOCS_TEXTS: Final = {"/docs": (_DOCS, "text/html"), "/docs/start.js": (_START, "text/javascript")}
_DOCS_FILES: Final = ("swagger-ui.css", "swagger-ui-bundle.js")
PANEL_PATHS: Final = frozenset(
    {"/", MODEL, *_PANEL_TEXTS}
    | {f"/panel/{file.name}" for file in _FOLDER.iterdir() if not file.name.endswith(".html")}
)
PATHS: Final = PANEL_PATHS | {*_DOCS_TEXTS, *(f"/docs/{name}" for name in _DOCS_FILES)}


class _Files(StaticFiles):
    """Sends each file from memory: an answer that is cut off leaves no open file behind."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        answer = super().file_response(full_path, stat_result, scope, status_code)
        if not isinstance(answer, FileResponse):  # not modified
            return answer
        headers = {name: text for name, text in answer.headers.items() if name != "accept-ranges"}
        return Response(Path(full_path).read_bytes(), status_code, headers)


def routes() -> list[BaseRoute]:
    """Return the routes of the pages of a slot; they answer GET and HEAD."""
    return _routes({"/": _SLOT})


def routes_of_pool() -> list[BaseRoute]:
    """Return those of a pool: a page of all models, and one of each."""
    return _routes({"/": _POOL, MODEL: _SLOT})


def _routes(pages: dict[str, str]) -> list[BaseRoute]:
    files = _Files(directory=str(_FOLDER))
    own = [_file(path, files, name) for path, name in pages.items()]
    panel = [_text(path, *text) for path, text in _PANEL_TEXTS.items()]
    return [*own, *panel, *_docs(), Mount("/panel", _compressed(files))]


def _compressed(files: ASGIApp) -> ASGIApp:
    """Send files compressed; HEAD gets the headers that GET gets."""
    compressed = GZipMiddleware(files)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await head_of(compressed, scope, receive, send)
        else:
            await compressed(scope, receive, send)

    return app


def _docs() -> list[BaseRoute]:
    swagger_ui = _Files(directory=str(_SWAGGER_UI))
    return [
        *(_text(path, *text) for path, text in _DOCS_TEXTS.items()),
        *(_file(f"/docs/{name}", swagger_ui, name) for name in _DOCS_FILES),
    ]


def _file(path: str, files: StaticFiles, name: str) -> Route:
    async def send(request: Request) -> Response:
        return await files.get_response(name, request.scope)

    return Route(path, send)


def _text(path: str, text: str, media_type: str) -> Route:
    async def send(_: Request) -> Response:
        return Response(text, media_type=media_type)

    return Route(path, send)
