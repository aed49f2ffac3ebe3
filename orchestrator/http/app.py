"""Routes under `/api/inference`, and an app of our own around them.

A route reads its body, calls the orchestrator and sends `as_dict` of the answer. Nothing blocks the
event loop: what reads files runs in a thread. A client that disconnects withdraws only itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.responses import StreamingResponse

from orchestrator.base import workers
from orchestrator.base.threads import NoThread
from orchestrator.errors import NotLoaded, OrchestratorError, ShuttingDown
from orchestrator.http import found, metrics, openapi, pages, schemas
from orchestrator.http.activity.activity import Activity
from orchestrator.http.activity.routes import add as add_activity
from orchestrator.http.activity.usage import Moment
from orchestrator.http.bodies import json_body, validated, while_connected
from orchestrator.http.frame import framed, is_exposed
from orchestrator.http.guards import limits, origins
from orchestrator.http.guards.keys import Keys, grant_of
from orchestrator.http.openapi import documented
from orchestrator.http.passthrough import HELD_S, MAX_HELD, PassThrough
from orchestrator.http.pool.app import pool_app
from orchestrator.http.problems import Responder
from orchestrator.http.shutdown import HOST, Shutdown
from orchestrator.machine import diagram
from orchestrator.machine.commands import CancelAnswer
from orchestrator.machine.plan import Plan
from orchestrator.machine.states import State
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.runtime import answers
from orchestrator.runtime.events import Event
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.server.output import MAX_LINES
from orchestrator.settings.fields import SETTINGS
from orchestrator.settings.request import LoadRequest

_Events = AsyncGenerator[Event | None, None]
PREFIX: Final = "/api/inference"
_MAX_WAIT_S: Final = 300.0
_Requested = Callable[[Request], Awaitable[LoadRequest]]


def create_app(
    orch: AsyncOrchestrator | None = None,
    *,
    pool: AsyncModelPool | None = None,
    api_keys: Iterable[str] = (),
    allowed_hosts: Iterable[str] = (),
    max_body_bytes: int = limits.MAX_BODY_BYTES,
    held_s: float = HELD_S,
    max_held: int = MAX_HELD,
    end_on_signals: bool = True,
    **orchestrator_options: Any,
) -> FastAPI:
    """Return an app whose lifespan starts the orchestrator, or the pool, and closes it.

    Args:
        orch: The orchestrator to serve; None makes one of `orchestrator_options`.
        pool: The pool to serve in place of an orchestrator; see docs/pool.md.
        api_keys: If given, every request needs one, as a Bearer token or in `X-Api-Key`, except for
            the health routes and the panel's files.
        allowed_hosts: Host names of the service besides `localhost` and IP addresses. Requests for
            other names, and requests of web pages of another origin, are refused.
        max_body_bytes: The largest body that a request may have.
        held_s: Seconds that a request below `/v1` waits for a load in flight; those of a pool
            are in its catalogue.
        max_held: How many requests may wait; as above.
        end_on_signals: End event streams, followed logs and waits at SIGINT and SIGTERM, because
            an ASGI server waits for them before it ends the lifespan. Without it, close the
            orchestrator before you stop the server.
        **orchestrator_options: As for `AsyncOrchestrator`.

    Raises:
        TypeError: more than one of a pool, an orchestrator, and options for one.
        InvalidRequest: an option cannot be used.
    """
    hosts = origins.checked_hosts(allowed_hosts)
    around: dict[str, Any] = {"hosts": hosts, "max_body_bytes": max_body_bytes}
    shutdown = HOST if end_on_signals else Shutdown()
    if pool is not None:
        if orch is not None or orchestrator_options:
            raise TypeError("give a pool, an orchestrator, or the options for one")
        return pool_app(pool, shutdown, api_keys, around)
    keys = Keys(api_keys)
    if orch is not None and orchestrator_options:
        raise TypeError("give an orchestrator or the options for one, not both")
    orch = orch or AsyncOrchestrator(**orchestrator_options)
    activity = Activity(lambda: orch.slot_folder, lambda: _moment(orch, passed_on.held))
    passed_on = PassThrough(
        orch, held_s=held_s, max_held=max_held, shutdown=shutdown, activity=activity
    )
    responder = Responder(orch.known_paths)
    exposed = is_exposed(keys, hosts)
    return framed(
        [
            _routes(orch, shutdown, is_exposed=exposed),
            _activity(orch, activity, responder, shutdown),
            _health(orch, responder, lambda: passed_on.held),
        ],
        pages.routes(),
        passed_on,
        responder,
        activity,
        about=openapi.DESCRIPTION,
        v1=openapi.V1,
        keys=keys,
        not_stored=("/api/", "/metrics"),
        **around,
    )


def add_error_handlers(app: FastAPI) -> None:
    """Have an app answer an `OrchestratorError` of a route of its own as the API does.

    With the status and the problem document of the error, and `Retry-After` where it helps.
    """
    responder = Responder(tuple)
    for kind in (OrchestratorError, NoThread):
        app.add_exception_handler(kind, responder.failure)


def router(orch: AsyncOrchestrator) -> APIRouter:
    """Return the routes of an orchestrator, to be included in an existing app.

    They bring a lifespan that starts the orchestrator and closes it; FastAPI joins it to the app's.
    Event streams, followed logs and waits end at SIGINT and SIGTERM.
    """
    return _routes(orch, HOST, is_exposed=False)


def _routes(orch: AsyncOrchestrator, shutdown: Shutdown, *, is_exposed: bool) -> APIRouter:
    async def requested(request: Request) -> LoadRequest:
        wanted = LoadRequest.from_dict(await json_body(request))
        if is_exposed or origins.is_from_elsewhere(request.scope):
            orch.check_sent(wanted)
        return wanted

    responder = Responder(orch.known_paths)
    routes = APIRouter(
        prefix=PREFIX,
        route_class=responder.route_class(),
        tags=["inference"],
        lifespan=lambda _: shutdown.lifespan(orch),
        dependencies=[Depends(shutdown.listening)],
    )
    _add_loads(routes, orch, responder, shutdown, requested)
    _add_requests(routes, orch, responder, shutdown, requested)
    _add_queries(routes, orch, responder)
    _add_logs(routes, orch, responder, shutdown)
    _add_events(routes, orch, shutdown)
    return routes


def _add_loads(
    routes: APIRouter,
    orch: AsyncOrchestrator,
    responder: Responder,
    shutdown: Shutdown,
    requested: _Requested,
) -> None:
    document = documented(answers.LoadOutcome, *openapi.LOAD, body=schemas.LoadBody)
    document["responses"][202] = {"model": schemas.Accepted, "description": "With `wait=false`"}

    @routes.post("/load", **document)
    async def load(request: Request, *, wait: bool = True) -> Response:
        """Load a model, and answer when its server is Healthy. With `wait=false` it answers at
        once, and `Location` is where to poll.
        """
        wanted = await requested(request)
        if wait:
            loading = shutdown.wait(orch.load(wanted))
            return responder.json((await while_connected(request, loading)).as_dict())
        generation = await orch.submit(wanted)
        where = request.url_for("load_state", generation=str(generation)).path
        members = {"generation": generation}
        return responder.json(members, status_code=202, headers={"Location": where})

    @routes.get("/loads/{generation}", **documented(schemas.LoadState, 404, *openapi.QUERY))
    async def load_state(
        generation: int,
        wait_s: Annotated[float, Query(ge=0, le=_MAX_WAIT_S, allow_inf_nan=False)] = 0.0,
    ) -> Response:
        """Return the state of a load, and its outcome once it has one. The answer waits up to
        `wait_s` seconds for it, to follow a long load through proxies that cut silent requests.
        """
        found = orch.past_load(generation)
        if found.outcome is None and wait_s:
            with contextlib.suppress(ShuttingDown):
                await shutdown.wait(orch.settled(generation, wait_s))
            found = orch.past_load(generation)
        members = found.as_dict().items()
        return responder.json({n: v for n, v in members if n in schemas.LoadState.model_fields})

    @routes.get("/loads", **documented(schemas.Loads, *openapi.QUERY))
    async def loads(limit: Annotated[int, Query(ge=1, le=256)] = 20) -> Response:
        """Return the last loads, newest first."""
        return responder.json({"loads": [load.as_dict() for load in orch.history(limit)]})


def _add_requests(
    routes: APIRouter,
    orch: AsyncOrchestrator,
    responder: Responder,
    shutdown: Shutdown,
    requested: _Requested,
) -> None:
    @routes.post(
        "/unload",
        **documented(
            answers.UnloadOutcome, *openapi.CHANGE, body=schemas.UnloadBody, required=False
        ),
    )
    async def unload(request: Request) -> Response:
        """Stop the server, and answer when the slot is empty."""
        body = validated(schemas.UnloadBody, await json_body(request, required=False))
        unloading = shutdown.wait(orch.unload(body.model_path, cut=body.cut))
        return responder.json((await unloading).as_dict())

    @routes.post(
        "/prefetch", **documented(answers.PrefetchOutcome, *openapi.LOAD, body=schemas.LoadBody)
    )
    async def prefetch(request: Request) -> Response:
        """Download a model, and answer when all of it is on disk."""
        wanted = await requested(request)
        fetching = shutdown.wait(orch.prefetch(wanted))
        return responder.json((await while_connected(request, fetching)).as_dict())

    @routes.post("/cancel", **documented(CancelAnswer, *openapi.CHANGE, body=schemas.CancelBody))
    async def cancel(request: Request) -> Response:
        """Cancel one load that is in flight."""
        body = validated(schemas.CancelBody, await json_body(request))
        request_id = SETTINGS["load_request_id"].normal("load_request_id", body.load_request_id)
        return responder.json({"cancelled": await orch.cancel(request_id, body.generation)})

    @routes.post("/plan", **documented(Plan, *openapi.LOAD, body=schemas.LoadBody))
    async def plan(request: Request) -> Response:
        """Return what a load would do, and why, without doing it."""
        wanted = await requested(request)
        plan = await workers.waited(partial(orch.plan, wanted))
        return responder.json(plan.as_dict(), plan.names)

    found.variants(routes, orch.variants, responder, shutdown)


def _add_queries(routes: APIRouter, orch: AsyncOrchestrator, responder: Responder) -> None:
    """Routes that only read; a load in flight does not delay them."""

    @routes.get("/status", **documented(answers.Status))
    async def status() -> Response:
        """Return the state, the loaded model and the load in flight."""
        return responder.json(orch.status().as_dict())

    @routes.get("/load-progress", **documented(answers.LoadProgress))
    async def load_progress() -> Response:
        """Return the phase and the bytes of the load in flight."""
        return responder.json(orch.progress().as_dict())

    found.on_disk(routes, orch.on_disk, responder)

    @routes.get("/options", **documented(answers.Options, 424, *openapi.QUERY))
    async def options() -> Response:
        """Return the values that the server binary accepts for two settings."""
        return responder.json((await workers.waited(orch.options)).as_dict())

    @routes.get("/diagram.svg", **documented("image/svg+xml"))
    async def diagram_svg() -> Response:
        """Return a picture of the state machine with the present state marked."""
        return Response(diagram.svg(orch.status().state), media_type="image/svg+xml")

    @routes.get("/diagram.mmd", **documented("text/plain"))
    async def diagram_mmd() -> Response:
        """Return the state machine as Mermaid text with the present state marked."""
        return Response(diagram.mermaid(orch.status().state), media_type="text/plain")


def _add_logs(
    routes: APIRouter, orch: AsyncOrchestrator, responder: Responder, shutdown: Shutdown
) -> None:
    async def followed(lines: int) -> AsyncIterator[str]:
        async with contextlib.aclosing(shutdown.until(orch.log_batches(lines))) as stream:
            async for batch in stream:
                if batch is not None:
                    yield await workers.waited(partial(responder.lines, batch))

    @routes.get("/logs", **documented(schemas.Logs, *openapi.QUERY))
    async def logs(
        lines: Annotated[int, Query(ge=1, le=MAX_LINES)] = 200, *, follow: bool = False
    ) -> Response:
        """Return the last lines of the server's output. `follow=true` streams those to come too."""
        if follow:
            await orch.start(again=False)  # it may fail, which a stream that has begun cannot say
            return StreamingResponse(followed(lines), media_type="text/plain; charset=utf-8")
        return responder.json({"lines": list(orch.logs(lines))})


def _add_events(routes: APIRouter, orch: AsyncOrchestrator, shutdown: Shutdown) -> None:
    async def claimed() -> None:
        await orch.start(again=False)

    async def position(last_event_id: Annotated[int | None, Header(ge=0)] = None) -> int:
        """Taken before the answer begins, so that it misses no event after that."""
        newest = orch.last_event_id
        if last_event_id is None:
            return newest
        return last_event_id if last_event_id <= newest else 0  # of an earlier orchestrator

    async def opened(after: int = Depends(position)) -> AsyncIterator[_Events]:
        """Ends the stream with its answer: the framework leaves one that waits to be read."""
        async with contextlib.aclosing(shutdown.until(orch.events(after))) as stream:
            yield stream

    reading = Depends(opened)

    @routes.get(
        "/events",
        dependencies=[Depends(claimed)],
        response_class=EventSourceResponse,
        responses=openapi.problems(*openapi.QUERY, 409),
    )
    async def events(
        after: int = Depends(position), stream: _Events = reading
    ) -> AsyncIterator[ServerSentEvent]:
        """Stream transitions and progress. `Last-Event-ID` resumes after an event."""
        sent = None
        async for event in stream:
            if event is not None:
                after = event.id
                yield ServerSentEvent(id=str(after), event=event.kind, data=event.data)
            elif (step := orch.progress()) != sent and step.bytes_done is not None:
                # it has the id of the event before it, from which a client can resume
                sent = step
                yield ServerSentEvent(id=str(after), event="progress", data=step.as_dict())


def _activity(
    orch: AsyncOrchestrator, activity: Activity, responder: Responder, shutdown: Shutdown
) -> APIRouter:
    routes = APIRouter(
        route_class=responder.route_class(),
        tags=["activity"],
        dependencies=[Depends(shutdown.listening)],
    )
    add_activity(routes, activity, grant_of, lambda _, name: name)
    return routes


def _moment(orch: AsyncOrchestrator, held: int) -> dict[str, Moment]:
    """Return what the model that is loaded does now."""
    status = orch.status()
    taken = status.loaded.memory if status.loaded is not None else None
    return {"": Moment(status.leases, held, taken.mib if taken is not None else None)}


def _health(orch: AsyncOrchestrator, responder: Responder, held: Callable[[], int]) -> APIRouter:
    routes = APIRouter(route_class=responder.route_class(), tags=["health"])
    counted = metrics.Metrics(orch, held)

    @routes.get("/healthz", responses=openapi.problems())
    async def healthz() -> schemas.Health:
        """Answer as long as the process is alive."""
        return schemas.Health(status="alive")

    @routes.get("/readyz", responses=openapi.problems(503))
    async def readyz() -> schemas.Health:
        """Answer 200 if a model is Healthy, and 503 otherwise."""
        state = orch.status().state
        if state is not State.HEALTHY:
            raise NotLoaded.because(f"no model is Healthy: the state is {state}")
        return schemas.Health(status="ready")

    @routes.get("/metrics", **documented("text/plain"))
    async def prometheus() -> Response:
        """Return the metrics for Prometheus."""
        return Response(counted.render(), media_type=metrics.MEDIA_TYPE)

    return routes
