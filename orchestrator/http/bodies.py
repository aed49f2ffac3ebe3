"""Request bodies, and clients that disconnect.

A body is a bounded JSON object with known fields only, sent as `application/json`: a web page of
another origin cannot send that without a preflight.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, Final, Self, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from orchestrator.errors import MalformedRequest, Problem
from orchestrator.settings.checks import printable, unknown_field

MAX_BODY_BYTES: Final = 1 << 20
_MAX_DIGITS: Final = 18  # int() refuses thousands of them
_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=BaseModel)


def is_longer(length: bytes, most: int) -> bool:
    """Return whether a declared length exceeds a limit."""
    return length.isdigit() and (len(length) > _MAX_DIGITS or int(length) > most)


async def json_body(request: Request, *, required: bool = True) -> dict[str, Any]:
    """Read the body, or refuse it with 413 or 422; an empty one is {} unless it is required."""
    large = f"the body must not exceed {MAX_BODY_BYTES} bytes"
    too_large = HTTPException(413, large, {"Connection": "close"})
    if is_longer(request.headers.get("content-length", "").encode("latin-1"), MAX_BODY_BYTES):
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise too_large
    if not data and not required:
        return {}
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "send a JSON object as Content-Type: application/json"
        raise MalformedRequest.because(message, field="content-type")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise MalformedRequest.because(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise MalformedRequest.because("the body must be a JSON object")
    return body


def validated(model: type[_Model], body: dict[str, Any]) -> _Model:
    """Return the body as a model, or refuse a field that is unknown, missing or of another type."""
    known = model.model_fields  # pydantic names no unknown field that is not valid Unicode
    if (unknown := next((name for name in body if name not in known), None)) is not None:
        raise unknown_field(unknown, known)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise MalformedRequest(malformed(error.errors()[0])) from None


def malformed(error: Mapping[str, Any]) -> Problem:
    """Return the problem of one validation error of pydantic."""
    field = printable(str(error["loc"][-1]))
    return Problem("malformed", f"{field}: {error['msg']}", field=field)


async def while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """Await `work` after the body was read; cancel it when the client disconnects."""
    async with Client(request.receive).connected() as client:
        client.watch()
        return await work


class Client:
    """The client of a request, which may disconnect."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._scope = asyncio.timeout(None)
        self._watcher: asyncio.Task[None] | None = None
        self._is_whole = False  # the body has been read

    async def _read(self) -> bytes:
        """Return the next piece of the body; then the client is watched."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._is_whole = not message.get("more_body")
        if self._is_whole:
            self.watch()
        return bytes(message.get("body", b""))

    def watch(self) -> None:
        """Begin to watch; the body must have been read, as both use the same channel."""
        self._watcher = asyncio.ensure_future(self._expire())

    async def _expire(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.leave()

    def leave(self) -> None:
        """End the block: the client has disconnected."""
        self._scope.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Self]:
        """Cancel the block when the client disconnects; it then ends with ClientDisconnect."""
        try:
            async with self._scope:
                yield self
        except TimeoutError:
            if self._scope.expired():
                raise ClientDisconnect from None
            raise
        finally:
            if self._watcher is not None:
                self._watcher.cancel()
