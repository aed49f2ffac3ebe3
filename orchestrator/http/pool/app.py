"""The app of a pool: its routes, `/v1` by name, health and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request, Response

from orchestrator.base.paths import PathNames, without_folders
from orchestrator.errors import InvalidRequest, NotLoaded, ShuttingDown
from orchestrator.http import openapi, pages, schemas
from orchestrator.http.activity.activity import Activity
from orchestrator.http.activity.routes import add as add_activity
from orchestrator.http.activity.usage import Moment
from orchestrator.http.frame import framed, is_exposed
from orchestrator.http.guards.keys import Keys, grant_of
from orchestrator.http.metrics import MEDIA_TYPE
from orchestrator.http.openapi import documented
from orchestrator.http.paths import PathRenamer
from orchestrator.http.pool import models, one, routing, upload
from orchestrator.http.pool.by_name import ByName
from orchestrator.http.pool.metrics import PoolMetrics
from orchestrator.http.pool.names import keep_names_whole
from orchestrator.http.pool.visible import Eyes
from orchestrator.http.problems import Responder
from orchestrator.http.shutdown import Shutdown
from orchestrator.pool.pool import AsyncModelPool

MODELS: Final = "/api/models"
DEFAULT: Final = "/api/inference"


class PoolResponder(Responder):
    """Hides where files are: the paths are of the catalogue, and no caller has sent them."""

    def renamer(self, names: PathNames = ()) -> PathRenamer:
        return super().renamer(without_folders(names))


def pool_app(
    pool: AsyncModelPool, shutdown: Shutdown, api_keys: Iterable[str], around: dict[str, Any]
) -> FastAPI:
    """Return the app.

    Args:
        api_keys: May do everything, besides the keys of the catalogue.
        around: What `framed` takes besides the routes and the keys.

    Raises:
        TypeError: this is no pool for asyncio.
    """
    if not isinstance(pool, AsyncModelPool):
        raise TypeError(f"pool must be an AsyncModelPool, not {type(pool).__name__}")
    keys = Keys(api_keys, lambda: pool.grants)
    eyes = Eyes(pool, keys)
    responder = PoolResponder(pool.known_paths)
    spool = upload.Spool(lambda: pool.slot_folder, upload.SPOOLED_BYTES)
    counted = PoolMetrics(pool)
    activity = Activity(lambda: pool.slot_folder, lambda: _moments(pool))
    passed_on = ByName(pool, eyes, responder, shutdown, activity, counted.waited, spool)

    async def by_name(request: Request, name: str) -> str:
        return eyes.of(request.scope).entry(name).name

    async def by_default(request: Request) -> str:
        try:
            return eyes.of(request.scope).entry(None).name
        except InvalidRequest as error:
            message = f"{error.message}, below {MODELS}"
            raise InvalidRequest.because(message, field="model") from None

    always = [Depends(shutdown.listening), Depends(eyes.permitted)]
    router = partial(APIRouter, route_class=responder.route_class(), dependencies=always)
    whole = router(tags=["models"], lifespan=lambda _: shutdown.lifespan(pool))
    exposed = partial(is_exposed, keys, around["hosts"])
    models.add(whole, pool, eyes, responder, shutdown, exposed)
    add_activity(whole, activity, grant_of, lambda scope, name: eyes.of(scope).entry(name).name)
    submitted = one.Submitted(pool)
    like_llama = router(tags=["llama-server's router"])
    routing.add(like_llama, pool, eyes, responder)
    each = router(prefix=f"{MODELS}/{{name:model}}", tags=["one model"])
    one.add(each, pool, eyes, responder, shutdown, submitted, by_name)
    default = router(prefix=DEFAULT, tags=["inference"])
    one.add(default, pool, eyes, responder, shutdown, submitted, by_default)
    app = framed(
        [whole, each, default, like_llama, _health(pool, eyes, responder, shutdown, counted)],
        pages.routes_of_pool(),
        passed_on,
        responder,
        activity,
        about=openapi.OF_POOL,
        v1=openapi.V1_OF_POOL,
        keys=keys,
        not_stored=("/api/", "/models", "/metrics"),
        **around,
    )
    app.add_middleware(keep_names_whole, prefix=f"{MODELS}/")
    return app


def _moments(pool: AsyncModelPool) -> dict[str, Moment]:
    """Return what the models do now, and what each holds of the budget."""
    return {
        one.name: Moment(one.leases, one.waiting, pool.reserved_mib(one.name))
        for one in pool.status().models
    }


def _health(
    pool: AsyncModelPool,
    eyes: Eyes,
    responder: Responder,
    shutdown: Shutdown,
    counted: PoolMetrics,
) -> APIRouter:
    routes = APIRouter(route_class=responder.route_class(), tags=["health"])

    @routes.get("/healthz", responses=openapi.problems())
    async def healthz() -> schemas.Health:
        """Answer as long as the process is alive."""
        return schemas.Health(status="alive")

    @routes.get("/readyz", responses=openapi.problems(503))
    async def readyz() -> schemas.Health:
        """Answer 200 once the preloads are settled, and 503 before that and in a shutdown."""
        if shutdown.has_begun:
            raise shutdown.error()
        if pool.has_ended:
            raise ShuttingDown.because("this pool is shutting down")
        if not pool.is_ready:
            raise NotLoaded.because("the models to preload are still loading")
        return schemas.Health(status="ready")

    @routes.get("/metrics", **documented("text/plain"))
    async def prometheus(request: Request) -> Response:
        """Return the metrics for Prometheus. Wants a key that is an admin's."""
        seen = eyes.of(request.scope)
        seen.check_admin()
        return Response(counted.render(seen.grant.models), media_type=MEDIA_TYPE)

    return routes
