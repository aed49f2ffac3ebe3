"""`/v1/*`: with a real llama.cpp server behind it, and with one that echoes requests."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import fastapi
import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletion

from orchestrator.http import create_app, upstream
from tests.kit.http import (
    DEADLINE_S,
    PREFIX,
    Gate,
    Lender,
    Serve,
    is_at_gate,
    pass_through_app,
    problem,
    serving,
    until,
)
from tests.kit.process.support import Background, Fake
from tests.kit.sentences import assert_sentence

LOAD, CHAT = PREFIX + "/load", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
ENDLESS = {"prompt": "hi", "max_tokens": 1_000_000, "stream": True, "ignore_eos": True}


def client_of(client: httpx.Client) -> openai.OpenAI:
    url = str(client.base_url.join("/v1"))
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0)


# ------------------------------------------------------------------------------ the real server


def test_openai_client_works_across_a_swap(serve: Serve, tiny_model: str, other_model: str) -> None:
    """With only its base URL set: answers, streams and the list of models."""
    with serve() as client:
        client.post(LOAD, json={"model_path": tiny_model})
        with client_of(client) as ai:
            chat = ai.chat.completions.create(
                model="x", messages=cast("Any", HELLO), max_tokens=4, seed=1
            )
            assert chat.choices[0].message.content
            assert chat.usage is not None
            assert chat.usage.completion_tokens == 4
            assert ai.models.list().data[0].id == Path(tiny_model).stem
            assert client.post(LOAD, json={"model_path": other_model}).status_code == 200
            stream = ai.chat.completions.create(
                model="x", messages=cast("Any", HELLO), max_tokens=4, stream=True
            )
            pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
            assert len([piece for piece in pieces if piece]) >= 2, "in several pieces"
            assert ai.models.list().data[0].id == Path(other_model).stem


def test_tools_reach_the_prompt_through_the_openai_client(serve: Serve, tiny_model: str) -> None:
    """Tools and their results make the prompt longer. (A model of random weights calls none.)"""
    template = "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    template += "{{ m.content }}{{ m.tool_call_id }}{% endfor %}"
    tool = {"type": "function", "function": {"name": "pick", "parameters": {"type": "object"}}}
    call = {"id": "call-1", "type": "function", "function": {"name": "pick", "arguments": "{}"}}
    answered = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "2"},
    ]
    with serve() as client, client_of(client) as ai:
        client.post(LOAD, json={"model_path": tiny_model, "chat_template_override": template})

        def prompt_tokens(**fields: Any) -> int:
            wanted: Any = {"model": "x", "messages": HELLO, "max_tokens": 1, **fields}
            usage = cast("ChatCompletion", ai.chat.completions.create(**wanted)).usage
            assert usage is not None
            return usage.prompt_tokens

        bare, with_tool = prompt_tokens(), prompt_tokens(tools=[tool])
        assert with_tool >= bare + len("pick")
        assert prompt_tokens(tools=[tool], messages=answered) > with_tool
        wanted: Any = {"model": "x", "messages": HELLO, "tools": [tool], "max_tokens": 4}
        assert list(ai.chat.completions.create(**wanted, stream=True))


def test_stream_leaves_no_dead_connection_for_the_next_request(
    serve: Serve, tiny_model: str
) -> None:
    """llama-server closes a connection after a stream, whatever its headers say: the next request
    was sent into it, and answered with 503.
    """
    short = {"prompt": "a", "max_tokens": 1}
    with serve() as client:
        client.post(LOAD, json={"model_path": tiny_model})
        for number in range(40):
            body = {**short, "stream": number % 2 == 0}
            assert client.post("/v1/completions", json=body).status_code == 200
            odd = json.dumps(body).replace("stream", "str\\u0065am").encode()
            headers = {"Content-Type": "application/json"}
            answer = client.post("/v1/completions", content=odd, headers=headers)
            assert answer.status_code == 200


@pytest.mark.external
def test_no_request_fails_while_models_are_swapped_fifty_times(
    serve: Serve, llama_server: str, tiny_model: str, other_model: str
) -> None:
    """With four clients that never pause: each answer is complete, and so is each stream."""
    ended = threading.Event()
    answered = [0, 0, 0, 0]

    def ask(client: httpx.Client, number: int) -> None:
        while not ended.is_set():
            body = {"prompt": "a", "max_tokens": 8, "stream": number % 2 == 0}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            if body["stream"]:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert answer.json()["usage"]["completion_tokens"] == 8
            answered[number] += 1

    with serve(llama_server) as client, contextlib.ExitStack() as stack:
        first = client.post(LOAD, json={"model_path": tiny_model}).json()
        clients = [
            Background(
                ask,
                stack.enter_context(httpx.Client(base_url=client.base_url, timeout=DEADLINE_S)),
                number,
            )
            for number in range(4)
        ]
        try:
            pids = {first["pid"]}
            for number in range(50):
                model = (other_model, tiny_model)[number % 2]
                swapped = client.post(LOAD, json={"model_path": model})
                assert swapped.status_code == 200, swapped.text
                pids.add(swapped.json()["pid"])
        finally:
            ended.set()
        for one in clients:
            one.result()
        assert len(pids) == 51
        assert min(answered) > 0


def test_request_is_held_while_a_load_is_in_flight(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    """It gets the model that is being loaded."""
    with serve(gate.binary) as client:
        client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        until(client, is_at_gate)
        held = Background(client.get, "/v1/models")
        gate.open()
        answer = held.result()
        assert answer.status_code == 200
        assert answer.json()["data"]


def test_request_without_a_model_is_refused_at_once(serve: Serve) -> None:
    with serve() as client:
        assert problem(client.post("/v1/completions", json={})) == (503, "not_loaded")
        assert client.get("/v1/models").json() == {"object": "list", "data": []}


def test_swap_waits_for_a_stream_until_its_client_disconnects(
    serve: Serve, tiny_model: str, other_model: str
) -> None:
    """B61, and the server does not go on generating for a client that has disconnected."""
    with serve(drain_timeout_s=600) as client:
        client.post(LOAD, json={"model_path": tiny_model})
        with client.stream("POST", "/v1/completions", json=ENDLESS) as stream:
            chunks = stream.iter_raw()
            next(chunks)
            swap = Background(client.post, LOAD, json={"model_path": other_model})
            until(client, lambda status: status["state"] == "Killing")
            next(chunks)
            assert not swap.is_done
        assert swap.result().json()["model_path"] == other_model


def test_answer_is_cut_when_the_server_dies(serve: Serve, tiny_model: str) -> None:
    """A cut answer must not look complete."""
    with serve() as client:
        pid = client.post(LOAD, json={"model_path": tiny_model}).json()["pid"]
        with client.stream("POST", "/v1/completions", json=ENDLESS) as stream:
            chunks = stream.iter_raw()
            next(chunks)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                list(chunks)


def test_pass_through_needs_a_key(serve: Serve, tiny_model: str) -> None:
    with serve(api_keys=["s3cret-key"]) as client:
        assert client.get("/v1/models").status_code == 401
        headers = {"Authorization": "Bearer s3cret-key"}
        client.post(LOAD, json={"model_path": tiny_model}, headers=headers)
        assert client.get("/v1/models", headers=headers).status_code == 200


# ------------------------------------------------------------------------------------ the echo


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the request it got, and with headers that must not be passed on."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        received = {
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body.hex(),
        }
        data = json.dumps(received).encode()
        self.send_response(207)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "X-Private")
        self.send_header("X-Private", "1")
        self.send_header("X-Public", "1")
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


for _method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
    setattr(Echo, f"do_{_method}", Echo.answer)


@pytest.fixture
def echo() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def through() -> Iterator[Callable[..., httpx.Client]]:
    """Serve a pass-through to a lender's server."""
    with contextlib.ExitStack() as stack:

        def start(lender: Lender, **options: Any) -> httpx.Client:
            return stack.enter_context(serving(pass_through_app(lender, **options)))

        yield start


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_method_query_and_body_are_passed_unchanged(
    through: Callable[..., httpx.Client], echo: str, method: str
) -> None:
    lender = Lender(echo)
    client = through(lender)
    body = bytes(range(256)) * 300
    answer = client.request(method, "/v1/a%20b/c?x=1&x=2&y=%2F", content=body)
    received = answer.json()
    assert answer.status_code == 207
    assert (received["method"], received["path"]) == (method, "/v1/a%20b/c?x=1&x=2&y=%2F")
    assert bytes.fromhex(received["body"]) == body
    assert received["headers"]["content-length"] == str(len(body))
    assert lender.is_returned.wait(DEADLINE_S)


def test_head_answer_keeps_its_headers(through: Callable[..., httpx.Client], echo: str) -> None:
    """`Content-Length` is that of the answer to GET, and the connection can be reused."""
    client = through(Lender(echo))
    for _ in range(2):
        answer = client.head("/v1/x")
        assert (answer.status_code, answer.content) == (207, b"")
        assert int(answer.headers["content-length"]) > 0
        assert client.get("/v1/x").status_code == 207


def test_expect_100_continue_is_answered_here(
    through: Callable[..., httpx.Client], echo: str
) -> None:
    """curl sends `Expect: 100-continue` with a large body; it concerns one connection only."""
    client = through(Lender(echo))
    received = client.post("/v1/x", content=b"x" * 2048, headers={"Expect": "100-continue"}).json()
    assert bytes.fromhex(received["body"]) == b"x" * 2048
    assert "expect" not in received["headers"]


def test_multipart_and_chunked_bodies_are_passed(
    through: Callable[..., httpx.Client], echo: str
) -> None:
    client = through(Lender(echo))
    sent = client.post("/v1/files", files={"file": ("a.bin", b"\0\1\2")}, data={"purpose": "x"})
    assert b"\0\1\2" in bytes.fromhex(sent.json()["body"])
    assert sent.json()["headers"]["content-type"].startswith("multipart/form-data; boundary=")
    chunks = iter([b"one", b"", b"two"])
    streamed = client.post("/v1/x", content=chunks)
    assert bytes.fromhex(streamed.json()["body"]) == b"onetwo"


def test_hop_by_hop_and_private_headers_are_not_passed(
    through: Callable[..., httpx.Client], echo: str
) -> None:
    """Neither the API's key to the server, nor CORS headers to a browser."""
    client = through(Lender(echo))
    headers = {
        "Authorization": "Bearer s3cret",
        "X-Api-Key": "s3cret",
        "Cookie": "a=b",
        "Origin": "http://evil.example",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "TE": "trailers",
        "X-Kept": "yes",
    }
    answer = client.get("/v1/x", headers=headers)
    received = answer.json()["headers"]
    assert received["x-kept"] == "yes"
    assert not received.keys() & {"authorization", "x-api-key", "cookie", "origin", "x-hop", "te"}
    assert answer.headers["x-public"] == "1"
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert "x-private" not in answer.headers
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/v1/../slots", "/v1/%2e%2e/slots", "/v1/x/%2E./y", "/v1/..%2fz"])
def test_paths_out_of_v1_are_404(
    through: Callable[..., httpx.Client], echo: str, path: str
) -> None:
    client = through(Lender(echo))
    request = client.build_request("GET", "/v1/x")
    request.url = request.url.copy_with(raw_path=path.encode())
    assert client.send(request).status_code == 404


def test_request_is_resent_when_a_reused_connection_was_closed(
    through: Callable[..., httpx.Client],
) -> None:
    """A server may close an idle connection at the moment when it is used again."""
    answers = 0

    def answer_once(listener: socket.socket) -> None:
        nonlocal answers
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                answers += 1
                if connection.recv(65536):  # the next request comes, and is not read
                    connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_once, args=(listener,))
        thread.start()
        client = through(Lender(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        assert [client.get("/v1/x").status_code for _ in range(3)] == [200, 200, 200]
        assert answers == 3
        client.close()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)


class Raw:
    """A server that answers each request of a connection with the next of these, as they are, and
    then closes it. It reads heads and bodies of a known length.
    """

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._accept)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(DEADLINE_S)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as file:
                while head := b"".join(iter(file.readline, b"\r\n")) if file.peek(1) else b"":
                    length = re.search(rb"(?i)content-length: (\d+)", head)
                    self.requests.append(head + file.read(int(length[1]) if length else 0))
                    answer = self.answers.pop(0) if self.answers else b""
                    connection.sendall(answer)
                    if not answer.startswith(b"HTTP/1.1 200"):
                        break


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_request_that_may_have_been_executed_is_not_sent_again(
    through: Callable[..., httpx.Client], method: str
) -> None:
    """The server is there, so it has not ended either."""
    with Raw() as server:
        answer = through(Lender(server.url)).request(method, "/v1/x", content=b"{}")
        assert problem(answer) == (502, "bad_gateway")
        assert_sentence("http.unanswered", answer.json()["error"]["message"])
        assert len(server.requests) == 1


def test_request_on_a_lost_kept_connection_is_sent_once_more(
    through: Callable[..., httpx.Client],
) -> None:
    """And only once: the second connection is a fresh one."""
    with Raw(OK) as server:
        client = through(Lender(server.url))
        assert client.post("/v1/x", content=b"first").text == "ok"
        assert client.post("/v1/x", content=b"second").status_code == 502
        bodies = [request.rpartition(b"\r\n")[2] for request in server.requests]
        assert bodies == [b"first", b"second", b"second"]


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", "999"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "101"),
        (b"HTTP/1.1 600 \r\nContent-Length: 0\r\n\r\n", "600"),
        (b"SSH-2.0-OpenSSH_9.9 \x1b[31mred\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX-A: \x1b[31m\r\nContent-Length: 0\r\n\r\n", "control character"),
    ],
)
def test_answer_that_nobody_can_pass_on_is_502(
    through: Callable[..., httpx.Client], answer: bytes, named: str
) -> None:
    """With what was wrong, and without what a terminal would obey."""
    with Raw(answer) as server:
        answered = through(Lender(server.url)).post("/v1/completions", content=b"{}")
        assert problem(answered) == (502, "bad_gateway")
        assert named in answered.json()["error"]["message"]
        assert answered.json()["error"]["message"].isprintable()
        assert len(server.requests) == 1


def test_held_requests_are_bounded_in_time_and_number(through: Callable[..., httpx.Client]) -> None:
    """503 with `Retry-After`, instead of an endless queue."""
    client = through(Lender(None), held_s=0.2)
    late = client.get("/v1/models")
    assert problem(late) == (503, "unavailable")
    assert int(late.headers["Retry-After"]) >= 1
    full = through(Lender(None), max_held=0)
    assert problem(full.get("/v1/models")) == (503, "unavailable")


@pytest.mark.parametrize("how", ["load", "unload"])
def test_no_idle_connection_of_ours_holds_up_the_end_of_a_server(
    serve: Serve,
    tmp_path: Path,
    tiny_model: str,
    other_model: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B89: a server waits for kept connections before it exits."""
    monkeypatch.setattr(upstream, "_KEEPALIVE_S", 600.0)
    fake = Fake(tmp_path / "fake")
    fake.behave(waits_for_clients=True)
    with serve(fake.path, server_env=fake.env, kill_grace_s=600.0) as client:
        client.post("/api/inference/load", json={"model_path": tiny_model}).raise_for_status()
        assert client.post("/v1/completions", json={}).status_code == 200
        body = {"model_path": other_model} if how == "load" else {}
        client.post(f"/api/inference/{how}", json=body).raise_for_status()
    fake.assert_no_overlap()


def test_unreachable_server_is_503(through: Callable[..., httpx.Client]) -> None:
    client = through(Lender("http://127.0.0.1:1"))
    answer = client.get("/v1/models")
    assert problem(answer) == (503, "server_exited")
    assert answer.headers["Retry-After"]


def test_app_passes_only_paths_below_v1(serve: Serve, tmp_path: Path) -> None:
    """Also where it is mounted below a path of another app."""
    with serve() as client:
        assert client.get("/v1/models").json()["data"] == []
        assert problem(client.get("/v1")) == (404, "not_found")
        assert problem(client.get("/v2/models")) == (404, "not_found")
    outer = fastapi.FastAPI()
    inner = create_app(llama_server="embedded", state_dir=tmp_path / "inner")
    outer.mount("/llama", inner)
    with TestClient(inner), serving(outer) as client:  # a mounted app's lifespan is not run
        assert problem(client.post("/llama/v1/completions")) == (503, "not_loaded")
        assert problem(client.get("/llama/nothing")) == (404, "not_found")
