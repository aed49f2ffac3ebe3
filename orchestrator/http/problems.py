"""Answers, and every failure as `application/problem+json` (RFC 9457), whatever raised it.

`Answers.route` does it for the routes of our router wherever that is included; `install` does it
for what happens around them in an app of our own: unknown paths, wrong methods, crashes. What the
library raised on purpose keeps its words; anything else is logged and not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from orchestrator.base.paths import PathNames
from orchestrator.errors import OrchestratorError, Problem
from orchestrator.http.bodies import malformed
from orchestrator.http.paths import Paths

MEDIA_TYPE: Final = "application/problem+json"
CATEGORIES: Final[Mapping[int, tuple[str, ...]]] = {
    400: ("bad_request",),
    401: ("unauthorized",),
    403: ("forbidden_host", "forbidden_origin"),
    404: ("not_found",),
    405: ("method_not_allowed",),
    413: ("too_large",),
    500: ("internal",),
}
"""Of failures that are HTTP's own; where there are several, whoever refuses says which."""

_log = structlog.get_logger("orchestrator.http")


class Json(JSONResponse):
    """JSON in plain ASCII: a file name that was never UTF-8 must not cost the answer."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def respond(members: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """Send a problem document with the status it names."""
    told = dict(headers or {})
    if (wait_s := members.get("retry_after_s")) is not None:
        told["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return Json(dict(members), members["status"], told, MEDIA_TYPE)


def http_problem(status: int, detail: str, *, category: str | None = None) -> dict[str, Any]:
    """Return the document of a failure that is HTTP's own and has no exception in the tree."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "category": category or CATEGORIES.get(status, ("http_error",))[0],
    }


class Answers:
    """What an orchestrator tells strangers: this is where it leaves, and paths stay here.

    Args:
        known: Returns the names of its paths; see `Facade.known_paths`.
    """

    def __init__(self, known: Callable[[], tuple[PathNames, ...]]) -> None:
        self.paths: Paths = Paths(known)

    def json(
        self,
        members: Mapping[str, Any],
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        names: PathNames = (),
    ) -> Response:
        """Send an answer; `names` are those that go with it."""
        return Json(self.paths.now(names).members(members), status, headers)

    def failure(self, error: Exception, request: Request) -> Response:
        """Send what tells of an exception."""
        match error:
            case OrchestratorError(problem=problem):
                return respond(self.paths.now(problem.names).members(problem.as_dict()))
            case RequestValidationError():
                return respond(malformed(error.errors()[0]).as_dict())
            case HTTPException():
                detail = str(error.detail)
                if error.status_code == HTTPStatus.NOT_FOUND and detail == "Not Found":
                    detail = f"there is nothing at {request.url.path}"
                return respond(http_problem(error.status_code, detail), error.headers)
            case _:
                _log.error("request.failed", path=request.url.path, exc_info=error)
                message = f"an unexpected {type(error).__name__}: see the log of this process"
                return respond(Problem("internal", message).as_dict())

    def route(self) -> type[APIRoute]:
        """Return a class of routes whose failures are problem documents, in whatever app they are
        included.
        """
        failure = self.failure

        class ProblemRoute(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()

                async def answer(request: Request) -> Response:
                    try:
                        return await handle(request)
                    except Exception as error:  # noqa: BLE001 (here every error gets its answer)
                        return failure(error, request)

                return answer

        return ProblemRoute

    def install(self, app: FastAPI) -> None:
        """Let an app answer with problem documents outside of our routes too."""

        async def handler(request: Request, error: Exception) -> Response:
            return self.failure(error, request)

        for kind in (OrchestratorError, RequestValidationError, HTTPException, Exception):
            app.add_exception_handler(kind, handler)
