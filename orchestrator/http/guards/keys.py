"""API keys, sent as Bearer tokens or in `X-Api-Key`, and compared in constant time.

The health routes need none, because probes carry no secrets, nor do the panel's files, which ask
for the key.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from orchestrator.http import pages
from orchestrator.http.guards import PROBED_PATHS, Check
from orchestrator.http.paths import own_path
from orchestrator.http.problems import http_problem

OPEN_PATHS: Final = frozenset({*PROBED_PATHS, *pages.PANEL_PATHS})


def _sent(headers: Headers) -> list[bytes]:
    """Return the keys of a request."""
    given = headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, token = value.partition(" ")
        given += [token] if scheme.lower() == "bearer" else []
    return [one.strip().encode("latin-1", "replace") for one in given]


def require_key(keys: Sequence[str]) -> Check:
    """Return the check that a request has one of these keys, which must not be empty."""
    if not all(keys):
        raise ValueError("an API key must not be empty")

    def check(scope: Scope) -> Response | None:
        sent = _sent(Headers(scope=scope))
        matches = [hmac.compare_digest(one, key.encode()) for one in sent for key in keys]
        if own_path(scope) in OPEN_PATHS or any(matches):
            return None
        detail = "send the API key as `Authorization: Bearer KEY` or as `X-Api-Key: KEY`"
        return http_problem(401, detail, {"WWW-Authenticate": "Bearer"})

    return check
