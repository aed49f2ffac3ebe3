"""Limits of request bodies, and the headers of answers."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import fastapi
import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from orchestrator.http import bodies
from orchestrator.http.guards import limits
from orchestrator.http.guards.limits import MAX_BODY_BYTES, limit_body
from tests.kit.http import (
    DEADLINE_S,
    PREFIX,
    Gate,
    Lender,
    Serve,
    category_of,
    is_at_gate,
    pass_through_app,
    problem,
    serving,
    until,
)

MAX = 100_000
Body = bytes | Iterator[bytes]
Answer = tuple[int, bytes]


@pytest.fixture
def counting() -> Iterator[tuple[str, list[int]]]:
    """A server that records the size of each body, and 0 for one that was cut."""
    sizes: list[int] = []

    async def count(request: Request) -> PlainTextResponse:
        size = 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
        except Exception:
            sizes.append(0)
            raise
        sizes.append(size)
        return PlainTextResponse(str(size))

    app = fastapi.FastAPI()
    app.router.routes.append(Route("/v1/{path:path}", count, methods=["POST"]))
    with serving(app) as client:
        yield str(client.base_url), sizes


@pytest.fixture
def limited(counting: tuple[str, list[int]]) -> Iterator[tuple[httpx.Client, Lender]]:
    """A pass-through for bodies of up to MAX bytes."""
    lender = Lender(counting[0])
    app = pass_through_app(lender)
    app.add_middleware(limit_body, max_bytes=MAX)
    with serving(app) as client:
        yield client, lender


def _chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 1000):
        yield b"x" * 1000


def test_body_up_to_the_limit_passes(
    limited: tuple[httpx.Client, Lender], counting: tuple[str, list[int]]
) -> None:
    """To the byte, whether the length is declared or not."""
    client, _ = limited
    assert client.post("/v1/x", content=b"x" * MAX).text == str(MAX)
    assert client.post("/v1/x", content=_chunks(MAX)).text == str(MAX)
    assert counting[1] == [MAX, MAX]


def test_declared_length_over_the_limit_is_refused_at_once(
    limited: tuple[httpx.Client, Lender],
) -> None:
    """The answer arrives before any byte of the body is sent (CVE-2024-12537 in a peer)."""
    client, lender = limited
    for length in (MAX + 1, 10**17, 10**40):
        address = client.base_url.host, client.base_url.port
        connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
        connection.putrequest("POST", "/v1/x")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        answer = connection.getresponse()
        if length > 10**19:  # h11 refuses such a length itself
            assert answer.status in {400, 413}
        else:
            assert answer.status == 413
            assert category_of(answer.read()) == "body_too_large"
            assert answer.headers["Connection"] == "close"
        connection.close()
    assert not lender.is_returned.is_set()


@pytest.mark.parametrize("length", [bodies.MAX_BODY_BYTES + 1, 10**17])
def test_routes_of_the_api_refuse_a_declared_length_at_once(serve: Serve, length: int) -> None:
    """Their limit is lower than that of the app."""
    with serve() as client:
        address = client.base_url.host, client.base_url.port
        for path in ("/load", "/plan", "/unload", "/cancel", "/variants"):
            connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
            connection.putrequest("POST", PREFIX + path)
            connection.putheader("Content-Length", str(length))
            connection.endheaders()
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Connection"]) == (413, "close")
            assert json.loads(answer.read())["category"] == "body_too_large"
            connection.close()


def test_body_of_unknown_length_is_refused_at_the_limit(
    limited: tuple[httpx.Client, Lender], counting: tuple[str, list[int]]
) -> None:
    """The client gets 413 although it never ends; the request to the server and the lease end."""
    client, lender = limited
    address = client.base_url.host, client.base_url.port
    connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
    connection.putrequest("POST", "/v1/x")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    for _ in range(MAX // 1000 + 1):  # without an end
        connection.send(chunk)
    answer = connection.getresponse()
    assert answer.status == 413
    assert category_of(answer.read()) == "body_too_large"
    connection.close()
    assert lender.is_returned.wait(DEADLINE_S)
    assert client.post("/v1/x", content=b"1").text == "1"
    assert set(counting[1]) <= {0, 1}  # never the size of a cut body


def test_app_limits_bodies(serve: Serve) -> None:
    assert MAX_BODY_BYTES == 256 << 20
    with serve(max_body_bytes=10) as client:
        assert problem(client.post("/v1/x", content=b"x" * 11)) == (413, "body_too_large")
        assert problem(client.post("/v1/x", content=b"x" * 10)) == (503, "not_loaded")
        loaded = client.post(PREFIX + "/load", json={"model_path": "x" * 20})
        assert problem(loaded) == (413, "body_too_large")


def _send_with_requests(url: str, body: Body, headers: dict[str, str]) -> Answer:
    requests = pytest.importorskip("requests")
    answer = requests.post(url, data=body, headers=headers, timeout=DEADLINE_S)
    return answer.status_code, answer.content


def _send_with_httpx(url: str, body: Body, headers: dict[str, str]) -> Answer:
    with httpx.Client(timeout=DEADLINE_S, trust_env=False) as client:
        answer = client.post(url, content=body, headers=headers)
    return answer.status_code, answer.content


def _send_with_urllib(url: str, body: Body, headers: dict[str, str]) -> Answer:
    """It sends `Connection: close`, and reads no answer before it has sent everything."""
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _send_with_curl(url: str, body: Body, headers: dict[str, str]) -> Answer:
    """Without `Expect`, which would keep it from sending."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    sent = body if isinstance(body, bytes) else b"".join(body)
    given = {**headers, "Expect": "", **({} if sent is body else {"Transfer-Encoding": "chunked"})}
    options = [f"-H{name}: {value}" if value else f"-H{name}:" for name, value in given.items()]
    command = ["curl", "-sS", "--noproxy", "*", "-w", "%{http_code}", "--data-binary", "@-"]
    done = subprocess.run([*command, *options, url], input=sent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout[-3:]), done.stdout[:-3]


CLIENTS: dict[str, Callable[[str, Body, dict[str, str]], Answer]] = {
    "requests": _send_with_requests,
    "httpx": _send_with_httpx,
    "urllib": _send_with_urllib,
    "curl": _send_with_curl,
}
FRAMINGS: dict[str, Callable[[], Body]] = {
    "declared": lambda: b"x" * (8 << 20),
    "chunked": lambda: _chunks(8 << 20),
}


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("name", CLIENTS)
def test_client_that_is_still_sending_gets_the_answer(
    serve: Serve, name: str, framing: str
) -> None:
    """B90: a connection that is closed with unread input is reset, and the answer is lost."""
    send, body = CLIENTS[name], FRAMINGS[framing]
    good = {"X-Api-Key": "k", "Content-Type": "application/json"}
    too_large, not_loaded = (413, "body_too_large"), (503, "not_loaded")
    with serve(api_keys=["k"], max_body_bytes=4 << 20) as client:
        for path, headers, expected in (
            ("/v1/completions", good, too_large if framing == "declared" else not_loaded),
            (PREFIX + "/load", good, too_large),
            (PREFIX + "/load", {}, (401, "unauthorized")),
            (PREFIX + "/load", {**good, "Host": "evil.example"}, (403, "forbidden_host")),
        ):
            status, answer = send(str(client.base_url.join(path)), body(), headers)
            assert (status, category_of(answer)) == expected


def test_answer_is_there_before_the_rest_of_the_body(serve: Serve) -> None:
    """A client that waits for it must not wait until the server gives up reading."""
    with serve(api_keys=["k"]) as client:
        address = client.base_url.host, client.base_url.port
        connection = http.client.HTTPConnection(*address, timeout=limits._LINGER_PAUSE_S / 2)
        connection.putrequest("POST", "/v1/x")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"half")
        answer = connection.getresponse()
        assert category_of(answer.read()) == "unauthorized"
        connection.close()


@pytest.mark.parametrize("name", ["bytes", "pause", "time"])
def test_rest_of_a_body_is_read_within_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client decides how much it sends, and when."""
    monkeypatch.setattr(limits, "_LINGER_PAUSE_S", 0.05 if name == "pause" else 60.0)
    monkeypatch.setattr(limits, "LINGER_S", 0.05 if name == "time" else 60.0)
    sent: list[Any] = []
    received = 0

    async def receive() -> Any:
        nonlocal received
        received += 1
        await asyncio.sleep(60 if name == "pause" else 0)
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    async def send(message: Any) -> None:
        sent.append((message["type"], message.get("body"), message.get("more_body", False)))

    scope = {
        "type": "http",
        "path": "/",
        "headers": [(b"content-length", b"99999")],
        "method": "POST",
    }
    lingering = limits.linger(PlainTextResponse("no"), 100 if name == "bytes" else 1 << 40)
    asyncio.run(lingering(scope, receive, send))  # type: ignore[arg-type]
    assert sent[1:] == [("http.response.body", b"no", True), ("http.response.body", b"", False)]
    assert {"bytes": received == 10, "pause": received == 1, "time": received > 1}[name]


@pytest.mark.parametrize("body", [b"", b"x" * 10])
def test_body_that_was_read_is_not_waited_for(body: bytes) -> None:
    """Whether the app has read it or not, and if the client has disconnected."""
    sent: list[Any] = []
    messages = [
        {"type": "http.request", "body": body, "more_body": bool(body)},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": [(b"content-length", b"10")], "method": "POST"}
    asyncio.run(limits.linger(PlainTextResponse("no"))(scope, receive, send))  # type: ignore[arg-type]
    assert sent[-1] == {"type": "http.response.body", "body": b""}
    assert len(messages) == (0 if body else 1)


@pytest.mark.parametrize("has_begun", [False, True])
def test_answer_that_has_begun_is_not_replaced_by_413(has_begun: bool) -> None:
    """The app believes that its client has disconnected: an answer that it begins after that is
    replaced, one that has begun is not.
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

    scope = {
        "type": "http",
        "path": "/",
        "headers": [(b"transfer-encoding", b"chunked")],
        "method": "POST",
    }
    asyncio.run(limit_body(app, 3)(scope, receive, send))  # type: ignore[arg-type]
    statuses = [message["status"] for message in sent if "status" in message]
    assert statuses == [200 if has_begun else 413]


# ---------------------------------------------------------------------------------------- headers


def test_answers_carry_browser_headers(serve: Serve, gate: Gate, tiny_model: str) -> None:
    """Headers that an answer sets itself, as an event stream does, are kept."""
    with serve(gate.binary, api_keys=["k"]) as client:
        client.headers["Authorization"] = "Bearer k"
        body = {"model_path": tiny_model}
        accepted = client.post(PREFIX + "/load?wait=false", json=body)
        until(client, is_at_gate)
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


def test_refusals_carry_browser_headers(serve: Serve) -> None:
    with serve(api_keys=["k"]) as client:
        for headers in ({"Host": "evil.example"}, {"Origin": "null"}, {}):
            answer = client.get("/nowhere", headers=headers)
            assert answer.status_code in {401, 403}
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
