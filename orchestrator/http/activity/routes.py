"""`/api/activity` and `/api/usage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Scope

from orchestrator.http import openapi
from orchestrator.http.activity.activity import Activity
from orchestrator.http.activity.store import MOST, Served
from orchestrator.http.activity.usage import Usage
from orchestrator.http.openapi import documented
from orchestrator.http.problems import AsciiJSON
from orchestrator.pool.keys import Grant

_LIMIT: Final = 100
Model = Annotated[str | None, Query(description="only what is of this model")]


def add(
    routes: APIRouter,
    activity: Activity,
    granted: Callable[[Scope], Grant],
    named: Callable[[Scope, str], str],
) -> None:
    """Add the routes.

    Args:
        granted: Returns what a request may do: without `admin` it sees what its key has asked.
        named: Returns the model that a caller means. Raises ModelNotFound.
    """

    def viewed(request: Request, model: str | None) -> _View:
        return _View(granted(request.scope), model and named(request.scope, model))

    @routes.get("/api/activity", **documented(list[Served], 404, *openapi.QUERY))
    async def recent(
        request: Request,
        model: Model = None,
        limit: Annotated[int, Query(ge=1, le=MOST)] = _LIMIT,
    ) -> Response:
        """Return the last requests below `/v1`, newest first. A key that is no admin's sees its
        own.
        """
        view = viewed(request, model)
        found = await activity.recent(lambda one: view.request(one.model, one.key), limit)
        return AsciiJSON([one.as_dict() for one in found])

    @routes.get("/api/usage", **documented(Usage, 404, *openapi.QUERY))
    async def usage(
        request: Request,
        model: Model = None,
        minutes: Annotated[float, Query(gt=0, le=60, allow_inf_nan=False)] = 5.0,
    ) -> Response:
        """Return requests, tokens and memory over the last minutes, in steps of some seconds."""
        view = viewed(request, model)
        await activity.sample()
        return AsciiJSON(activity.meter.usage(view.request, view.moment, minutes).as_dict())


class _View:
    """What a key sees of one model, or of all of them."""

    def __init__(self, grant: Grant, model: str | None) -> None:
        self._grant = grant
        self._model = model

    def request(self, model: str | None, key: str | None) -> bool:
        """Whether it sees a request of a key for a model; None: for none that there is."""
        is_own = key == self._grant.name
        if not is_own and (not self._grant.admin or (model is None and self._grant.models)):
            return False
        return self._model is None if model is None else self.moment(model)

    def moment(self, model: str) -> bool:
        """Whether it sees what a model does."""
        return self._model in (None, model) and self._grant.sees(model)
