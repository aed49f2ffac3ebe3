"""API keys, sent as Bearer tokens or in `X-Api-Key`, and compared in constant time.

The health routes need none, because probes carry no secrets, nor do the panel's files, which ask
for the key.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from orchestrator.http import pages
from orchestrator.http.guards import PROBED_PATHS
from orchestrator.http.paths import own_path
from orchestrator.http.problems import http_problem
from orchestrator.pool.keys import EVERYTHING, Grant, digest_of

OPEN_PATHS: Final = frozenset({*PROBED_PATHS, *pages.PANEL_PATHS})
_MEMBER: Final = "llama_orchestrator.grant"


def grant_of(scope: Scope) -> Grant:
    """Return what a request that has passed may do."""
    grant: Grant = scope.get(_MEMBER, EVERYTHING)
    return grant


def _sent(headers: Headers) -> list[bytes]:
    """Return the digests of the keys of a request."""
    given = headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, token = value.partition(" ")
        given += [token] if scheme.lower() == "bearer" else []
    return [digest_of(one.strip()) for one in given]


class Keys:
    """Checks the key of a request, and tells the app what that may do.

    Where there are no keys every request passes. Once there have been some, each needs one: a
    catalogue that is read again without its keys opens no service.

    Args:
        api_keys: May do everything; they must not be empty.
        of_catalogue: Returns the keys of the catalogue as it is now.
    """

    def __init__(
        self, api_keys: Iterable[str] = (), of_catalogue: Callable[[], Iterable[Grant]] = tuple
    ) -> None:
        api_keys = tuple(api_keys)
        if not all(api_keys):
            raise ValueError("an API key must not be empty")
        self._own = tuple(Grant(digest=digest_of(key)) for key in api_keys)
        self._of_catalogue = of_catalogue
        self._were_there = False

    @property
    def grants(self) -> tuple[Grant, ...]:
        """All keys as they are now."""
        return (*self._own, *self._of_catalogue())

    @property
    def are_needed(self) -> bool:
        """Whether requests need a key."""
        self._were_there = self._were_there or bool(self.grants)
        return self._were_there

    def hold(self, grant: Grant) -> bool:
        """Whether what a key was granted holds still."""
        return grant in self.grants if self.are_needed else grant is EVERYTHING

    def __call__(self, scope: Scope) -> Response | None:
        """Return the refusal of a request, or None."""
        if not self.are_needed:
            return None
        sent = _sent(Headers(scope=scope))
        grants = self.grants
        found = [one for key in sent for one in grants if hmac.compare_digest(key, one.digest)]
        if found:
            scope[_MEMBER] = found[0]
        elif own_path(scope) not in OPEN_PATHS:
            detail = "send the API key as `Authorization: Bearer KEY` or as `X-Api-Key: KEY`"
            return http_problem(401, detail, {"WWW-Authenticate": "Bearer"})
        return None
