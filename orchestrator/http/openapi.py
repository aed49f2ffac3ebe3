"""The OpenAPI document: bodies, answers, failures by status, keys and `/v1`.

Routes list the statuses they may answer; the categories come from the exception tree. A fuzz test
compares the routes with the document.
"""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from fastapi import FastAPI, Response
from pydantic import BaseModel

from orchestrator.errors import CLASSES
from orchestrator.http.problems import CATEGORIES, MEDIA_TYPE
from orchestrator.http.schemas import EXAMPLES, OpenAIError, Problem

DESCRIPTION: Final = """\
Owns one `llama-server` process: loads, swaps and unloads models, never two at once.

Failures are problem documents (RFC 9457): `category` names the failure, `detail` describes it and
what to do. `/v1/*` is passed to the running server; its failures are OpenAI's. HEAD is answered
wherever GET is.
"""
OF_POOL: Final = """\
Owns several `llama-server` processes, one for each model, and loads what requests name.

Failures are problem documents (RFC 9457): `category` names the failure, `detail` describes it and
what to do. `/v1/*` goes to the model that its `model` names; its failures are OpenAI's. HEAD is
answered wherever GET is.
"""
_ALWAYS: Final = (400, 401, 403, 500)  # no Host, no key, a page of another origin, a bug
_BODY: Final = (408, 413, 422)

LOAD: Final = (*_BODY, 404, 409, 424, 502, 503, 504, 507)
VARIANTS: Final = (*_BODY, 404, 409, 502, 503, 504, 507)
CHANGE: Final = (*_BODY, 409, 503)
QUERY: Final = (422, 503)
_ANY: Final[dict[str, Any]] = {"content": {"*/*": {"schema": {}}}}


class PassedOn(NamedTuple):
    """What the document says about `/v1`, which bypasses FastAPI."""

    summary: str
    description: str
    failures: tuple[int, ...]


V1: Final = PassedOn(
    "Passed to the running server, with any method",
    "The OpenAI API of llama-server, streaming both ways. Held while a load is in flight; 503 with "
    "`Retry-After` if that takes too long.",
    (404, 408, 413, 502, 503),
)
V1_OF_POOL: Final = PassedOn(
    "Passed to the model that the request names, with any method",
    "The OpenAI API of llama-server, streaming both ways. `model` is a name, an alias or "
    "`name:preset`; a request waits until its model is resident.",
    (404, 408, 409, 413, 422, 424, 429, 502, 503, 504, 507),
)


def problems(
    *statuses: int, media_type: str = MEDIA_TYPE, schema: type[BaseModel] = Problem
) -> dict[int | str, dict[str, Any]]:
    """Document these failures, and those of any request."""
    content = {media_type: {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    return {
        status: {"description": _meaning(status), "content": content}
        for status in sorted({*_ALWAYS, *statuses})
    }


def _meaning(status: int) -> str:
    categories = [category for category, error in CLASSES.items() if error.status == status]
    categories += CATEGORIES.get(status, ())
    return f"{HTTPStatus(status).phrase}: {', '.join(dict.fromkeys(categories))}"


def documented(
    answer: type | str, *statuses: int, body: type[BaseModel] | None = None, required: bool = True
) -> dict[str, Any]:
    """Return the arguments of a route that document it.

    Args:
        answer: The model of a JSON answer, or the media type of a text.
        statuses: The failures besides those of any request.
        body: The model of the body, which the route reads itself.
    """
    route: dict[str, Any] = {"responses": problems(*statuses)}
    if isinstance(answer, str):
        route["response_class"] = Response
        route["responses"][200] = {"content": {answer: {"schema": {"type": "string"}}}}
    else:
        content = {"application/json": _example(answer)}
        route["responses"][200] = {"model": answer, "content": content}
    if body is not None:
        content = {"application/json": {"schema": body.model_json_schema(), **_example(body)}}
        route["openapi_extra"] = {"requestBody": {"required": required, "content": content}}
    return route


def _example(model: type) -> dict[str, Any]:
    return {"example": EXAMPLES[model]} if model in EXAMPLES else {}


def complete(app: FastAPI, v1: PassedOn, *, needs_key: bool) -> None:
    """Add to the document of an app what FastAPI does not know."""
    generate = app.openapi

    @cache
    def openapi() -> dict[str, Any]:
        document = generate()
        components = document["components"]
        # a failure in an answer is a document, not the library's own `Problem`
        ours = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        ours["$defs"]["Problem"]["examples"] = [EXAMPLES[Problem]]
        theirs = OpenAIError.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"].update(ours["$defs"] | theirs.pop("$defs"), OpenAIError=theirs)
        for schema in components["schemas"].values():
            schema.get("properties", {}).pop("names", None)  # of local paths, which are hidden
        for operations in document["paths"].values():
            for operation in operations.values():
                _summarize(operation)
        document["paths"]["/v1/{path}"] = {
            "get": _passed_on(v1, "get", "models"),
            "post": {**_passed_on(v1, "post", "chat/completions"), "requestBody": _ANY},
        }
        if needs_key:
            components["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"},
                "x_api_key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            }
            document["security"] = [{"key": []}, {"x_api_key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _summarize(operation: dict[str, Any]) -> None:
    """Make the first sentence of the description the summary."""
    text = " ".join(operation.pop("description").split())
    operation["summary"], _, rest = text.rstrip(".").partition(". ")
    if rest:
        operation["description"] = f"{rest}."


def _passed_on(v1: PassedOn, method: str, example: str) -> dict[str, Any]:
    """Document `/v1`, which bypasses FastAPI."""
    path = {"name": "path", "in": "path", "required": True, "schema": {"type": "string"}}
    failed = problems(*v1.failures, media_type="application/json", schema=OpenAIError)
    failures = {str(status): failure for status, failure in failed.items()}
    return {
        "tags": ["pass-through"],
        "summary": v1.summary,
        "description": v1.description,
        "operationId": f"pass_on_{method}",
        "parameters": [{**path, "example": example}],
        "responses": {"default": {"description": "The server's answer", **_ANY}, **failures},
    }
