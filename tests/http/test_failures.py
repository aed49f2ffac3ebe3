"""Unexpected exceptions: whatever part of an orchestrator raises one, every route answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import fastapi
import httpx
import pytest

from orchestrator import AsyncOrchestrator
from orchestrator.http import create_app
from tests.kit.http import PREFIX, Lender, pass_through_app, problem, serving
from tests.kit.shell.records import captured

NOT_IN_A_ROUTE = {
    *("observe", "close", "connect", "outcome", "settled", "follow_logs", "check_sent"),
    "judge_of_prompts",
    # of a pool
    *("begin", "open_call", "send_load", "send_unload", "give_back", "plan_of", "need_of"),
    *("call_models", "devices", "gate", "generation", "log_since", "policy"),
    "known_need",
}
"""Or with a load or for requests from elsewhere only."""
AFTER_THE_START = {"events", "log_batches"}
"""An answer that has begun can only be cut."""
PARTS = sorted(
    name
    for name in dir(AsyncOrchestrator)
    if not name.startswith("_") and name not in NOT_IN_A_ROUTE | AFTER_THE_START | {"start"}
)
LOAD = {"model_path": "gone.gguf"}
BODIES: dict[str, dict[str, Any]] = {"/unload": {}, "/cancel": {"load_request_id": "x"}}


def broken(part: str, **options: Any) -> AsyncOrchestrator:
    """Return an orchestrator of which one public part raises."""

    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("s3cret")

    is_property = isinstance(getattr(AsyncOrchestrator, part), property)
    members = {part: property(fail) if is_property else fail}
    made: AsyncOrchestrator = type("Broken", (AsyncOrchestrator,), members)(**options)
    return made


def requests_of(app: fastapi.FastAPI) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Return a request for each route of an app."""
    follow, wait = f"{PREFIX}/logs?follow=true", f"{PREFIX}/loads/1?wait_s=1"
    found: list[tuple[str, str, dict[str, Any] | None]]
    found = [("GET", path, None) for path in ("/", "/docs", "/openapi.json", follow, wait)]
    found.append(("POST", f"{PREFIX}/load?wait=false", LOAD))
    for path, methods in app.openapi()["paths"].items():
        where = path.replace("{generation}", "1").replace("{path}", "chat/completions")
        for method in methods:
            body = BODIES.get(path.removeprefix(PREFIX), LOAD) if method == "post" else None
            found.append((method.upper(), where, body))
    return found


def ask(
    client: httpx.Client, method: str, path: str, body: dict[str, Any] | None
) -> httpx.Response:
    """Send a request, and read the answer unless it is a stream."""
    with client.stream(method, path, json=body) as answer:
        is_stream = answer.headers["content-type"].startswith(("text/event-stream", "text/plain"))
        if answer.status_code != 200 or not is_stream:
            answer.read()
        return answer


@pytest.mark.parametrize("part", PARTS)
def test_every_route_answers_with_a_problem_document(part: str, state_dir: Path) -> None:
    """Never with a bare 500, and never with the text of the exception."""
    app = create_app(broken(part, llama_server="embedded", state_dir=state_dir))
    requests = requests_of(app)
    assert len(requests) > 20
    found = set()
    with captured(), serving(app) as client:
        for method, path, body in requests:
            answer = ask(client, method, path, body)
            if answer.status_code >= 400:
                found.add(problem(answer))
                assert "s3cret" not in answer.text
    assert (500, "internal") in found


class Unstartable(AsyncOrchestrator):
    async def start(self, *, again: bool = True) -> Self:
        raise RuntimeError("s3cret")


def test_a_stream_that_cannot_begin_is_answered_with_the_reason(state_dir: Path) -> None:
    """Where a mounted app has no lifespan, the orchestrator starts with the first call."""
    outer = fastapi.FastAPI()
    inner = create_app(Unstartable(llama_server="embedded", state_dir=state_dir))
    outer.mount("/inner", inner)
    with captured(), serving(outer) as client:
        for path in ("/events", "/logs?follow=true"):
            assert problem(client.get(f"/inner{PREFIX}{path}")) == (500, "internal")


def test_a_pass_through_in_another_app_answers_too() -> None:
    """`PassThrough` is an app of its own: nothing around it makes problem documents."""
    with captured(), serving(pass_through_app(cast("Lender", broken("lease")))) as client:
        assert problem(client.post("/v1/chat/completions", json={})) == (500, "internal")


@pytest.mark.parametrize("status", [418, 499, 599])
def test_any_status_of_a_route_of_the_host_has_a_document(status: int, state_dir: Path) -> None:
    app = create_app(llama_server="embedded", state_dir=state_dir)

    @app.get("/own")
    async def own() -> None:
        raise fastapi.HTTPException(status, "why")

    with serving(app) as client:
        answer = client.get("/own")
        assert problem(answer) == (status, "http_error")
        assert answer.json()["detail"] == "why"
        assert answer.json()["title"]


@pytest.mark.parametrize("path", ["/unload", "/cancel", "/variants"])
def test_field_with_a_name_that_is_not_unicode_is_malformed(path: str, tmp_path: Path) -> None:
    """pydantic reports it without a name."""
    headers = {"Content-Type": "application/json"}
    with serving(create_app(llama_server="embedded", state_dir=tmp_path)) as client:
        answer = client.post(PREFIX + path, content=b'{"half \\ud800": 1}', headers=headers)
    assert problem(answer) == (422, "malformed")
    assert answer.json()["field"] == "half \\ud800"
