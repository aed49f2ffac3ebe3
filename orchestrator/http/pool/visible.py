"""A pool as the holder of a key sees it: what it may not see is like what there is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from fastapi import Request
from starlette.types import Scope

from orchestrator.errors import InvalidCatalogue
from orchestrator.http.guards.keys import Keys, grant_of
from orchestrator.http.problems import Forbidden
from orchestrator.pool.catalogue import Catalogue, Changes, Match
from orchestrator.pool.entries import Entry
from orchestrator.pool.keys import Grant
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.pool.status import ModelStatus, PoolStatus

_READS: Final = ("GET", "HEAD")
_LISTS: Final = ("evict", "evicted")
_NEEDS_ADMIN: Final = "this key may use /v1 and read: give its table admin = true to allow more"


class Visible:
    """A pool, as a key sees it now.

    Attributes:
        grant: What the key may do.
    """

    def __init__(self, pool: AsyncModelPool, keys: Keys, grant: Grant) -> None:
        self._pool = pool
        self._keys = keys
        self.grant = grant

    @property
    def catalogue(self) -> Catalogue:
        return self._pool.catalogue.only(self.grant.models)

    def match(self, name: str | None) -> Match:
        """Return what a name stands for; see `ModelPool.match`."""
        return self.catalogue.match(name)

    def entry(self, name: str | None) -> Entry:
        return self.match(name).entry

    def status(self) -> PoolStatus:
        return self._pool.status_of(self.catalogue)

    def model_status(self, name: str) -> ModelStatus:
        return self._pool.model_status(self.entry(name).name)

    def told(self, members: Mapping[str, Any]) -> dict[str, Any]:
        """Return an answer without the names of models that went, or would go, for another one."""
        told = dict(members)
        for name in _LISTS:
            if told.get(name):
                told[name] = self._names(told[name])
        if isinstance(told.get("outcome"), Mapping):
            told["outcome"] = self.told(told["outcome"])
        return told

    def changes(self, changes: Changes) -> Changes:
        """Return what a new catalogue has changed for this key."""
        lists = changes.as_dict().items()
        return Changes(**{name: tuple(self._names(names)) for name, names in lists})

    def mistake(self, error: InvalidCatalogue) -> InvalidCatalogue:
        """Return the error for a mistake in the catalogue, which may name other models."""
        if self.grant.models is None:
            return error
        what = "the catalogue has a mistake, and nothing has changed: ask who may see all models"
        return InvalidCatalogue(replace(error.problem, message=what, field=None))

    def check_admin(self, *, of_all: bool = False) -> None:
        """Refuse a key that may only read, or one that may not see all models."""
        if not self.grant.admin:
            raise Forbidden(_NEEDS_ADMIN)
        if of_all and self.grant.models is not None:
            raise Forbidden("this key is for some models only: no model can be added with it")

    @property
    def holds(self) -> bool:
        """Whether the key still is what it was when the request came."""
        return self._keys.hold(self.grant)

    def _names(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.grant.sees(name)]


class Eyes:
    """Makes the view of each request.

    Args:
        pool: The pool.
        keys: The keys of the service.
    """

    def __init__(self, pool: AsyncModelPool, keys: Keys) -> None:
        self._pool = pool
        self._keys = keys

    def of(self, scope: Scope) -> Visible:
        return Visible(self._pool, self._keys, grant_of(scope))

    async def seen(self, request: Request) -> Visible:
        """A dependency that returns the view of a request."""
        return self.of(request.scope)

    async def permitted(self, request: Request) -> None:
        """A dependency of all routes: a model that cannot be seen is not found, whatever is asked
        of it, and only an admin changes things.
        """
        seen, name = self.of(request.scope), request.path_params.get("name")
        if name is not None:
            seen.entry(name)
        if request.method not in _READS:
            seen.check_admin()
