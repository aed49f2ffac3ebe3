"""Routes of one model of a pool: below its own path, and below the one of the default model."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.responses import StreamingResponse

from orchestrator.base import workers
from orchestrator.base.tokens import Generation
from orchestrator.errors import OrchestratorError, Problem, ShuttingDown, UnknownGeneration
from orchestrator.http import openapi, schemas
from orchestrator.http.bodies import json_body, validated, while_connected
from orchestrator.http.openapi import documented
from orchestrator.http.pool.names import in_path
from orchestrator.http.pool.schemas import ByHandBody, StopBody, WithdrawBody
from orchestrator.http.pool.streams import Sent, Streams
from orchestrator.http.pool.visible import Eyes, Visible
from orchestrator.http.problems import Responder
from orchestrator.http.shutdown import Shutdown
from orchestrator.machine import diagram
from orchestrator.machine.commands import CancelAnswer
from orchestrator.machine.plan import Plan
from orchestrator.machine.states import State
from orchestrator.pool.by_hand import ByHand, HandFields
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.runtime import answers
from orchestrator.runtime.answers import LoadOutcome, PastLoad
from orchestrator.server.output import MAX_LINES
from orchestrator.settings.fields import SETTINGS

_MAX_WAIT_S: Final = 300.0
_MAX_SUBMITTED: Final = 256
_LOAD: Final = (*openapi.LOAD, 429)


class Submitted:
    """The loads that were begun with `wait=false`: they go on when their client has gone.

    A load has the generation of its server only when that is started, and may be refused before;
    so it has a number here that is the next generation of its slot, or the present one if that is
    what it joins.
    """

    def __init__(self, pool: AsyncModelPool) -> None:
        self._pool = pool
        self._tasks: OrderedDict[tuple[str, int], asyncio.Task[LoadOutcome]] = OrderedDict()

    def begin(self, name: str, how: HandFields) -> Generation:
        """Begin a load; return the generation that it will have, or joins."""
        generation = self._pool.next_generation(name, force_reload=how.get("force_reload", False))
        task = asyncio.ensure_future(self._pool.load(name, **how))
        task.add_done_callback(_seen)
        self._tasks[name, generation] = task
        while len(self._tasks) > _MAX_SUBMITTED:
            self._tasks.popitem(last=False)
        return generation

    def task(self, name: str, generation: int) -> asyncio.Task[LoadOutcome] | None:
        return self._tasks.get((name, generation))

    def found(self, name: str, generation: int) -> dict[str, Any]:
        """Return what is known of a load; raises UnknownGeneration."""
        past = self._past(name, generation)
        if past is not None and past.outcome is not None:
            return past.as_dict()
        task = self.task(name, generation)
        if past is None and task is None:
            message = f"no load of {name} has generation {generation}, or it is forgotten"
            raise UnknownGeneration.because(message, field="generation")
        state = State.IDLE if past is None else past.state
        members: dict[str, Any] = {"generation": generation, "state": state.value}
        if task is not None and task.done() and not task.cancelled():
            members["outcome"] = _outcome(task).as_dict()
        return members

    def _past(self, name: str, generation: int) -> PastLoad | None:
        loads = self._pool.facade_of(name).history(_MAX_SUBMITTED)
        return next((load for load in loads if load.generation == generation), None)


def _seen(task: asyncio.Task[LoadOutcome]) -> None:
    """Take note of an error, which asyncio would report if nobody asked for it."""
    if not task.cancelled():
        task.exception()


def _outcome(task: asyncio.Task[LoadOutcome]) -> LoadOutcome | Problem:
    error = task.exception()
    if isinstance(error, OrchestratorError):
        return error.problem
    return task.result()


async def _by_hand(request: Request) -> HandFields:
    """Return what the body of a load says."""
    body = await json_body(request, required=False)
    ByHand.of(body)
    return cast("HandFields", body)


def add(
    routes: APIRouter,
    pool: AsyncModelPool,
    eyes: Eyes,
    responder: Responder,
    shutdown: Shutdown,
    submitted: Submitted,
    meant: Callable[..., Awaitable[str]],
) -> None:
    """Add the routes of a model; `meant` is a dependency that returns its name."""
    _add_loads(routes, pool, eyes, responder, shutdown, submitted, meant)
    _add_requests(routes, pool, eyes, responder, shutdown, meant)
    _add_queries(routes, pool, responder, meant)
    _add_streams(routes, pool, eyes, responder, shutdown, meant)


def _add_loads(
    routes: APIRouter,
    pool: AsyncModelPool,
    eyes: Eyes,
    responder: Responder,
    shutdown: Shutdown,
    submitted: Submitted,
    meant: Callable[..., Awaitable[str]],
) -> None:
    document = documented(LoadOutcome, *_LOAD, body=ByHandBody, required=False)
    document["responses"][202] = {"model": schemas.Accepted, "description": "With `wait=false`"}

    @routes.post("/load", **document)
    async def load(request: Request, *, wait: bool = True, name: str = Depends(meant)) -> Response:
        """Load a model, and answer when it is resident. What has to go for it is evicted. With
        `wait=false` it answers at once, and `Location` is where to poll.
        """
        pool.check_own(pool.entry(name))
        how = await _by_hand(request)
        if wait:
            loading = shutdown.wait(pool.load(name, **how))
            loaded = await while_connected(request, loading)
            return responder.json(eyes.of(request.scope).told(loaded.as_dict()))
        generation = submitted.begin(name, how)
        root = request.scope.get("root_path", "")
        where = f"{root}/api/models/{in_path(name)}/loads/{generation}"
        members = {"generation": generation}
        return responder.json(members, status_code=202, headers={"Location": where})

    @routes.get("/loads/{generation}", **documented(schemas.LoadState, 400, 404, *openapi.QUERY))
    async def load_state(
        request: Request,
        generation: int,
        wait_s: Annotated[float, Query(ge=0, le=_MAX_WAIT_S, allow_inf_nan=False)] = 0.0,
        name: str = Depends(meant),
    ) -> Response:
        """Return the state of a load, and its outcome once it has one. The answer waits up to
        `wait_s` seconds for it, to follow a long load through proxies that cut silent requests.
        """
        found = submitted.found(name, generation)
        task = submitted.task(name, generation)
        if "outcome" not in found and task is not None and wait_s:
            with contextlib.suppress(ShuttingDown):
                await shutdown.wait(asyncio.wait([task], timeout=wait_s))
            found = submitted.found(name, generation)
        members = eyes.of(request.scope).told(found).items()
        return responder.json({n: v for n, v in members if n in schemas.LoadState.model_fields})

    @routes.get("/loads", **documented(schemas.Loads, 400, 404, *openapi.QUERY))
    async def loads(
        limit: Annotated[int, Query(ge=1, le=256)] = 20, name: str = Depends(meant)
    ) -> Response:
        """Return the last loads, newest first."""
        found = pool.facade_of(name).history(limit)
        return responder.json({"loads": [load.as_dict() for load in found]})


def _add_requests(
    routes: APIRouter,
    pool: AsyncModelPool,
    eyes: Eyes,
    responder: Responder,
    shutdown: Shutdown,
    meant: Callable[..., Awaitable[str]],
) -> None:
    @routes.post(
        "/unload",
        **documented(answers.UnloadOutcome, 404, *openapi.CHANGE, body=StopBody, required=False),
    )
    async def unload(request: Request, name: str = Depends(meant)) -> Response:
        """Stop the server, cancel who waits for the model, and answer when its slot is empty."""
        body = validated(StopBody, await json_body(request, required=False))
        unloading = shutdown.wait(pool.unload(name, cut=body.cut))
        return responder.json((await unloading).as_dict())

    @routes.post(
        "/cancel",
        **documented(CancelAnswer, 404, *openapi.CHANGE, body=WithdrawBody, required=False),
    )
    async def cancel(request: Request, name: str = Depends(meant)) -> Response:
        """Cancel the load of the model that is in flight; one that is resident stays."""
        body = validated(WithdrawBody, await json_body(request, required=False))
        request_id = SETTINGS["load_request_id"].normal("load_request_id", body.load_request_id)
        done = await pool.cancel(name, request_id)
        return responder.json({"cancelled": done})

    @routes.post("/plan", **documented(Plan, *_LOAD, body=ByHandBody, required=False))
    async def plan(request: Request, name: str = Depends(meant)) -> Response:
        """Return what a load would do, and what it would evict, without doing it."""
        how = await _by_hand(request)
        made = await pool.plan(name, force_reload=how.get("force_reload", False))
        return responder.json(eyes.of(request.scope).told(made.as_dict()), made.names)


def _add_queries(
    routes: APIRouter,
    pool: AsyncModelPool,
    responder: Responder,
    meant: Callable[..., Awaitable[str]],
) -> None:
    """Routes that only read; a load in flight does not delay them."""

    @routes.get("/status", **documented(answers.Status, 400, 404))
    async def status(name: str = Depends(meant)) -> Response:
        """Return the state of the model's slot, what is loaded and what is loading."""
        return responder.json(pool.slot_status(name).as_dict())

    @routes.get("/load-progress", **documented(answers.LoadProgress, 400, 404))
    async def load_progress(name: str = Depends(meant)) -> Response:
        """Return the phase and the bytes of the load in flight."""
        return responder.json(pool.facade_of(name).progress().as_dict())

    @routes.get("/diagram.svg", **documented("image/svg+xml", 400, 404))
    async def diagram_svg(name: str = Depends(meant)) -> Response:
        """Return a picture of the state machine with the model's state marked."""
        picture = diagram.svg(pool.slot_status(name).state)
        return Response(picture, media_type="image/svg+xml")

    @routes.get("/diagram.mmd", **documented("text/plain", 400, 404))
    async def diagram_mmd(name: str = Depends(meant)) -> Response:
        """Return the state machine as Mermaid text with the model's state marked."""
        picture = diagram.mermaid(pool.slot_status(name).state)
        return Response(picture, media_type="text/plain")


def _add_streams(
    routes: APIRouter,
    pool: AsyncModelPool,
    eyes: Eyes,
    responder: Responder,
    shutdown: Shutdown,
    meant: Callable[..., Awaitable[str]],
) -> None:
    streams = Streams(pool, eyes, shutdown)
    viewed = Depends(eyes.seen)

    async def followed(name: str, lines: int, seen: Visible) -> AsyncIterator[str]:
        batches = shutdown.until(pool.log_batches(name, lines))
        async with contextlib.aclosing(batches) as stream:
            async for batch in stream:
                if not seen.holds:
                    return
                if batch is not None:
                    yield await workers.waited(partial(responder.lines, batch))

    @routes.get("/logs", **documented(schemas.Logs, 400, 404, *openapi.QUERY))
    async def logs(
        lines: Annotated[int, Query(ge=1, le=MAX_LINES)] = 200,
        *,
        follow: bool = False,
        name: str = Depends(meant),
        seen: Visible = viewed,
    ) -> Response:
        """Return the last lines of the server's output. `follow=true` streams those to come too."""
        if follow:
            media_type = "text/plain; charset=utf-8"
            return StreamingResponse(followed(name, lines, seen), media_type=media_type)
        return responder.json({"lines": pool.facade_of(name).logs(lines)})

    async def opened(
        after: int = Depends(streams.position),
        name: str = Depends(meant),
        seen: Visible = viewed,
    ) -> AsyncIterator[Sent]:
        async with contextlib.aclosing(streams.events(after, seen, name)) as stream:
            yield stream

    reading = Depends(opened)

    @routes.get(
        "/events",
        response_class=EventSourceResponse,
        responses=openapi.problems(400, 404, *openapi.QUERY),
    )
    async def events(stream: Sent = reading) -> AsyncIterator[ServerSentEvent]:
        """Stream the model's transitions and progress. `Last-Event-ID` resumes after an event."""
        async for event in stream:
            yield event
