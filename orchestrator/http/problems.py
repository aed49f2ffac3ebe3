"""JSON responses, and every failure as `application/problem+json` (RFC 9457).

`Responder.route_class` does it for the routes of our router, wherever that is included; `install`
for everything else in an app of our own: unknown paths, wrong methods, crashes. Errors of this
library keep their sentence; any other is logged, and only its type is sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping
from http.client import responses
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from orchestrator.base.log import event_log
from orchestrator.base.paths import PathNames
from orchestrator.base.threads import NoThread
from orchestrator.errors import OrchestratorError, Problem, problem_of
from orchestrator.http.bodies import malformed
from orchestrator.http.head import HeadRoute
from orchestrator.http.paths import PathRenamer, names_of, own_folders, own_path

MEDIA_TYPE: Final = "application/problem+json"
CATEGORIES: Final[Mapping[int, tuple[str, ...]]] = {
    400: ("bad_request",),
    401: ("unauthorized",),
    403: ("forbidden", "forbidden_host", "forbidden_origin"),
    404: ("not_found",),
    405: ("method_not_allowed",),
    408: ("too_slow",),
    413: ("body_too_large",),
    431: ("head_too_large",),
    500: ("internal",),
    502: ("bad_gateway",),
}
"""Of failures that have no exception in the tree; the first is the default."""

_OPENAI_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    **dict.fromkeys((429, 503, 504), "unavailable_error"),
}

_HOPELESS: Final = frozenset({400, 401, 403, 404, 405, 409, 413, 422, 424, 431, 500, 507})
"""To try again mends nothing, unless the answer says when. OpenAI's clients would, twice."""

_log = event_log("orchestrator.http")


class Forbidden(HTTPException):
    """A key that may not do this."""

    def __init__(self, detail: str) -> None:
        super().__init__(403, detail)


class AsciiJSON(JSONResponse):
    """JSON in ASCII, which can hold a file name that is not UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class ProblemResponse(AsciiJSON):
    """A problem document; below `/v1/`, where clients of OpenAI's API ask, an error as theirs."""

    def __init__(
        self, document: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(document, document["status"], headers, MEDIA_TYPE)
        self._document, self._given = document, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and own_path(scope).startswith("/v1/"):
            headers = dict(self._given or {})
            if self.status_code in _HOPELESS and "Retry-After" not in headers:
                headers["x-should-retry"] = "false"
            answer = AsciiJSON(_openai_error(self._document), self.status_code, headers)
            await answer(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _openai_error(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a problem as an error of OpenAI's API; `type` as llama-server names it."""
    status = document["status"]
    other = "server_error" if status >= 500 else "invalid_request_error"
    kind = _OPENAI_TYPES.get(status, other)
    error = {"message": document["detail"], "type": kind, "code": document["category"]}
    return {"error": {**error, "param": document["field"]} if "field" in document else error}


def http_problem(
    status: int, detail: str, headers: Mapping[str, str] | None = None, category: str = ""
) -> Response:
    """Return the problem document of a failure that has no exception in the tree."""
    category = category or CATEGORIES.get(status, ("http_error",))[0]
    problem = Problem(category, detail, other=(status, responses.get(status, "Error")))
    return ProblemResponse(problem.as_dict(), headers)


class Responder:
    """Makes the responses of one orchestrator, with local paths hidden.

    Args:
        known: Returns the names of its paths; the same tuple while none has changed.
    """

    def __init__(self, known: Callable[[], tuple[PathNames, ...]]) -> None:
        self._known = known
        self._last: tuple[object, object, PathRenamer] | None = None

    def renamer(self, names: PathNames = ()) -> PathRenamer:
        """Return what hides local paths; `names` are those that only this answer has."""
        known, folders = self._known(), own_folders()
        if names:
            return PathRenamer((*known, names, *names_of(folders)))
        if self._last is None or self._last[0] is not known or self._last[1] != folders:
            self._last = known, folders, PathRenamer((*known, *names_of(folders)))
        return self._last[2]

    def lines(self, lines: Iterable[str]) -> str:
        """Return lines of output as one text."""
        renamer = self.renamer()
        return "".join([f"{renamer.line(line)}\n" for line in lines])

    def json(self, members: Mapping[str, Any], names: PathNames = (), **sent: Any) -> Response:
        """Return an answer; `names` as for `renamer`."""
        return AsciiJSON(self.renamer(names).members(members), **sent)

    async def failure(self, request: Request, error: Exception) -> Response:
        """Return the problem document of an exception."""
        path = request.url.path
        match error:
            case OrchestratorError() | NoThread():
                problem = problem_of(error)
            case RequestValidationError():
                problem = malformed(error.errors()[0])
            case HTTPException():
                is_unknown = (error.status_code, error.detail) == (404, "Not Found")
                detail = f"no route has the path {path}" if is_unknown else error.detail
                return http_problem(error.status_code, detail, error.headers)
            case ClientDisconnect():
                problem = Problem("cancelled", "the client has disconnected")
            case _:
                _log("exception", "request.failed", path=path)
                message = f"an unexpected {type(error).__name__}: see the log of this process"
                problem = Problem("internal", message)
        try:
            document = self.renamer(problem.names).members(problem.as_dict())
        except Exception:  # noqa: BLE001 (the sentence may have a path, so it is not sent)
            _log("exception", "request.failed", path=path)
            problem = Problem("internal", "an unexpected error: see the log of this process")
            document = problem.as_dict()
        wait_s = problem.retry_after_s
        headers = None if wait_s is None else {"Retry-After": str(max(1, math.ceil(wait_s)))}
        return ProblemResponse(document, headers)

    def route_class(self) -> type[HeadRoute]:
        """Return a class of routes that answer with problem documents in whatever app they are."""
        failure = self.failure

        class ProblemRoute(HeadRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()

                async def answer(request: Request) -> Response:
                    try:
                        return await handle(request)
                    except Exception as error:  # noqa: BLE001 (every error gets its answer here)
                        return await failure(request, error)

                return answer

        return ProblemRoute

    def install(self, app: FastAPI) -> None:
        """Have an app answer with problem documents outside of our routes too."""
        for kind in (OrchestratorError, RequestValidationError, HTTPException, Exception):
            app.add_exception_handler(kind, self.failure)
