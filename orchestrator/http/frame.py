"""An app around some routes: documents, pages, what passes requests on, and the guards in front."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

import orchestrator
from orchestrator.http import openapi
from orchestrator.http.activity.activity import Activity
from orchestrator.http.guards import PROBED_PATHS, Check, guard, limits, origins
from orchestrator.http.guards.keys import Keys
from orchestrator.http.passthrough import below
from orchestrator.http.problems import Responder


class PassesOn(Protocol):
    """What answers below `/v1`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...
    async def close(self) -> None: ...


def framed(
    routers: Sequence[APIRouter],
    pages: Sequence[BaseRoute],
    passes_on: PassesOn,
    responder: Responder,
    activity: Activity,
    *,
    about: str,
    v1: openapi.PassedOn,
    keys: Keys,
    hosts: frozenset[str],
    max_body_bytes: int,
    not_stored: tuple[str, ...],
) -> FastAPI:
    """Return the app.

    Args:
        about: The description of its OpenAPI document.
        v1: What that says about `/v1`.
        keys: Of the service.
        hosts: From `checked_hosts`.
        not_stored: Prefixes of the paths of the API, besides the health routes.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with activity.lifespan():
            yield
            await passes_on.close()

    app = FastAPI(
        docs_url=None,  # its page would load scripts of another host
        redoc_url=None,
        title="llama-orchestrator",
        description=about,
        version=orchestrator.__version__,
        lifespan=lifespan,
    )
    responder.install(app)
    for router in routers:
        app.include_router(router)
    app.router.routes.extend(pages)
    openapi.complete(app, v1, needs_key=keys.are_needed)
    app.add_middleware(below, prefix="/v1/", other=passes_on)
    app.add_middleware(limits.limit_body, max_bytes=max_body_bytes)
    checks: list[Check] = [origins.refuse_foreign(hosts), keys]
    app.add_middleware(guard, checks=checks, not_stored=(*not_stored, *PROBED_PATHS))
    app.add_middleware(limits.linger)
    return app


def is_exposed(keys: Keys, hosts: frozenset[str]) -> bool:
    """Return whether others than the programs of this machine's user may send requests."""
    return keys.are_needed or origins.has_foreign_name(hosts)
