"""Routes that find models: those on this machine, and the variants of any."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.params import Depends

from orchestrator.base import workers
from orchestrator.http import openapi, schemas
from orchestrator.http.bodies import json_body, validated, while_connected
from orchestrator.http.openapi import documented
from orchestrator.http.problems import Responder
from orchestrator.http.shutdown import Shutdown
from orchestrator.runtime.answers import OnDisk, Variants
from orchestrator.settings.request import LoadRequest


def on_disk(
    routes: APIRouter,
    look: Callable[[], OnDisk],
    responder: Responder,
    path: str = "/on-disk",
    checks: Sequence[Depends] = (),
) -> None:
    @routes.get(path, dependencies=checks, **documented(OnDisk))
    async def models_on_disk() -> Response:
        """Return the models that need no download, and the room for others: free disk space where
        the Hub's cache is, and free memory by device.
        """
        return responder.json((await workers.waited(look)).as_dict())


def variants(
    routes: APIRouter,
    ask: Callable[[LoadRequest], Awaitable[Variants]],
    responder: Responder,
    shutdown: Shutdown,
    path: str = "/variants",
    checks: Sequence[Depends] = (),
) -> None:
    document = documented(Variants, *openapi.VARIANTS, body=schemas.VariantsBody)

    @routes.post(path, dependencies=checks, **document)
    async def variants_of_a_model(request: Request) -> Response:
        """Return the variants of a model, on disk or on the Hub, with their sizes."""
        body = validated(schemas.VariantsBody, await json_body(request))
        wanted = LoadRequest.from_dict(body.model_dump(exclude_unset=True))
        listing = shutdown.wait(ask(wanted))
        return responder.json((await while_connected(request, listing)).as_dict())
