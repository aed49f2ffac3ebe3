"""What the OpenAPI document says beside the models: every failure by status, keys, `/v1`.

The statuses a route may answer are listed with it; what each means is read from the exception
tree, so that the document cannot promise another. A fuzz test holds the routes to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel

from orchestrator.errors import OrchestratorError
from orchestrator.http.problems import CATEGORIES, MEDIA_TYPE
from orchestrator.http.schemas import EXAMPLES, Problem

_DESCRIPTION: Final = """
Owns one `llama-server` process: loads, swaps and unloads models, never two at once.

Failures are problem documents (RFC 9457) whose `category` says what happened; `detail` says what to
do. `/v1/*` is passed to the server that runs.
"""
_REQUEST: Final = (400, 413, 422)
_ALWAYS: Final = (400, 401, 403)
"""Of a request that is not answered at all: no Host, no key, a page of another origin."""

LOAD: Final = (*_REQUEST, 404, 409, 424, 500, 502, 503, 504, 507)
PLAN: Final = (*_REQUEST, 404, 409, 424, 500, 502, 503, 504, 507)
VARIANTS: Final = (*_REQUEST, 404, 409, 500, 502, 503, 504, 507)
ASK: Final = (*_REQUEST, 409, 500, 503)
READ: Final = (422, 500, 503)
LOOK: Final = (500,)


def _tree(cls: type[OrchestratorError]) -> Iterator[type[OrchestratorError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _tree(sub)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of these failures, and of those that every request may meet."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": _meaning(status), "content": content}
        for status in sorted({*_ALWAYS, *statuses})
    }


def _meaning(status: int) -> str:
    named = [cls.category for cls in _tree(OrchestratorError) if cls.status == status]
    named += [name for known, names in CATEGORIES.items() for name in names if known == status]
    return f"{HTTPStatus(status).phrase}: {', '.join(dict.fromkeys(named))}"


def takes(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """Document the body of a route that reads it itself."""
    content = {"application/json": {"schema": model.model_json_schema(), **_example(model)}}
    return {"requestBody": {"required": required, "content": content}}


def answers(model: type, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of an answer, and of the failures there may be instead."""
    content = {"application/json": _example(model)}
    return {200: {"model": model, "content": content}, **problems(*statuses)}


def _example(model: type) -> dict[str, Any]:
    return {"example": EXAMPLES[model]} if model in EXAMPLES else {}


def sends(media_type: str) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of an answer that is text."""
    content = {media_type: {"schema": {"type": "string"}}}
    return {200: {"description": "OK", "content": content}, **problems(*LOOK)}


def describe(app: FastAPI, *, wants_key: bool) -> None:
    """Have the document of an app say what no route of FastAPI's says."""
    app.description = _DESCRIPTION.strip()
    made = app.openapi

    @cache
    def openapi() -> dict[str, Any]:
        document = made()
        components = document.setdefault("components", {})
        # what stands for a failure in an answer is its document, not the library's own record
        schemas = components.setdefault("schemas", {})
        schemas.update(_problem_schemas())
        for schema in schemas.values():
            schema.get("properties", {}).pop("names", None)  # of paths: they stay here
        document["paths"]["/v1/{path}"] = {method: _passed_on(method) for method in ("get", "post")}
        if wants_key:
            schemes = components.setdefault("securitySchemes", {})
            schemes["key"] = {"type": "http", "scheme": "bearer"}
            document["security"] = [{"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _problem_schemas() -> dict[str, Any]:
    made = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    found: dict[str, Any] = made["$defs"]
    found["Problem"]["examples"] = [EXAMPLES[Problem]]
    return found


def _passed_on(method: str) -> dict[str, Any]:
    """`/v1` is no route of FastAPI's: it goes past the framework."""
    any_body: dict[str, Any] = {"*/*": {"schema": {}}}
    documented: dict[str, Any] = {
        "tags": ["pass-through"],
        "summary": "Passed to the server that runs, with any method",
        "description": (
            "OpenAI's API as llama-server has it, streaming both ways. Held while a load is in "
            "flight; 503 with `Retry-After` when that takes too long."
        ),
        "operationId": f"pass_on_{method}",
        "parameters": [
            {
                "name": "path",
                "in": "path",
                "required": True,
                "schema": {"type": "string"},
                "example": "chat/completions" if method == "post" else "models",
            }
        ],
        "responses": {
            "default": {"description": "What the server answered", "content": any_body},
            **{str(status): told for status, told in problems(404, 413, 503).items()},
        },
    }
    if method == "post":
        documented["requestBody"] = {"content": any_body}
    return documented
