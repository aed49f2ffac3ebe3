"""The HTTP API itself: bodies, problems, keys, events, OpenAPI, and embedding in another app."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fastapi
import httpx
import pydantic
import pytest
from fastapi.testclient import TestClient

import orchestrator.http
from orchestrator import AsyncOrchestrator, Busy, LoadRequest, Problem
from orchestrator.http import add_error_handlers, bodies, create_app, pages, router, schemas
from orchestrator.settings.fields import SETTINGS
from tests.kit.http import DEADLINE_S, PREFIX, Serve, problem, serving
from tests.kit.process.servers import servers_of
from tests.kit.process.support import is_running
from tests.kit.sentences import assert_sentence

JSON = {"Content-Type": "application/json"}
LOAD = PREFIX + "/load"


@pytest.fixture
def client(serve: Serve) -> Iterator[httpx.Client]:
    with serve() as client:
        yield client


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One app for all tests that start no server."""
    app = create_app(llama_server="embedded", state_dir=tmp_path_factory.mktemp("idle"))
    with serving(app) as client:
        yield client


# ---------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "content-type"),
        (b"{", None),
        (b"\xff\xfe", None),
        (b"[1]", None),
        (b'"x"', None),
        (b"[" * 100_000, None),
        (b"{}", "model_path"),
        (b'{"model_path": 1}', "model_path"),
        (b'{"model_path": "x", "modle": 1}', "modle"),
        (b'{"model_path": "x", "half \\ud800": 1}', "half \\ud800"),
        (b'{"model_path": "x", "n_parallel": true}', "n_parallel"),
        (b'{"model_path": "x", "pinned": "yes"}', "pinned"),
    ],
)
def test_load_with_malformed_body_is_refused(
    idle: httpx.Client, body: bytes, field: str | None
) -> None:
    """A misspelt setting is never silently dropped, and no body causes a 500."""
    answer = idle.post(LOAD, content=body, headers=JSON if body else {})
    assert problem(answer) == (422, "malformed")
    assert answer.json().get("field") == field
    assert idle.get(PREFIX + "/status").json()["generation"] == 0


@pytest.mark.parametrize(
    ("members", "category", "field"),
    [
        ({"cache_type_kv": "q9"}, "invalid_request", "cache_type_kv"),
        ({"n_parallel": 65}, "invalid_request", "n_parallel"),
        ({"stall_timeout_s": 0}, "invalid_request", "stall_timeout_s"),
        ({"model_path": " "}, "invalid_request", "model_path"),
        ({"llama_extra_args": ["--port=1"]}, "refused_argument", "llama_extra_args"),
        ({"load_request_id": "-"}, "invalid_request", "load_request_id"),
    ],
)
def test_load_with_unusable_setting_is_refused(
    idle: httpx.Client, members: dict[str, object], category: str, field: str
) -> None:
    answer = idle.post(LOAD, json={"model_path": "x"} | members)
    assert problem(answer) == (400, category)
    assert answer.json()["field"] == field


def test_body_of_another_content_type_is_refused(idle: httpx.Client) -> None:
    """A browser sends these across origins without a preflight; they cannot start a server."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        body = b'{"model_path": "x"}'
        answer = idle.post(LOAD, content=body, headers={"Content-Type": kind})
        assert problem(answer) == (422, "malformed")


def test_body_over_one_mebibyte_is_refused(idle: httpx.Client) -> None:
    """Even if it does not declare its length."""
    chunks = (b" " * 65536 for _ in range(bodies.MAX_BODY_BYTES // 65536 + 1))
    assert problem(idle.post(LOAD, content=chunks, headers=JSON)) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("path", "body", "code", "field"),
    [
        ("/unload", {"model": "x"}, 422, "model"),
        ("/unload", {"model_path": 3}, 422, "model_path"),
        ("/cancel", {}, 400, "load_request_id"),
        ("/cancel", {"generation": 1, "load_request_id": "x"}, 400, "load_request_id"),
        ("/cancel", {"generation": "1"}, 422, "generation"),
        ("/cancel", {"generation": True}, 422, "generation"),
        ("/cancel", {"load_request_id": 5}, 422, "load_request_id"),
        ("/cancel", {"load_request_id": "no spaces"}, 400, "load_request_id"),
        ("/cancel", {"id": "x"}, 422, "id"),
    ],
)
def test_unload_and_cancel_refuse_malformed_bodies(
    idle: httpx.Client, path: str, body: dict[str, object], code: int, field: str
) -> None:
    answer = idle.post(PREFIX + path, json=body)
    assert problem(answer)[0] == code
    assert answer.json()["field"] == field


def test_load_request_id_is_stripped_by_load_and_cancel(
    client: httpx.Client, tiny_model: str
) -> None:
    """Here the cancel overtakes the load."""
    client.post(PREFIX + "/cancel", json={"load_request_id": " mine "})
    answer = client.post(LOAD, json={"model_path": tiny_model, "load_request_id": "mine"})
    assert problem(answer) == (409, "cancelled")


def test_unload_needs_no_body(idle: httpx.Client) -> None:
    assert idle.post(PREFIX + "/unload").json() == {"status": "unloaded"}
    assert idle.post(PREFIX + "/unload", json={}).json() == {"status": "unloaded"}


# ------------------------------------------------------------------------------------- problems


def test_unknown_path_and_wrong_method_are_problems(idle: httpx.Client) -> None:
    assert problem(idle.get("/nowhere")) == (404, "not_found")
    assert problem(idle.get(PREFIX + "/nowhere")) == (404, "not_found")
    answer = idle.get(LOAD)
    assert problem(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_number_of_log_lines_is_bounded(idle: httpx.Client) -> None:
    assert idle.get(PREFIX + "/logs").json() == {"lines": []}
    assert problem(idle.get(PREFIX + "/logs?lines=0")) == (422, "malformed")
    assert problem(idle.get(PREFIX + "/logs?lines=1000000")) == (422, "malformed")


def test_unexpected_exception_is_answered_without_its_message(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(AsyncOrchestrator, "progress", crash)
    with serve() as client:
        answer = client.get(PREFIX + "/load-progress")
        assert problem(answer) == (500, "internal")
        assert "secret" not in answer.text
        assert client.get(PREFIX + "/status").status_code == 200


# --------------------------------------------------------------------------------------- events


def _events(client: httpx.Client, after: int, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    headers = {"Last-Event-ID": str(after)}
    with client.stream("GET", PREFIX + "/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in stream.iter_lines():
            if line.startswith(":"):  # a comment, which keeps a silent stream alive
                continue
            name, _, value = line.partition(": ")
            if name:
                event[name] = json.loads(value) if name == "data" else value
                continue
            found += [event] if event else []
            event = {}
            if len(found) == count:
                break
    return found


def test_events_have_ids_and_can_be_resumed(client: httpx.Client, tiny_model: str) -> None:
    client.post(LOAD, json={"model_path": tiny_model})
    events = _events(client, 0, 5)
    assert [event["id"] for event in events] == ["1", "2", "3", "4", "5"]
    assert {event["event"] for event in events} == {"transition"}
    path = ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    assert [event["data"]["dest"] for event in events] == path
    for event in events:
        assert event["data"].keys() >= {"source", "dest", "trigger", "generation", "at"}
        assert event["data"]["generation"] == 1
    assert _events(client, 3, 2) == events[3:]
    # an id of an earlier orchestrator, which had more events
    assert _events(client, 1_000_000, 5) == events


def test_events_without_last_event_id_begin_now(client: httpx.Client, tiny_model: str) -> None:
    client.post(LOAD, json={"model_path": tiny_model})
    with client.stream("GET", PREFIX + "/events") as stream:
        client.post(PREFIX + "/unload")
        lines = stream.iter_lines()
        data = next(line for line in lines if line.startswith("data: "))
        assert json.loads(data.removeprefix("data: "))["trigger"] == "unload"


def test_last_event_id_must_be_a_natural_number(idle: httpx.Client) -> None:
    for bad in ("x", "-1", "1.5"):
        answer = idle.get(PREFIX + "/events", headers={"Last-Event-ID": bad})
        assert problem(answer) == (422, "malformed")


def test_diagrams_mark_the_current_state(client: httpx.Client, tiny_model: str) -> None:
    svg = client.get(PREFIX + "/diagram.svg")
    assert svg.headers["content-type"] == "image/svg+xml"
    assert svg.text.startswith("<svg")
    mermaid = client.get(PREFIX + "/diagram.mmd").text
    assert "class Idle current" in mermaid
    client.post(LOAD, json={"model_path": tiny_model})
    assert "class Healthy current" in client.get(PREFIX + "/diagram.mmd").text
    assert client.get(PREFIX + "/diagram.svg").text != svg.text


# ----------------------------------------------------------------------------------------- keys


def test_every_route_but_health_needs_a_key(serve: Serve) -> None:
    with serve(api_keys=["s3cret", "another"]) as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        assert problem(client.get("/readyz")) == (503, "not_loaded")
        for path in (PREFIX + "/status", PREFIX + "/events", "/nowhere", "/openapi.json"):
            answer = client.get(path)
            assert problem(answer) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        wrong = ("Bearer", "Bearer S3cret", "Basic s3cret", "s3cret", "Bearer s3cretx")
        for header in (*wrong, "Bearer s3cr\u00e9t"):
            sent = {b"Authorization": header.encode("latin-1")}
            assert client.get(PREFIX + "/status", headers=sent).status_code == 401, header
        for good in ("Bearer s3cret", "bearer another"):
            headers = {"Authorization": good}
            assert client.get(PREFIX + "/status", headers=headers).status_code == 200
        assert client.get(PREFIX + "/status", headers={"X-Api-Key": "another"}).status_code == 200
        both = {"X-Api-Key": "s3cret", "Authorization": "Basic eDp5"}  # of a proxy
        assert client.get(PREFIX + "/status", headers=both).status_code == 200
        wrong_key = {"X-Api-Key": "Bearer s3cret"}
        assert client.get(PREFIX + "/status", headers=wrong_key).status_code == 401


# ----------------------------------------------------------------------------------------- HEAD


PLAIN = ("/", "/panel/main.js", "/panel/fields.js", "/docs", "/openapi.json", "/healthz")


def _get_routes(client: httpx.Client) -> list[str]:
    paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
    documented = [path for path, methods in paths.items() if "get" in methods]
    return [*PLAIN, *(path for path in documented if not path.startswith("/v1/"))]


def test_head_answers_with_the_headers_of_get(idle: httpx.Client) -> None:
    """Uptime monitors and link checkers send it (RFC 9110, 9.3.2)."""
    paths = _get_routes(idle)
    assert PREFIX + "/status" in paths
    for path in paths:
        head = idle.head(path)
        assert head.content == b""
        with idle.stream("GET", path) as get:
            assert head.status_code == get.status_code, path
            for name in set(get.headers) - {"date", "content-length", "transfer-encoding"}:
                assert head.headers[name] == get.headers[name], (path, name)
    assert idle.head(LOAD).status_code == 405
    assert idle.post(PREFIX + "/status").headers["allow"] == "GET, HEAD"
    assert idle.head("/nowhere").status_code == 404


def test_head_of_a_stream_ends_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays open behind it."""
    has_ended = threading.Event()

    async def endless(*_: object) -> AsyncIterator[Any]:
        try:
            await asyncio.Event().wait()
            yield
        finally:
            has_ended.set()

    monkeypatch.setattr(AsyncOrchestrator, "log_batches", endless)
    monkeypatch.setattr(AsyncOrchestrator, "events", endless)
    with serve() as client:
        for path, kind in (("/logs?follow=true", "text/plain"), ("/events", "text/event-stream")):
            has_ended.clear()
            answer = client.head(PREFIX + path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert answer.headers["content-type"].startswith(kind)
            assert has_ended.wait(DEADLINE_S), path


# --------------------------------------------------------------------------------------- HTTP/1.0


def _raw(client: httpx.Client, request: str) -> tuple[int, str]:
    """Send these bytes; return the status and the rest of the answer."""
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.settimeout(DEADLINE_S)
        connection.sendall(request.encode())
        with connection.makefile("rb") as answer:
            return int(answer.readline().split()[1]), answer.readline().decode()


def test_health_checks_of_http_1_0_need_no_host(idle: httpx.Client) -> None:
    """As HAProxy and old load balancers send them. Everything else needs one: a name that was
    rebound would be sent.
    """
    for path, status in (("/healthz", 200), ("/readyz", 503), (PREFIX + "/status", 400)):
        for method in ("GET", "HEAD"):
            assert _raw(idle, f"{method} {path} HTTP/1.0\r\n\r\n")[0] == status
    assert _raw(idle, "GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n")[0] == 400
    for name in ("evil.example", ""):
        assert _raw(idle, f"GET /healthz HTTP/1.0\r\nHost: {name}\r\n\r\n")[0] in {400, 403}


# ----------------------------------------------------------------------------- OpenAPI, embedding


def test_openapi_load_body_has_the_fields_of_load_request() -> None:
    """The model only documents; `LoadRequest` validates."""
    documented: dict[str, Any] = schemas.LoadBody.model_fields
    fields = {field.name: field for field in dataclasses.fields(LoadRequest)}
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        assert documented[name].is_required() == required
        assert required or documented[name].default == field.default
        assert documented[name].description == SETTINGS[name].help


def test_openapi_lists_every_route_and_failure(idle: httpx.Client) -> None:
    document = idle.get("/openapi.json").json()
    routes = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert routes == {
        *((PREFIX + path, "post") for path in ("/load", "/unload", "/cancel", "/plan")),
        *((PREFIX + path, "post") for path in ("/variants", "/prefetch")),
        *((PREFIX + path, "get") for path in ("/loads", "/options", "/on-disk")),
        *((path, "get") for path in ("/api/activity", "/api/usage")),
        *((PREFIX + path, "get") for path in ("/status", "/load-progress", "/events", "/logs")),
        *((PREFIX + path, "get") for path in ("/diagram.svg", "/diagram.mmd")),
        (PREFIX + "/loads/{generation}", "get"),
        ("/healthz", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
        ("/v1/{path}", "get"),
        ("/v1/{path}", "post"),
    }
    for methods in document["paths"].values():
        for operation in methods.values():
            words = operation["summary"].split()
            assert len(words) > 3, "a sentence"
            assert not words[-1].endswith(".")
    load = document["paths"][LOAD]["post"]
    body = load["requestBody"]["content"]["application/json"]["schema"]
    assert "max_seq_length" in body["properties"]
    failures = {"400", "404", "409", "413", "422", "424", "502", "503", "504", "507"}
    assert {"200", "202"} | failures <= load["responses"].keys()
    assert "superseded" in load["responses"]["409"]["description"]
    for status in failures:
        assert list(load["responses"][status]["content"]) == ["application/problem+json"]


@pytest.mark.parametrize("model", schemas.EXAMPLES)
def test_openapi_examples_are_valid(model: type) -> None:
    """Users copy examples."""
    example = schemas.EXAMPLES[model]
    pydantic.TypeAdapter(model).validate_json(json.dumps(example))
    if model is schemas.LoadBody:
        assert LoadRequest.from_dict(example).gguf_variant == "Q4_K_M"


def test_openapi_declares_keys_only_where_needed() -> None:
    """A generated client must know."""
    wanted = create_app(llama_server="embedded", api_keys=["k"]).openapi()
    assert wanted["security"] == [{"key": []}, {"x_api_key": []}]
    assert "security" not in create_app(llama_server="embedded").openapi()


def test_router_answers_with_problems_in_another_app(state_dir: Path) -> None:
    """The first request starts the orchestrator."""
    orch = AsyncOrchestrator(llama_server="embedded", state_dir=state_dir)

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        await orch.close()

    app = fastapi.FastAPI(lifespan=lifespan)
    app.include_router(router(orch), prefix="/ai")
    with serving(app) as client:
        assert client.get("/ai" + PREFIX + "/status").json()["state"] == "Idle"
        assert client.head("/ai" + PREFIX + "/status").status_code == 200
        answer = client.post("/ai" + LOAD, json={"model_path": "gone.gguf"})
        assert problem(answer) == (404, "model_not_found")
        client.post("/ai" + PREFIX + "/unload")
        assert client.get("/nowhere").headers["content-type"] == "application/json"


def test_router_lifespan_starts_and_closes_the_orchestrator(
    state_dir: Path, tiny_model: str
) -> None:
    """So a backend that only includes the router leaves no server behind."""
    ended: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        ended.append("its own")

    orch = AsyncOrchestrator(llama_server="embedded", state_dir=state_dir)
    app = fastapi.FastAPI(lifespan=lifespan)
    app.include_router(router(orch))
    with serving(app) as client:
        pid = client.post(LOAD, json={"model_path": tiny_model}).json()["pid"]
        assert is_running(pid)
    assert not is_running(pid)
    assert ended == ["its own"]
    assert orch.status().loaded is None


def test_closed_orchestrator_answers_503(state_dir: Path) -> None:
    orch = AsyncOrchestrator(llama_server="embedded", state_dir=state_dir)
    app = fastapi.FastAPI()
    app.include_router(router(orch))

    @app.post("/close")
    async def close() -> None:
        await orch.close()

    with serving(app) as client:
        client.post("/close")
        assert problem(client.post(LOAD, json={"model_path": "x"})) == (503, "shutting_down")
        assert problem(client.get(PREFIX + "/events")) == (503, "shutting_down")
        assert client.get(PREFIX + "/status").json()["state"] == "Idle"


def test_create_app_takes_an_orchestrator_or_its_options() -> None:
    with pytest.raises(TypeError, match="not both"):
        create_app(AsyncOrchestrator(), slot="x")
    with pytest.raises(ValueError, match="kill_grace_s"):
        create_app(kill_grace_s=-1)


def test_mounted_app_recognises_its_own_paths(state_dir: Path) -> None:
    """Health and the panel need no key, and answers carry the same headers, below any path."""
    app = fastapi.FastAPI()
    app.mount("/llama", create_app(llama_server="embedded", state_dir=state_dir, api_keys=["k"]))
    with TestClient(app) as client:
        assert client.get("/llama/healthz").json() == {"status": "alive"}
        assert client.get("/llama/healthz").headers["Cache-Control"] == "no-store"
        for path in pages.PATHS - {pages.MODEL}:
            page = client.get("/llama" + path, headers={"X-Api-Key": "k"})
            assert page.status_code == 200, path
            assert page.headers["Content-Security-Policy"] == pages.CSP
            without_key = client.get("/llama" + path).status_code
            assert without_key == (200 if path in pages.PANEL_PATHS else 401), path
        assert client.get("/llama" + PREFIX + "/status").status_code == 401


def test_http_package_exports_these_names() -> None:
    assert dir(orchestrator.http) == ["PassThrough", "add_error_handlers", "create_app", "router"]
    with pytest.raises(AttributeError, match="has no attribute 'app_of_dreams'"):
        orchestrator.http.app_of_dreams  # noqa: B018


def test_one_app_lives_twenty_times(tiny_model: str, tmp_path: Path) -> None:
    """As the app of a module does in the tests of a backend: each run begins with an empty slot."""
    app = create_app(llama_server="embedded", state_dir=tmp_path)
    for life in range(1, 21):
        with TestClient(app) as client:
            assert client.get(PREFIX + "/status").json()["state"] == "Idle"
            if life in {1, 20}:
                outcome = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
                assert outcome["status"] == "loaded"
                answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
                assert answer.status_code == 200
        assert not servers_of(tmp_path)
    assert client.get(PREFIX + "/loads/99").json()["category"] == "shutting_down"
    with TestClient(app) as client:
        assert client.get(PREFIX + "/loads/99").json()["category"] == "unknown_generation"


def test_route_of_an_app_answers_our_errors(state_dir: Path) -> None:
    """With the status, the document and the headers of the API, and no path of this machine."""
    app = fastapi.FastAPI()
    add_error_handlers(app)
    orch = AsyncOrchestrator(llama_server="embedded", state_dir=state_dir)

    @app.get("/ask")
    async def ask() -> None:
        async with orch.lease():
            pass

    @app.get("/busy")
    async def busy() -> None:
        raise Busy(Problem("busy", "try again", retry_after_s=1.5))

    with serving(app) as client:
        assert problem(client.get("/ask")) == (503, "not_loaded")
        assert problem(client.get("/busy")) == (409, "busy")
        assert client.get("/busy").headers["Retry-After"] == "2"
    asyncio.run(orch.close())


@pytest.mark.parametrize("missing", ["fastapi", "aiohttp", "starlette"])
def test_package_without_its_extra_says_which(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from orchestrator.http import router"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert_sentence("http.extra", said, missing=f"needs {missing}:")
