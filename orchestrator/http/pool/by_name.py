"""`/v1/*` of a pool: each request goes to the model that it names, and waits until that is there.

The name is replaced by the one that the server knows, and a preset fills what the request leaves
out, while the body passes through. A lease is held until the answer has ended.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from fastapi import HTTPException
from multidict import CIMultiDict
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from orchestrator.http.activity.activity import Activity, Asked
from orchestrator.http.passthrough import check_kind, target_of
from orchestrator.http.pool.answers import renames_in
from orchestrator.http.pool.listing import listed, listing
from orchestrator.http.pool.members import Members, members_of
from orchestrator.http.pool.upload import Spool, Upload
from orchestrator.http.pool.visible import Eyes, Visible
from orchestrator.http.problems import AsciiJSON, Responder, http_problem
from orchestrator.http.shutdown import Shutdown
from orchestrator.http.upstream import Body, Server, Upstream, headers_for, send_on
from orchestrator.pool.context import Turn
from orchestrator.pool.elsewhere import api_of
from orchestrator.pool.entries import Entry
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.runtime.answers import LeasedServer

_LISTING: Final = "/v1/models"
_NO_ROOM_ELSEWHERE: Final = (
    "there is no room for this model now, and the server that takes its requests gives no answer"
)
_OWN_LENGTH: Final = frozenset({b"content-length"})


class ByName:
    """An ASGI app that passes requests below `/v1` to the servers of a pool.

    Args:
        waited: Hears for how many seconds a request has waited for a model.
    """

    def __init__(
        self,
        pool: AsyncModelPool,
        eyes: Eyes,
        responder: Responder,
        shutdown: Shutdown,
        activity: Activity,
        waited: Callable[[str, float], None],
        spool: Spool,
    ) -> None:
        self._pool = pool
        self._eyes = eyes
        self._responder = responder
        self._shutdown = shutdown
        self._activity = activity
        self._waited = waited
        self._spool = spool
        self._upstream = Upstream()
        pool.feed.observe(self._upstream.hear)

    async def close(self) -> None:
        """Close the connections to the servers."""
        await self._upstream.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket: llama-server has none
            await send({"type": "websocket.close", "code": 1000})
            return
        target = target_of(scope)
        if target is None:
            await http_problem(404, "the path leads out of /v1")(scope, receive, send)
            return
        seen, is_listing = self._eyes.of(scope), _is_listing(scope["method"], target)
        path = target.partition("?")[0]
        asked = Asked(None if is_listing else self._activity, path, seen.grant.name)
        to_client = partial(asked.send, send)
        try:
            if is_listing:
                await AsciiJSON(self._listing(path, seen))(scope, receive, send)
            else:
                await self._pass_on(scope, receive, to_client, target, seen, asked)
        except ClientDisconnect:
            asked.client_left()
        except Exception as error:
            if asked.has_begun:
                raise
            answer = await self._responder.failure(Request(scope), error)
            await answer(scope, receive, to_client)
        finally:
            asked.end()

    def _listing(self, path: str, seen: Visible) -> dict[str, Any]:
        """Return the answer to a question for the models there are, or for one of them."""
        name = path.removeprefix(_LISTING).removeprefix("/")
        return listed(self._pool, seen, name) if name else listing(self._pool, seen)

    async def _pass_on(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        target: str,
        seen: Visible,
        asked: Asked,
    ) -> None:
        async with Upload(receive, self._spool).connected() as client, AsyncExitStack() as stack:
            stack.push_async_callback(client.close)
            path, _, query = target.partition("?")
            wanted = dict(parse_qsl(query)).get("model", "").strip()
            content_type = Headers(scope=scope).get("content-type", "")
            found = members_of(content_type)
            await client.find(found, is_known=bool(wanted))
            match = seen.match(wanted or found.model)
            asked.model = match.entry.name
            check_kind(match.entry.kind, target)
            entry = await self._pool.taken_by(match.entry)
            turn = Turn(seen.grant.name, seen.grant.weight)
            server = await self._leased(stack, client, entry, turn)
            self._waited(entry.name, asked.got_server(match.entry.name))
            await client.stop_looking()
            model = entry.upstream_model or entry.name
            added = match.preset.members if match.preset is not None else {}
            body, headers = _body(scope, client, members_of(content_type, model, added))
            if wanted:
                query = urlencode([(k, model if k == "model" else v) for k, v in parse_qsl(query)])
            judge, url = None, server.base_url
            if entry.base_url is not None:
                url, path = api_of(entry.base_url), path.removeprefix("/v1")
                headers["Accept-Encoding"] = "identity"
            else:
                facade = self._pool.facade_of(entry.name)
                judge = facade.judge_of_prompts(server.generation)
            try:
                response = await self._upstream.request(
                    scope["method"],
                    f"{path}?{query}" if query else path,
                    headers,
                    body,
                    Server(url, server.api_key, server.generation, entry.name),
                )
            except HTTPException as error:
                if entry.base_url is not None:
                    self._pool.lose(entry, error.detail)
                if entry is not match.entry:  # the key may not see that one
                    raise HTTPException(502, _NO_ROOM_ELSEWHERE) from error
                raise
            own = match.entry.name
            renames = renames_in(response, own) if entry.base_url is not None else None
            await send_on(scope, response, send, judge=judge, rewrites=renames)

    async def _leased(
        self, stack: AsyncExitStack, client: Upload, entry: Entry, turn: Turn
    ) -> LeasedServer:
        """Lease the server until the stack is closed; the request waits until it is there."""
        client.look_ahead()
        lease = stack.enter_async_context(self._pool.lease(entry.name, turn=turn))
        return await self._shutdown.wait(lease)


def _is_listing(method: str, target: str) -> bool:
    path = target.partition("?")[0]
    return method in ("GET", "HEAD") and f"{path}/".startswith(f"{_LISTING}/")


def _body(scope: Scope, client: Upload, members: Members) -> tuple[Body, CIMultiDict[str]]:
    """Return the body for the server, and its headers; whole, or as it arrives."""
    given = scope["headers"]
    whole = client.whole
    if whole is None:
        return _rewritten(client, members), headers_for(given, _OWN_LENGTH)
    made = members.feed(whole) + members.finish()
    if made != whole:
        return made, headers_for(given, _OWN_LENGTH)
    has_length = any(name == b"content-length" for name, _ in given)
    return (whole if whole or has_length else None), headers_for(given)


async def _rewritten(client: Upload, members: Members) -> AsyncIterator[bytes]:
    async for data in client.rest():
        if made := members.feed(data):
            yield made
    if rest := members.finish():
        yield rest
