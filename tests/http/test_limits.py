"""Bodies are bounded, and answers say what browsers may do with them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import fastapi
import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from orchestrator.base.tokens import Generation
from orchestrator.http.guards.limits import MAX_BODY_BYTES, LimitBody
from orchestrator.runtime.answers import LeasedServer
from tests.kit.http import (
    DEADLINE_S,
    PREFIX,
    Gate,
    Serve,
    is_held,
    passing_on,
    problem,
    serving,
    until,
)

MOST = 100_000


class Upstream:
    """A server that reads slowly what it is sent, and notices when the sender goes away."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.given_back = threading.Event()

    def known_paths(self) -> tuple[()]:
        return ()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[LeasedServer]:
        try:
            yield LeasedServer(self.base_url, 1, Generation(1))
        finally:
            self.given_back.set()


@pytest.fixture
def counting() -> Iterator[tuple[str, list[int]]]:
    """A server that counts bytes; 0 is written down for a body that broke off."""
    seen: list[int] = []

    async def count(request: Request) -> PlainTextResponse:
        size = 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
        except Exception:
            seen.append(0)
            raise
        seen.append(size)
        return PlainTextResponse(str(size))

    app = fastapi.FastAPI()
    app.router.routes.append(Route("/v1/{path:path}", count, methods=["POST"]))
    with serving(app) as client:
        yield str(client.base_url), seen


@pytest.fixture
def limited(counting: tuple[str, list[int]]) -> Iterator[tuple[httpx.Client, Upstream]]:
    """A pass-through that takes bodies of up to MOST bytes."""
    upstream = Upstream(counting[0])
    app = passing_on(upstream)
    app.add_middleware(LimitBody, max_bytes=MOST)
    with serving(app) as client:
        yield client, upstream


def _chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 1000):
        yield b"x" * 1000


def test_a_body_up_to_the_limit_passes(
    limited: tuple[httpx.Client, Upstream], counting: tuple[str, list[int]]
) -> None:
    """Also to the byte, of a declared length or of none."""
    client, _ = limited
    assert client.post("/v1/x", content=b"x" * MOST).text == str(MOST)
    assert client.post("/v1/x", content=_chunks(MOST)).text == str(MOST)
    assert counting[1] == [MOST, MOST]


def test_a_declared_length_over_the_limit_is_refused_at_once(
    limited: tuple[httpx.Client, Upstream],
) -> None:
    """CVE-2024-12537 in a peer. Not a byte of the body has been sent when the answer is there."""
    client, upstream = limited
    for length in (MOST + 1, 10**17, 10**40):
        address = client.base_url.host, client.base_url.port
        connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
        connection.putrequest("POST", "/v1/x")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        answer = connection.getresponse()
        if length > 10**19:  # h11 takes no such number for a length
            assert answer.status in {400, 413}
        else:
            assert answer.status == 413
            assert json.loads(answer.read())["category"] == "too_large"
            assert answer.headers["Connection"] == "close"
        connection.close()
    assert not upstream.given_back.is_set()


def test_a_body_of_unknown_length_is_cut_in_the_middle(
    limited: tuple[httpx.Client, Upstream], counting: tuple[str, list[int]]
) -> None:
    """The client hears 413 while it could go on for ever; the server's request ends, and the lease
    is given back.
    """
    client, upstream = limited
    address = client.base_url.host, client.base_url.port
    connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
    connection.putrequest("POST", "/v1/x")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    for _ in range(MOST // 1000 + 1):  # and never the end
        connection.send(chunk)
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["category"] == "too_large"
    connection.close()
    assert upstream.given_back.wait(DEADLINE_S)
    assert client.post("/v1/x", content=b"1").text == "1"
    assert set(counting[1]) <= {0, 1}  # never a whole one that was cut


def test_an_app_of_ours_has_a_limit(serve: Serve) -> None:
    assert MAX_BODY_BYTES == 256 << 20
    with serve(max_body_bytes=10) as client:
        assert problem(client.post("/v1/x", content=b"x" * 11)) == (413, "too_large")
        assert problem(client.post("/v1/x", content=b"x" * 10)) == (503, "not_loaded")
        loaded = client.post(PREFIX + "/load", json={"model_path": "x" * 20})
        assert problem(loaded) == (413, "too_large")


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_answer_that_has_begun_cannot_be_taken_back(has_begun: bool) -> None:
    """What an app says after its client has gone away, in its eyes, is not passed on as an answer
    of its own; what it has begun ends as it ends.
    """
    sent: list[Any] = []

    async def app(_: Any, receive: Any, send: Any) -> None:
        if has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"late"})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"xx", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"transfer-encoding", b"chunked")], "method": "POST"}
    asyncio.run(LimitBody(app, 3)(scope, receive, send))
    statuses = [message["status"] for message in sent if "status" in message]
    assert statuses == [200 if has_begun else 413]


# ---------------------------------------------------------------------------------------- headers


def test_answers_say_what_browsers_may_do_with_them(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    """No guessing of types, nothing kept, nothing embedded elsewhere; what has its own say, keeps
    it; and the server does not say what it is made of.
    """
    with serve(gate.binary, api_keys=["k"]) as client:
        client.headers["Authorization"] = "Bearer k"
        body = {"model_path": tiny_model}
        accepted = client.post(PREFIX + "/load?wait=false", json=body)
        until(client, is_held)
        answers = [accepted, client.get("/healthz"), client.get("/readyz")]
        answers += [client.get(PREFIX + path) for path in ("/status", "/diagram.svg", "/nothing")]
        answers.append(client.get(PREFIX + "/status", headers={"Authorization": "Bearer x"}))
        for answer in answers:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        with client.stream("GET", PREFIX + "/events") as stream:
            assert stream.headers["Cache-Control"] == "no-cache"
            assert stream.headers["X-Content-Type-Options"] == "nosniff"
        client.post(PREFIX + "/unload")
        passed = client.get("/v1/models")
        assert passed.headers["X-Content-Type-Options"] == "nosniff"
        assert "Cache-Control" not in passed.headers


def test_a_foreign_host_and_a_wrong_key_are_answered_alike_in_their_headers(serve: Serve) -> None:
    with serve(api_keys=["k"]) as client:
        for headers in ({"Host": "evil.example"}, {"Origin": "null"}, {}):
            answer = client.get("/nowhere", headers=headers)
            assert answer.status_code in {401, 403}
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
