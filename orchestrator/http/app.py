"""Routes under `/api/inference`, and an app of our own around them.

Each route reads its body, asks the orchestrator and sends the answer's `as_dict`. Nothing here
blocks the event loop: what looks at files runs in a thread, what waits is awaited. A client that
goes away during a load withdraws only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi_offline import FastAPIOffline
from starlette.responses import StreamingResponse

import orchestrator
from orchestrator.errors import NotLoaded
from orchestrator.http import openapi, pages, schemas
from orchestrator.http.bodies import checked, json_body, while_connected
from orchestrator.http.guards.headers import AnswerHeaders
from orchestrator.http.guards.keys import PROBED_PATHS, RequireKey, shareable
from orchestrator.http.guards.limits import MAX_BODY_BYTES, LimitBody
from orchestrator.http.guards.origins import RefuseForeign, checked_hosts
from orchestrator.http.metrics import MEDIA_TYPE as MEDIA_TYPE_METRICS
from orchestrator.http.metrics import Metrics
from orchestrator.http.openapi import answers, problems, sends, takes
from orchestrator.http.passthrough import HELD_S, MAX_HELD, Below, PassThrough
from orchestrator.http.problems import Answers, Json
from orchestrator.machine.commands import CancelAnswer
from orchestrator.machine.plan import Plan
from orchestrator.machine.states import State
from orchestrator.runtime.answers import (
    LoadOutcome,
    LoadProgress,
    Options,
    Status,
    UnloadOutcome,
    Variants,
)
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.server.output import MAX_LINES
from orchestrator.settings import checks
from orchestrator.settings.request import LoadRequest

PREFIX: Final = "/api/inference"
_PROGRESS_EVERY_S: Final = 0.25
_MAX_WAIT_S: Final = 300.0


def create_app(
    orch: AsyncOrchestrator | None = None,
    *,
    api_keys: Iterable[str] = (),
    allowed_hosts: Iterable[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    held_s: float = HELD_S,
    max_held: int = MAX_HELD,
    **orchestrator_options: Any,
) -> FastAPI:
    """Return an app whose lifespan starts the orchestrator and closes it.

    Args:
        orch: The orchestrator to serve; None makes one of `orchestrator_options`.
        api_keys: When given, every request but the health routes needs one as a Bearer token.
        allowed_hosts: Names by which the service may be called, beside `localhost` and its
            addresses. Others are refused, as are requests of web pages of another origin.
        max_body_bytes: The most that a request may send.
        held_s: Seconds that a request below `/v1` waits for a load in flight.
        max_held: How many requests may wait so.
        **orchestrator_options: As for `AsyncOrchestrator`; with keys, `protect_server` is on, so
            that nobody gets round them by the server's own port, which takes the same keys.

    Raises:
        TypeError: both an orchestrator and options for one.
        InvalidRequest: an option is not usable.

    An ASGI server waits for open requests before it ends a lifespan: give it a limit for that
    (uvicorn: `timeout_graceful_shutdown`), because an event stream ends with the orchestrator only.
    """
    if orch is not None and orchestrator_options:
        raise TypeError("give an orchestrator or the options for one, not both")
    keys = tuple(api_keys)
    options = {"protect_server": shareable(keys), **orchestrator_options}
    served = AsyncOrchestrator(**options) if orch is None else orch
    hosts = checked_hosts(allowed_hosts)
    passed_on = PassThrough(served, held_s=held_s, max_held=max_held)
    metrics = Metrics(served, lambda: passed_on.held)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await passed_on.close()

    app = FastAPIOffline(
        redoc_url=None,
        title="llama-orchestrator",
        version=orchestrator.__version__,
        lifespan=lifespan,
    )
    told = Answers(served.known_paths)
    told.install(app)
    app.include_router(router(served))
    app.include_router(_health(served, metrics, told))
    app.router.routes.extend(pages.routes())
    openapi.describe(app, wants_key=bool(keys))
    app.add_middleware(Below, prefix="/v1/", app_below=passed_on)
    app.add_middleware(LimitBody, max_bytes=max_body_bytes)
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    app.add_middleware(RefuseForeign, allowed_hosts=hosts)
    app.add_middleware(AnswerHeaders, fleeting=(PREFIX, "/metrics", *PROBED_PATHS))
    return app


def router(orch: AsyncOrchestrator) -> APIRouter:
    """Return the routes of an orchestrator, to be included in an app that exists already.

    They bring a lifespan that starts the orchestrator and closes it, which FastAPI joins to the
    app's own.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with orch:
            yield

    told = Answers(orch.known_paths)
    routes = APIRouter(
        prefix=PREFIX,
        route_class=told.route(),
        tags=["inference"],
        lifespan=lifespan,
    )
    _add_loads(routes, orch, told)
    _add_requests(routes, orch, told)
    _add_views(routes, orch, told)
    _add_streams(routes, orch)
    return routes


def _add_loads(routes: APIRouter, orch: AsyncOrchestrator, told: Answers) -> None:
    """A load, and what became of it."""

    @routes.post(
        "/load",
        openapi_extra=takes(schemas.LoadBody),
        responses={
            **answers(LoadOutcome, *openapi.LOAD),
            202: {"model": schemas.Accepted, "description": "Accepted (`wait=false`)"},
        },
    )
    async def load(request: Request, *, wait: bool = True) -> Response:
        wanted = LoadRequest.from_dict(await json_body(request))
        if wait:
            return told.json((await while_connected(request, orch.load(wanted))).as_dict())
        generation = await orch.submit(wanted)
        where = request.url_for("load_state", generation=str(generation)).path
        return told.json({"generation": generation}, 202, {"Location": where})

    @routes.get(
        "/loads/{generation}",
        responses=answers(schemas.LoadState, 404, *openapi.READ),
    )
    async def load_state(
        generation: int,
        wait_s: Annotated[float, Query(ge=0, le=_MAX_WAIT_S, allow_inf_nan=False)] = 0.0,
    ) -> Response:
        """Say what became of a load. With `wait_s` the answer waits for that for so long, which
        follows a long load through proxies that cut a silent request.
        """
        try:
            found = orch.past_load(generation).as_dict()
            if "outcome" not in found and wait_s:
                await orch.settled(generation, wait_s)
                found = orch.past_load(generation).as_dict()
        except KeyError:
            raise HTTPException(404, f"no load has generation {generation}") from None
        return told.json(
            {name: found[name] for name in schemas.LoadState.model_fields if name in found}
        )

    @routes.get("/loads", responses=answers(schemas.Loads, *openapi.READ))
    async def loads(limit: Annotated[int, Query(ge=1, le=256)] = 20) -> Response:
        return told.json({"loads": [load.as_dict() for load in orch.history(limit)]})


def _add_requests(routes: APIRouter, orch: AsyncOrchestrator, told: Answers) -> None:
    """What changes something beside a load, or would."""

    @routes.post(
        "/unload",
        openapi_extra=takes(schemas.UnloadBody, required=False),
        responses=answers(UnloadOutcome, *openapi.ASK),
    )
    async def unload(request: Request) -> Response:
        body = checked(schemas.UnloadBody, await json_body(request, required=False))
        return told.json((await orch.unload(body.model_path)).as_dict())

    @routes.post(
        "/cancel",
        openapi_extra=takes(schemas.CancelBody),
        responses=answers(CancelAnswer, *openapi.ASK),
    )
    async def cancel(request: Request) -> Response:
        body = checked(schemas.CancelBody, await json_body(request))
        request_id = checks.request_id("load_request_id", body.load_request_id)
        return told.json({"cancelled": await orch.cancel(request_id, body.generation)})

    @routes.post(
        "/plan",
        openapi_extra=takes(schemas.LoadBody),
        responses=answers(Plan, *openapi.PLAN),
    )
    async def plan(request: Request) -> Response:
        wanted = LoadRequest.from_dict(await json_body(request))
        plan = await asyncio.to_thread(orch.plan, wanted)
        return told.json(plan.as_dict(), names=plan.names)

    @routes.post(
        "/variants",
        openapi_extra=takes(schemas.VariantsBody),
        responses=answers(Variants, *openapi.VARIANTS),
    )
    async def variants(request: Request) -> Response:
        body = checked(schemas.VariantsBody, await json_body(request))
        wanted = LoadRequest.from_dict(body.model_dump(exclude_unset=True))
        return told.json((await while_connected(request, orch.variants(wanted))).as_dict())


def _add_views(routes: APIRouter, orch: AsyncOrchestrator, told: Answers) -> None:
    """What only reads: answered in microseconds, also while a load runs."""

    @routes.get("/status", responses=answers(Status, *openapi.LOOK))
    async def status() -> Response:
        return told.json(orch.status().as_dict())

    @routes.get(
        "/load-progress",
        responses=answers(LoadProgress, *openapi.LOOK),
    )
    async def load_progress() -> Response:
        return told.json(orch.progress().as_dict())

    @routes.get("/logs", responses=answers(schemas.Logs, *openapi.READ))
    async def logs(
        lines: Annotated[int, Query(ge=1, le=MAX_LINES)] = 200, *, follow: bool = False
    ) -> Response:
        if follow:
            coming = (told.paths.now().text(line) + "\n" async for line in orch.follow_logs(lines))
            return StreamingResponse(coming, media_type="text/plain; charset=utf-8")
        return told.json({"lines": list(orch.logs(lines))})

    @routes.get(
        "/options",
        responses=answers(Options, 424, *openapi.READ),
    )
    async def options() -> Response:
        return told.json((await asyncio.to_thread(orch.options)).as_dict())

    @routes.get(
        "/diagram.svg",
        response_class=Response,
        responses=sends("image/svg+xml"),
    )
    async def diagram_svg() -> Response:
        from orchestrator.machine import diagram

        return Response(diagram.svg(orch.status().state), media_type="image/svg+xml")

    @routes.get(
        "/diagram.mmd",
        response_class=Response,
        responses=sends("text/plain"),
    )
    async def diagram_mmd() -> Response:
        from orchestrator.machine import diagram

        return Response(diagram.mermaid(orch.status().state), media_type="text/plain")


def _add_streams(routes: APIRouter, orch: AsyncOrchestrator) -> None:
    async def position(last_event_id: Annotated[int | None, Header(ge=0)] = None) -> int:
        """Decided before the answer begins, so that nothing after it can be missed."""
        newest = orch.last_event_id
        if last_event_id is None:
            return newest
        return last_event_id if last_event_id <= newest else 0  # of an earlier orchestrator

    @routes.get(
        "/events",
        dependencies=[Depends(orch.start)],
        response_class=EventSourceResponse,
        responses=problems(*openapi.READ, 409),
    )
    async def events(after: int = Depends(position)) -> AsyncIterator[ServerSentEvent]:
        async with contextlib.aclosing(orch.events(after)) as happened:
            told = None
            coming = asyncio.ensure_future(anext(happened, None))
            try:
                while True:
                    await asyncio.wait({coming}, timeout=_PROGRESS_EVERY_S)
                    if coming.done():
                        if (event := coming.result()) is None:
                            return
                        after = event.id
                        yield ServerSentEvent(id=str(after), event=event.kind, data=event.data)
                        coming = asyncio.ensure_future(anext(happened, None))
                    elif (step := orch.progress()) != told and step.bytes_done is not None:
                        # a step has the number of the event before it: to resume there is enough
                        told = step
                        yield ServerSentEvent(id=str(after), event="progress", data=step.as_dict())
            finally:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)


def _health(orch: AsyncOrchestrator, metrics: Metrics, told: Answers) -> APIRouter:
    routes = APIRouter(route_class=told.route(), tags=["health"])

    @routes.get("/healthz", responses=answers(schemas.Health))
    async def healthz() -> Response:
        return Json({"status": "alive"})

    @routes.get("/readyz", responses=answers(schemas.Health, 503))
    async def readyz() -> Response:
        state = orch.status().state
        if state is not State.HEALTHY:
            raise NotLoaded.because(f"no model is Healthy: the state is {state}")
        return Json({"status": "ready"})

    @routes.get(
        "/metrics",
        response_class=Response,
        responses=sends("text/plain"),
    )
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=MEDIA_TYPE_METRICS)

    return routes
