"""Names of models in paths: an alias may have slashes."""

from __future__ import annotations

from urllib.parse import quote, unquote

from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.http.paths import own_path

_SLASH = "\0"  # no name has one


def in_path(name: str) -> str:
    """Return a name as one part of a path."""
    return quote(name, safe="")


class _Name(Convertor[str]):
    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return value.replace(_SLASH, "/")

    def to_string(self, value: str) -> str:
        return in_path(value)


register_url_convertor("model", _Name())


def keep_names_whole(app: ASGIApp, prefix: str) -> ASGIApp:
    """ASGI middleware: a slash that was sent as `%2F` below `prefix` separates no parts there.

    ASGI servers decode the path before a router takes it apart.
    """

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if b"%2f" in raw.lower() and own_path(scope).startswith(prefix):
            parts = raw.partition(b"?")[0].decode("latin-1").split("/")
            path = "/".join(unquote(part).replace("/", _SLASH) for part in parts)
            scope = {**scope, "path": path}
        await app(scope, receive, send)

    return dispatch
