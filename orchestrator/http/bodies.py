"""Reading a request's body, and waiting with an eye on the client.

Bodies are bounded JSON objects with known fields only. They are taken only as `application/json`:
a web page of another origin cannot send that without being asked first.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any, Final, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from orchestrator.errors import Cancelled, MalformedRequest, Problem
from orchestrator.settings.checks import printable

MAX_BODY_BYTES: Final = 1 << 20
_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=BaseModel)


async def json_body(request: Request, *, required: bool = True) -> dict[str, Any]:
    """Return the body; {} when there is none and none is required.

    Raises:
        MalformedRequest: not a JSON object.
        HTTPException: 413, too large.
    """
    data = await _bounded(request)
    if not data and not required:
        return {}
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise MalformedRequest.because(
            "send a JSON object as Content-Type: application/json", field="content-type"
        )
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise MalformedRequest.because(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise MalformedRequest.because("the body must be a JSON object")
    return body


async def _bounded(request: Request) -> bytes:
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect:
        raise MalformedRequest.because("the body ended before it was complete") from None
    return bytes(data)


def checked(model: type[_Model], body: dict[str, Any]) -> _Model:
    """Return the body as this model has it.

    Raises:
        MalformedRequest: a field is unknown, missing, or of another type.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise MalformedRequest(malformed(error.errors()[0], model)) from None


def malformed(first: Mapping[str, Any], model: type[BaseModel] | None = None) -> Problem:
    """Return what the first error of a validation means."""
    field = printable(str(first["loc"][-1]))
    message = f"{field}: {first['msg']}"
    if model is not None and first["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        message = f"unknown field {field!r}; known fields: {known}"
    return Problem("malformed", message, field=field)


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`, whose body has been read; cancel it when the client goes away first."""
    return await until_gone(_disconnected(request), work)


async def until_gone(leaves: Coroutine[Any, Any, object], work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`; cancel it when `leaves` ends first.

    Raises:
        Cancelled: the client has gone away.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(leaves)
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled.because("the client has gone away")  # nobody reads it
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
