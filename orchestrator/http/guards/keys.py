"""The API key: every request carries it as a Bearer token, or is answered with 401.

Compared in constant time, against every key. Only the two health routes need none (probes carry
no secrets and learn nothing from them), and the panel's own files, which ask for the key.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.http import pages
from orchestrator.http.problems import http_problem, respond

PROBED_PATHS: Final = ("/healthz", "/readyz")
OPEN_PATHS: Final = frozenset({*PROBED_PATHS, *pages.PATHS})


def shareable(keys: Sequence[str]) -> Sequence[str] | bool:
    """Return `protect_server` for an API with these keys: a server takes those it can be given
    (llama-server reads them from a list with commas), and is protected whatever they are.
    """
    given = [key for key in keys if "," not in key and key.isascii() and key.isprintable()]
    return given or bool(keys)


class RequireKey:
    """ASGI middleware.

    Args:
        keys: Any of these is good; not empty.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in keys)
        if not self._keys or not all(self._keys):
            raise ValueError("an API key must not be empty")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._admits(scope):
            await self._app(scope, receive, send)
            return
        problem = http_problem(401, "give the API key as `Authorization: Bearer KEY`")
        await respond(problem, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        shown = given.strip().encode("latin-1", "replace")
        found = [hmac.compare_digest(shown, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(found)
