"""Limits of connections: heads, silence and number, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from orchestrator.http import connections, create_app
from orchestrator.http.connections import MAX_HEAD_BYTES, BoundedProtocol
from orchestrator.http.guards import limits
from tests.http.test_limits import CLIENTS
from tests.kit.http import DEADLINE_S, PREFIX, category_of, serving

Connect = Callable[[], socket.socket]
HOST = b"Host: localhost\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\n" + HOST


@pytest.fixture
def served(state_dir: Path) -> Iterator[httpx.Client]:
    app = create_app(llama_server="embedded", state_dir=state_dir)
    with serving(app, http=BoundedProtocol, timeout_keep_alive=60) as client:
        yield client


@pytest.fixture
def connect(served: httpx.Client) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def open_one() -> socket.socket:
            address = served.base_url.host, served.base_url.port
            return stack.enter_context(socket.create_connection(address, DEADLINE_S))

        yield open_one


def answer(connection: socket.socket, sent: bytes = b"") -> tuple[int, str]:
    """Send bytes, and return status and category of the answer after which the server closes."""
    connection.sendall(sent)
    with connection.makefile("rb") as reader:
        head, _, body = reader.read().partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    assert re.search(rb"\r\ncontent-type: application/(?:problem[+])?json\r\n", head + b"\r\n")
    return int(head.split()[1]), category_of(body)


def first_line(connection: socket.socket) -> bytes:
    """Return the first line of an answer that has a length."""
    received = b""
    while b"\r\n\r\n" not in received and (piece := connection.recv(65536)):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    while length and len(body) < int(length[1]) and (piece := connection.recv(65536)):
        body += piece
    return head.split(b"\r\n")[0]


def is_open(connection: socket.socket) -> bool:
    """Return whether a health check is answered."""
    connection.sendall(HEALTH + b"\r\n")
    received = b""
    while not received.endswith(b"}") and (piece := connection.recv(65536)):
        received += piece
    return received.startswith(b"HTTP/1.1 200")


def open_stream(connection: socket.socket) -> None:
    connection.sendall(b"GET " + PREFIX.encode() + b"/events HTTP/1.1\r\n" + HOST + b"\r\n")
    received = b""
    while not received.endswith(b"\r\n\r\n"):
        received += connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")


# ------------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize(
    "head",
    [
        HEALTH + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
        HEALTH + b"X-A: b\r\n" * (MAX_HEAD_BYTES // 4 + 1) + b"\r\n",
        b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        HEALTH + b"X-A: " + b"a" * (8 * MAX_HEAD_BYTES),
        b"GET /" + b"a" * (8 * MAX_HEAD_BYTES),
    ],
    ids=["field", "fields", "target", "endless-field", "endless-target"],
)
def test_large_head_is_refused(connect: Connect, head: bytes) -> None:
    """B102: also one that never ends."""
    assert answer(connect(), head) == (431, "head_too_large")


def test_head_up_to_the_limit_passes(served: httpx.Client) -> None:
    value = "a" * (MAX_HEAD_BYTES - 500)
    for _ in range(3):  # on one connection: each head is counted by itself
        assert served.get("/healthz", headers={"X-A": value}).status_code == 200


@pytest.mark.parametrize("name", CLIENTS)
def test_client_that_is_still_sending_gets_the_refusal_of_its_head(
    served: httpx.Client, name: str
) -> None:
    """B90: and not a connection reset."""
    url = str(served.base_url.join("/v1/completions"))
    headers = {"X-A": "a" * (2 * MAX_HEAD_BYTES - 50)}  # curl takes no argument of 128 KiB
    status, body = CLIENTS[name](url, b"x" * (8 << 20), headers)
    assert (status, json.loads(body)["category"]) == (431, "head_too_large")


def test_slow_head_is_refused(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    assert answer(connect(), HEALTH) == (408, "too_slow")
    connection = connect()
    assert is_open(connection)
    assert answer(connection, b"G") == (408, "too_slow")


@pytest.mark.parametrize(
    "junk",
    [
        *(b"\x16\x03\x01\x00", b"get / x\r\n", b"SSH-2.0-x\r\n", b"CONNECT /v1/x HTTP/1.1\r\n\r\n"),
        HEALTH + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        HEALTH + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEALTH + b"Transfer-Encoding: chunked, identity\r\n\r\n",
        HEALTH + b"X-A: b\r\n c\r\n\r\n",
        HEALTH + b"X-A: b\n\n",
    ],
)
def test_what_is_no_request_is_refused(connect: Connect, junk: bytes) -> None:
    assert answer(connect(), junk) == (400, "bad_request")


def test_broken_body_of_a_request_that_waits_is_refused(connect: Connect) -> None:
    post = b"POST " + PREFIX.encode() + b"/load HTTP/1.1\r\n" + HOST
    assert answer(connect(), post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n") == (
        400,
        "bad_request",
    )


def test_body_that_pauses_is_refused(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_PAUSE_S", 0.2)
    monkeypatch.setattr(limits, "_LINGER_PAUSE_S", 0.2)
    for path in (PREFIX.encode() + b"/load", b"/v1/completions"):
        post = b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\nhalf"
        if path.startswith(b"/v1"):
            post = post.removesuffix(b"half")
        assert answer(connect(), post) == (408, "too_slow")


class _NoWebSocket(asyncio.Protocol):
    """Stands for the library of WebSockets that uvicorn uses where it is installed."""

    def __init__(self, **_: object) -> None:
        raise AssertionError("a connection has left the limits")


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_body_of_a_request_that_offers_another_protocol_is_no_request(
    state_dir: Path, protocol: str, framing: str
) -> None:
    """Its sender could be refused a request, and have a proxy that keeps the connection send it as
    somebody else's. Java's client offers h2c with every request. With a WebSocket, the connection
    would keep its place for ever: a few hundred refused handshakes, and nobody can connect.
    """
    cancel, inside = b"POST " + PREFIX.encode() + b"/cancel HTTP/1.1\r\n", HEALTH + b"\r\n"
    offer = HOST + b"Connection: Upgrade\r\nUpgrade: " + protocol.encode() + b"\r\n"
    how, body = b"Content-Length: %d\r\n\r\n" % len(inside), inside
    if framing == "chunks":
        how = b"Transfer-Encoding: chunked\r\n\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(inside), inside)
    next_one = b"GET /readyz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    app = create_app(llama_server="embedded", state_dir=state_dir)
    with serving(app, http=BoundedProtocol, ws=_NoWebSocket) as client:
        address = client.base_url.host, client.base_url.port
        for expect in (b"", b"Expect: 100-continue\r\n"):
            with socket.create_connection(address, DEADLINE_S) as connection:
                connection.sendall(cancel + offer + expect + how + (b"" if expect else body))
                if expect:
                    assert first_line(connection) == b"HTTP/1.1 100 Continue"
                    connection.sendall(body)
                assert first_line(connection) == b"HTTP/1.1 422 Unprocessable Entity"
                connection.sendall(next_one)
                with connection.makefile("rb") as reader:
                    assert re.findall(rb"HTTP/1.1 \d+", reader.read()) == [b"HTTP/1.1 503"]


def test_trailer_is_no_header(connect: Connect) -> None:
    """RFC 9110, 6.5.1: a proxy that checks heads does not see it."""
    post = b"POST " + PREFIX.encode() + b"/cancel HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection = connect()
    connection.sendall(post + b"2\r\n{}\r\n0\r\n" + HOST + b"\r\n")
    assert first_line(connection) == b"HTTP/1.1 400 Bad Request"
    endless = (
        post.replace(b"Transfer", HOST + b"Transfer")
        + b"0\r\n"
        + b"X-A: b\r\n" * (MAX_HEAD_BYTES // 4 + 1)
    )
    assert answer(connect(), endless) == (431, "head_too_large")


# ------------------------------------------------------------------------------ idle, and too many


def test_idle_connection_is_closed(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first request and after one; empty lines, which RFC 9112 ignores, are no sign of
    life.
    """
    monkeypatch.setattr(connections, "IDLE_S", 0.2)
    silent, used = connect(), connect()
    assert is_open(used)
    for connection in (silent, used):
        connection.settimeout(0.02)
        with contextlib.suppress(ConnectionError):
            while True:
                connection.sendall(b"\r\n")
                with contextlib.suppress(TimeoutError):
                    if connection.recv(1) == b"":
                        break


def test_connection_with_a_request_is_never_idle(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("IDLE_S", "HEAD_S"):
        monkeypatch.setattr(connections, name, 0.2)
    stream, silent = connect(), connect()
    open_stream(stream)
    assert silent.recv(1) == b""
    stream.settimeout(0.5)
    with pytest.raises(TimeoutError):
        stream.recv(1)


def test_new_connection_takes_the_place_of_the_one_that_waited_longest(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B102: silent connections use up the descriptors of the process, and then nobody can connect.
    One with a request keeps its place.
    """
    monkeypatch.setattr(connections, "max_connections", lambda: 4)
    stream = connect()
    open_stream(stream)
    first, second, third = (connect() for _ in range(3))
    assert [is_open(one) for one in (second, third, first)] == [True] * 3
    second.sendall(b"GET /heal")  # the head of a request is none yet
    assert is_open(connect())
    assert second.recv(1) == b""
    assert is_open(connect())
    assert third.recv(1) == b""
    assert is_open(first)
    stream.settimeout(0.1)
    with pytest.raises(TimeoutError):
        stream.recv(1)


@pytest.mark.parametrize(
    ("soft", "expected"),
    [(1024, 448), (144, 8), (10, 8), (resource.RLIM_INFINITY, sys.maxsize)],
)
def test_connections_stay_below_the_limit_of_descriptors(
    soft: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert connections.max_connections() == expected
