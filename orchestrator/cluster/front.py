"""A front: reads which model a request names, chooses a replica, and passes the request on.

A request is sent to another replica only before its answer begins, for `/v1` with the first byte of
the body, and only if the first one has not executed it, or its answer can be repeated: that of
`/v1`, where a lost replica has ended its servers. The client's keys go along; the replica judges
them.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

import aiohttp
from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from orchestrator.cluster import merging
from orchestrator.cluster.paths import (
    LISTING,
    REPLICAS,
    ByBody,
    ByName,
    Everywhere,
    Merged,
    Named,
    Own,
    where,
)
from orchestrator.cluster.replicas import Body, Lost, NotConnected, Replicas
from orchestrator.cluster.routing import ReplicaReport
from orchestrator.errors import InvalidRequest, NotLoaded, Problem, Unavailable
from orchestrator.http.passthrough import target_of
from orchestrator.http.paths import own_path
from orchestrator.http.pool.members import Members, members_of
from orchestrator.http.pool.upload import SPOOLED_BYTES, Spool, Upload
from orchestrator.http.problems import AsciiJSON, Responder, http_problem
from orchestrator.http.upstream import RETRY_AFTER_S, headers_through, send_on

_ELSEWHERE: Final = frozenset({"shutting_down", "slot_owned", "server_exited", "too_many_waiting"})
"""Categories of refusals that another replica may not have."""


class Front:
    """An ASGI app over the replicas.

    Args:
        held_s: How long a request waits for a replica.
    """

    def __init__(self, replicas: Replicas, held_s: float) -> None:
        self._replicas = replicas
        self._held_s = held_s
        self._responder = Responder(tuple)
        self._spool = Spool(lambda: Path(tempfile.gettempdir()), SPOOLED_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket: llama-server has none
            await send({"type": "websocket.close", "code": 1000})
            return
        has_begun = False

        async def send_on_behalf(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            async with Upload(receive, self._spool).connected() as client, AsyncExitStack() as end:
                end.push_async_callback(client.close)
                await _Asked(self, scope, client).answer(send_on_behalf)
        except ClientDisconnect:
            return
        except Exception as error:
            if has_begun:
                raise
            answer = await self._responder.failure(Request(scope), error)
            await answer(scope, receive, send)

    @property
    def replicas(self) -> Replicas:
        return self._replicas

    @property
    def until(self) -> float:
        """Until when a request that comes now waits for a replica."""
        return time.monotonic() + self._held_s


class _Asked:
    """One request."""

    def __init__(self, front: Front, scope: Scope, client: Upload) -> None:
        self._replicas = front.replicas
        self._until = front.until
        self._scope = scope
        self._client = client
        self._method: str = scope["method"]
        self._path = own_path(scope)
        self._target = _target(scope)

    async def answer(self, send: Send) -> None:
        match where(self._method, self._path):
            case Own() if self._path == REPLICAS:
                await self._read()
                await (await self._reports())(self._scope, _nothing, send)
            case Own():
                await self._own()(self._scope, _nothing, send)
            case ByBody():
                name = await self._read()
                await self._pass_on(name, send)
            case ByName(name):
                await self._read()
                await self._pass_on(name, send)
            case Everywhere():
                await self._read()
                answers = await self._from_all()
                await merging.worst(answers)(self._scope, _nothing, send)
            case Merged():
                await self._read()
                answers = await self._from_all()
                await merging.merged(self._path, answers)(self._scope, _nothing, send)
            case Named():
                await self._read()
                await send_on(self._scope, await self._send(self._named()), send)
            case None:
                refusal = http_problem(404, f"no route has the path {self._path}")
                await refusal(self._scope, _nothing, send)

    async def _read(self) -> str | None:
        """Read the whole body, so that it can be sent again; return the model that is named."""
        query = dict(parse_qsl(self._scope["query_string"].decode("latin-1")))
        wanted = query.get("model", "").strip()
        found = members_of(Headers(scope=self._scope).get("content-type", ""))
        await self._client.find(_ToTheEnd(found), is_known=False)
        return wanted or found.model

    # ------------------------------------------------------------------------------ to a replica

    async def _pass_on(self, name: str | None, send: Send) -> None:
        tried: set[str] = set()
        refused: Response | None = None
        while True:
            until = 0.0 if refused is not None else self._until
            replica = await self._replicas.choose(name, tried, until)
            if replica is None:
                if refused is None:
                    raise _no_replica()
                await refused(self._scope, _nothing, send)
                return
            tried.add(replica.replica)
            try:
                response = await self._send(replica)
                if response.status in (429, 503):
                    refused = await merging.whole(response)
                    if _category(refused) in _ELSEWHERE:
                        continue
                    await refused(self._scope, _nothing, send)
                    return
                first = await _first_of(response) if self._is_asked_of_a_model else None
            except NotConnected:
                continue
            except (Lost, aiohttp.ClientError) as error:
                if not self._may_repeat:
                    raise _cut() from error
                continue
            await send_on(self._scope, response, send, first=first)
            return

    @property
    def _is_asked_of_a_model(self) -> bool:
        return self._path.startswith("/v1/")

    @property
    def _may_repeat(self) -> bool:
        return self._is_asked_of_a_model or self._method in ("GET", "HEAD")

    async def _send(
        self, replica: ReplicaReport, method: str | None = None, target: str | None = None
    ) -> aiohttp.ClientResponse:
        """Send the request, or on its behalf another one that has no body."""
        given = self._scope["headers"]
        whole = self._client.whole
        body: Body = self._client.rest() if whole is None else whole
        if whole == b"" and not any(name == b"content-length" for name, _ in given):
            body = None
        headers = headers_through(given)
        return await self._replicas.send(
            replica, method or self._method, target or self._target, headers, body
        )

    # --------------------------------------------------------------------------- to some of them

    async def _from_all(self) -> list[Response]:
        """Return the answers of all replicas."""
        if not self._replicas.open:
            await self._replicas.choose(None, (), self._until)
        if not (found := await self._from_open()):
            raise _no_replica()
        return found

    async def _from_open(
        self, method: str | None = None, target: str | None = None
    ) -> list[Response]:
        """Return the answers of those that listen; those that are lost give none."""
        asked = (self._from(one, method, target) for one in self._replicas.open)
        return [one for one in await asyncio.gather(*asked) if one is not None]

    async def _from(
        self, replica: ReplicaReport, method: str | None, target: str | None
    ) -> Response | None:
        try:
            return await merging.whole(await self._send(replica, method, target))
        except (NotConnected, Lost, aiohttp.ClientError):
            return None

    def _named(self) -> ReplicaReport:
        """Return the replica that the query names, by its id or its node's."""
        query = dict(parse_qsl(self._scope["query_string"].decode("latin-1")))
        known = self._replicas.open
        if (asked := query.get("replica")) is not None:
            known = tuple(one for one in known if asked in (one.replica, one.node))
        if not known:
            raise _no_replica()
        if len(known) > 1:
            names = ", ".join(one.replica for one in known)
            message = f"there are several replicas: name one with ?replica=, of {names}"
            raise InvalidRequest.because(message, field="replica")
        return known[0]

    def _own(self) -> Response:
        if self._path == "/healthz":
            return AsciiJSON({"status": "alive"})
        if not any(one.is_ready for one in self._replicas.open):
            raise NotLoaded.because("no replica is ready")
        return AsciiJSON({"status": "ready"})

    async def _reports(self) -> Response:
        """Tell of the replicas what the pools show to the key of this request."""
        answers = await self._from_open("GET", LISTING)  # no other one has models to tell of
        if answers and (failure := merging.worst(answers)).status_code >= 400:
            return failure
        bodies = [json.loads(bytes(one.body)) for one in answers]
        seen = {model["name"] for body in bodies for model in body["models"]}
        reports = [one.only(seen).as_dict() for one in self._replicas.reports]
        return AsciiJSON({"replicas": [{**one, "names": sorted(one["names"])} for one in reports]})


class _ToTheEnd:
    """Reads a body to its end, whatever it names."""

    def __init__(self, members: Members) -> None:
        self.model: str | None = None
        self.is_over: bool = False
        self._members = members

    def feed(self, data: bytes) -> bytes:
        return self._members.feed(data)

    def finish(self) -> bytes:
        return self._members.finish()


async def _first_of(response: aiohttp.ClientResponse) -> bytes:
    """Return the first bytes of a model's answer: its head says nothing that is not repeated."""
    try:
        return await response.content.readany()
    except BaseException:
        response.close()
        raise


def _target(scope: Scope) -> str:
    """Return path and query for a replica."""
    if own_path(scope).startswith("/v1/"):
        target = target_of(scope)
        if target is None:
            raise HTTPException(404, "the path leads out of /v1")
        return target
    raw = scope.get("raw_path") or scope["path"].encode()
    path = raw.decode("latin-1").removeprefix(scope.get("root_path", ""))
    query = scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _category(refusal: Response) -> str:
    try:
        document: Any = json.loads(bytes(refusal.body))
        return str(document.get("category") or document["error"]["code"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


def _no_replica() -> Unavailable:
    why = "no replica of this service can take the request now"
    return Unavailable(Problem("unavailable", why, retry_after_s=RETRY_AFTER_S))


def _cut() -> HTTPException:
    why = "the replica ended before it answered: it may have executed the request"
    return HTTPException(502, why)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
