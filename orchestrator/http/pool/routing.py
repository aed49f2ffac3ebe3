"""What llama-server's router answers, for programs that were written for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response

from orchestrator.base.log import event_log
from orchestrator.errors import OrchestratorError
from orchestrator.http import openapi
from orchestrator.http.bodies import json_body, validated
from orchestrator.http.openapi import documented
from orchestrator.http.pool import schemas
from orchestrator.http.pool.listing import listing
from orchestrator.http.pool.visible import Eyes
from orchestrator.http.problems import Responder
from orchestrator.pool.pool import AsyncModelPool

_log = event_log("orchestrator.http")


def add(routes: APIRouter, pool: AsyncModelPool, eyes: Eyes, responder: Responder) -> None:
    under_way: set[asyncio.Task[None]] = set()

    def begin(work: Coroutine[Any, Any, object], name: str) -> Response:
        """Answer at once; what becomes of it is in the listing."""
        task = asyncio.ensure_future(_logged(work, name))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        return responder.json({"success": True})

    async def own(request: Request) -> str:
        body = validated(schemas.RouterBody, await json_body(request))
        return pool.check_own(eyes.of(request.scope).entry(body.model)).name

    @routes.get("/models", **documented(schemas.Listing))
    async def models(request: Request) -> Response:
        """List the models, as `/v1/models` does."""
        return responder.json(listing(pool, eyes.of(request.scope)))

    document = documented(schemas.Done, 404, *openapi.CHANGE, body=schemas.RouterBody)

    @routes.post("/models/load", **document)
    async def load(request: Request) -> Response:
        """Begin to load a model; the answer does not wait for it."""
        name = await own(request)
        return begin(pool.load(name), name)

    @routes.post("/models/unload", **document)
    async def unload(request: Request) -> Response:
        """Begin to unload a model; the answer does not wait for it."""
        name = await own(request)
        return begin(pool.unload(name), name)


async def _logged(work: Coroutine[Any, Any, object], name: str) -> None:
    try:
        await work
    except OrchestratorError as error:
        _log("warning", "request.failed", model=name, error=error.message)
