"""Routes of all models of a pool: what there is, what is added and removed, all events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from orchestrator.errors import InvalidCatalogue, MalformedRequest
from orchestrator.http import found, openapi
from orchestrator.http.bodies import json_body, validated
from orchestrator.http.guards import origins
from orchestrator.http.openapi import documented
from orchestrator.http.pool import schemas
from orchestrator.http.pool.names import in_path
from orchestrator.http.pool.streams import Sent, Streams
from orchestrator.http.pool.visible import Eyes, Visible
from orchestrator.http.problems import Responder
from orchestrator.http.shutdown import Shutdown
from orchestrator.pool.catalogue import Changes
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.pool.status import ModelStatus, PoolStatus


def add(
    routes: APIRouter,
    pool: AsyncModelPool,
    eyes: Eyes,
    responder: Responder,
    shutdown: Shutdown,
    is_exposed: Callable[[], bool],
) -> None:
    """Add the routes; `is_exposed` says whether others than this machine's user send requests."""
    viewed = Depends(eyes.seen)
    _add_finding(routes, pool, responder, shutdown, viewed)
    _add_pin(routes, pool, responder)

    @routes.get("/api/models", **documented(PoolStatus))
    async def models(seen: Visible = viewed) -> Response:
        """Return the budget, every model and who waits."""
        return responder.json(seen.status().as_dict())

    document = documented(ModelStatus, *openapi.CHANGE)
    document["responses"][201] = document["responses"].pop(200)
    content = {"application/json": {"schema": schemas.ENTRY_BODY}}
    document["openapi_extra"] = {"requestBody": {"required": True, "content": content}}

    @routes.post("/api/models", status_code=201, **document)
    async def add_model(request: Request, seen: Visible = viewed) -> Response:
        """Add a model. It survives a re-read of the catalogue, but not a restart."""
        seen.check_admin(of_all=True)
        fields = await json_body(request)
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise MalformedRequest.because("name is required, and a text", field="name")
        is_strict = is_exposed() or origins.is_from_elsewhere(request.scope)
        made = await pool.add_sent(name, fields, is_strict=is_strict)
        where = f"{request.scope.get('root_path', '')}/api/models/{in_path(name)}"
        return responder.json(made.as_dict(), status_code=201, headers={"Location": where})

    @routes.get("/api/models/{name:model}", **documented(ModelStatus, 404, 422))
    async def model(name: str, seen: Visible = viewed) -> Response:
        """Return one model."""
        return responder.json(seen.model_status(name).as_dict())

    document = documented(ModelStatus, 404, 422, 503)
    document["responses"][204] = {"description": "It is gone, and its slot empty."}
    del document["responses"][200]

    @routes.delete("/api/models/{name:model}", status_code=204, **document)
    async def remove_model(name: str) -> Response:
        """Remove a model: its waiters get `model_not_found`, its server is drained and stopped."""
        await shutdown.wait(pool.remove(name))
        return Response(status_code=204)

    @routes.post(
        "/api/catalogue",
        **documented(Changes, *openapi.CHANGE, body=schemas.NoBody, required=False),
    )
    async def catalogue(request: Request, seen: Visible = viewed) -> Response:
        """Read the catalogue's file again. A mistake in it changes nothing."""
        validated(schemas.NoBody, await json_body(request, required=False))
        try:
            changes = await shutdown.wait(pool.reload())
        except InvalidCatalogue as error:
            raise seen.mistake(error) from error
        return responder.json(seen.changes(changes).as_dict())

    streams = Streams(pool, eyes, shutdown)
    reading = Depends(streams.of_all)

    @routes.get(
        "/api/events",
        response_class=EventSourceResponse,
        responses=openapi.problems(*openapi.QUERY),
    )
    async def events(stream: Sent = reading) -> AsyncIterator[ServerSentEvent]:
        """Stream the transitions of all models. `Last-Event-ID` resumes after an event."""
        async for event in stream:
            yield event


def _add_finding(
    routes: APIRouter,
    pool: AsyncModelPool,
    responder: Responder,
    shutdown: Shutdown,
    viewed: Any,
) -> None:
    """Routes for those who may add a model: what there is on this machine and on the Hub."""

    async def adds(seen: Visible = viewed) -> None:
        seen.check_admin(of_all=True)

    may_add = [Depends(adds)]
    found.on_disk(routes, pool.on_disk, responder, "/api/on-disk", may_add)
    found.variants(routes, pool.variants, responder, shutdown, "/api/variants", may_add)


def _add_pin(routes: APIRouter, pool: AsyncModelPool, responder: Responder) -> None:
    @routes.post(
        "/api/models/{name:model}/pin",
        **documented(ModelStatus, 404, *openapi.CHANGE, body=schemas.PinBody, required=False),
    )
    async def pin(request: Request, name: str) -> Response:
        """Pin a model or unpin it, until the catalogue's file is read again or the pool ends."""
        body = validated(schemas.PinBody, await json_body(request, required=False))
        return responder.json((await pool.pin(name, pinned=body.pinned)).as_dict())
