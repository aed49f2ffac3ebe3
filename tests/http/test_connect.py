"""`Orchestrator.connect`: the facades of a service, against a service on a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from orchestrator import (
    AsyncOrchestrator,
    InvalidRequest,
    LoadOutcome,
    MalformedRequest,
    ModelNotFound,
    NotLoaded,
    Orchestrator,
    OrchestratorError,
    Problem,
    RemoteOrchestrator,
    State,
    UnknownGeneration,
    Unreachable,
)
from orchestrator.errors import CLASSES, Restored
from orchestrator.http import create_app
from orchestrator.runtime.service import Exchange, Service
from tests.kit.http import PREFIX, Gate, Serve, is_at_gate, serving, until
from tests.kit.process.support import is_running
from tests.kit.shell.harness import asyncio_test


@pytest.fixture
def service(state_dir: Path) -> Iterator[tuple[AsyncOrchestrator, RemoteOrchestrator]]:
    """An orchestrator, and the remote facade of the same one."""
    orch = AsyncOrchestrator(llama_server="embedded", state_dir=state_dir)
    with serving(create_app(orch)) as client:
        yield orch, Orchestrator.connect(str(client.base_url))


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Serve one answer to everything; return its URL."""
    said = b""

    class Foreign(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def serve(body: bytes) -> str:
            nonlocal said
            said = body
            return f"http://127.0.0.1:{server.server_port}"

        yield serve
        server.shutdown()
        thread.join()


def test_answers_are_those_of_the_orchestrator_itself(
    service: tuple[Any, RemoteOrchestrator], tiny_model: str
) -> None:
    """Every method of the contract, and what is read by the same names."""
    orch, remote = service
    assert remote.status().state is State.IDLE
    assert remote.plan(tiny_model, max_seq_length=256).as_dict()["action"] == "load"
    outcome = remote.load(model_path=Path(tiny_model), max_seq_length=256)
    assert isinstance(outcome, LoadOutcome)
    assert outcome.as_dict() == orch.outcome(1).as_dict()
    assert outcome == orch.outcome(outcome.generation)
    assert remote.load(tiny_model, max_seq_length=256).status == "already_loaded"
    assert remote.status().loaded == orch.status().loaded
    assert remote.progress() == orch.progress()
    assert remote.options() == orch.options()
    assert remote.history() == orch.history()
    assert remote.past_load(1) == orch.past_load(1)
    assert remote.outcome(1) == outcome
    assert remote.logs(3) == orch.logs(3)
    assert (remote.logs(0), remote.history(0)) == ((), [])
    assert remote.variants(tiny_model).variants[0].size_bytes == os.path.getsize(tiny_model)
    assert remote.prefetch(tiny_model).files == [tiny_model]
    generation = remote.submit(tiny_model, max_seq_length=512)
    assert remote.settled(generation) == orch.outcome(generation)
    assert remote.settled(generation, 0) == orch.outcome(generation)
    assert remote.cancel(generation=generation) is False
    assert remote.unload("other.gguf").status == "not_loaded"
    assert remote.unload().status == "unloaded"
    assert remote.status().state is orch.status().state is State.IDLE


@asyncio_test
async def test_async_facade_has_the_same_answers(
    service: tuple[Any, RemoteOrchestrator], tiny_model: str
) -> None:
    orch, remote = service
    async with AsyncOrchestrator.connect(remote.url) as one:
        outcome = await one.load(tiny_model)
        assert outcome == orch.outcome(1) == await one.settled(1)
        assert one.status().loaded == orch.status().loaded
        assert (await one.variants(tiny_model)) == remote.variants(tiny_model)
        assert (await one.prefetch(tiny_model)) == remote.prefetch(tiny_model)
        generation = await one.submit(tiny_model, force_reload=True)
        assert (await one.settled(generation)) == orch.outcome(generation)
        assert await one.cancel(generation=generation) is False
        async with one.lease() as server:
            assert server.base_url == remote.url + "/v1"
        lines = [line async for line in _first(one.follow_logs(5), 5)]
        assert len(lines) == 5
        assert (await one.unload()).status == "unloaded"
        events = [event async for event in _first(one.events(after=0), 5)]
        assert [event.id for event in events] == [1, 2, 3, 4, 5]
        assert events[-1].dest == "Healthy"
    assert orch.status().state is State.IDLE


async def _first(stream: Any, count: int) -> Any:
    async with contextlib.aclosing(stream):
        for _ in range(count):
            yield await anext(stream)


def test_errors_are_typed(service: tuple[Any, RemoteOrchestrator]) -> None:
    _, remote = service
    with pytest.raises(ModelNotFound, match=r"gone\.gguf does not exist") as missing:
        remote.load("gone.gguf")
    assert (missing.value.field, missing.value.status) == ("model_path", 404)
    with pytest.raises(UnknownGeneration):
        remote.outcome(99)
    with pytest.raises(UnknownGeneration):
        remote.past_load(99)
    with pytest.raises(NotLoaded), remote.lease():
        pass
    with pytest.raises(MalformedRequest):
        remote.load("m.gguf", max_seq_lenght=3)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="exactly one"):
        remote.cancel()


@pytest.mark.parametrize("category", CLASSES)
def test_problem_of_a_document_is_the_one_that_made_it(category: str) -> None:
    inner = Problem("disk_full", "no room", "model_path")
    restored = Restored(3, "a.gguf", "Q4_K_M", inner)
    told = Problem(category, "why", "f", 7, ("x",), "r", ("s",), 1.5, restored)
    for problem in (told, Problem(category, "why")):
        made = Problem.from_dict(problem.as_dict())
        assert made == problem
        assert made.as_dict() == problem.as_dict()
        assert type(made.error()) is CLASSES[category]


def test_error_of_the_service_alone_has_its_category(serve: Serve) -> None:
    """No exception of the library means a wrong key."""
    with serve(api_keys=["right"]) as client:
        for key in (None, "wrong"):
            with pytest.raises(OrchestratorError) as refused:
                Orchestrator.connect(str(client.base_url), key).status()
            error = refused.value
            assert (error.category, error.status, error.title) == (
                "unauthorized",
                401,
                "Unauthorized",
            )
            assert error.problem.as_dict()["status"] == 401
        assert Orchestrator.connect(str(client.base_url), "right").status().state is State.IDLE


@pytest.mark.parametrize(
    "url",
    ["", "x", "ftp://x", "http://", "http://a:b@host", "http://h:99999", "http://h?a=1", "//h"],
)
def test_url_that_cannot_be_used_is_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"must be like http://127\.0\.0\.1:8642") as refused:
        Orchestrator.connect(url)
    assert refused.value.field == "url"
    assert "a:b" not in str(refused.value)


@pytest.mark.parametrize("key", ["", "a\nb", "kä"])
def test_key_that_cannot_be_sent_is_refused_at_once(key: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        AsyncOrchestrator.connect("http://127.0.0.1:1", key)
    assert refused.value.field == "api_key"


@asyncio_test
async def test_service_that_is_not_there_is_unreachable() -> None:
    one = AsyncOrchestrator.connect("http://127.0.0.1:9")
    for call in (one.load("m.gguf"), one.unload(), anext(one.events())):
        with pytest.raises(Unreachable, match="does not respond"):
            await call


def test_relative_path_starts_in_the_folder_of_the_caller(
    service: tuple[Any, RemoteOrchestrator], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(tiny_model).parent)
    assert service[1].load(Path(tiny_model).name).model_path == tiny_model


@asyncio_test
async def test_cancelled_await_withdraws_its_load(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    with serve(gate.binary) as client:
        one = AsyncOrchestrator.connect(str(client.base_url))
        loading = asyncio.ensure_future(one.load(tiny_model))
        await asyncio.to_thread(until, client, is_at_gate)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await asyncio.to_thread(until, client, lambda status: status["state"] == "Idle")
        assert client.get(PREFIX + "/loads/1").json()["outcome"]["category"] == "cancelled"


@pytest.mark.parametrize("head", ["", "Connection: close\r\n"], ids=["keep", "close"])
def test_aborted_stream_ends_whoever_waits_for_its_next_line(head: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        exchange = Exchange(Service(url), "GET", "/", timeout_s=2.0)

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted:
                text = f"HTTP/1.1 200 OK\r\n{head}Transfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n"
                accepted.sendall(text.encode())
                while accepted.recv(4096):
                    pass

        server = threading.Thread(target=serve)
        server.start()
        lines = exchange.open()
        assert next(lines) == "a"
        exchange.abort()
        assert next(lines, None) is None, "not a time-out"
        server.join(20)


def test_exchange_that_is_aborted_before_it_connects_sends_nothing(serve: Serve) -> None:
    with serve() as client:
        body = {"model_path": "gone.gguf"}
        exchange = Exchange(Service(str(client.base_url)), "POST", PREFIX + "/load", body)
        exchange.abort()
        with pytest.raises(Unreachable):
            exchange.json(dict)
        assert client.get(PREFIX + "/loads").json() == {"loads": []}


def test_events_begin_with_the_call(
    service: tuple[Any, RemoteOrchestrator], tiny_model: str
) -> None:
    """Not with the first step of the iteration, which may come after the load."""
    _, remote = service
    events = remote.events()
    remote.load(tiny_model)
    assert [event.dest for event in itertools.islice(events, 5)][-1] == "Healthy"
    remote.unload()
    later = remote.events(after=5)
    assert next(later).trigger == "unload"
    for stream in (events, later):
        stream.close()


@asyncio_test
async def test_events_of_the_async_facade_begin_with_the_call_too(
    service: tuple[Any, RemoteOrchestrator], tiny_model: str
) -> None:
    one = AsyncOrchestrator.connect(service[1].url)
    events = one.events()
    assert (await one.load(tiny_model)).status == "loaded"
    assert [event.dest async for event in _first(events, 5)][-1] == "Healthy"


def test_steps_of_a_load_are_events_on_request(serve: Serve, gate: Gate, tiny_model: str) -> None:
    with serve(gate.binary) as client:
        remote = Orchestrator.connect(str(client.base_url))
        with contextlib.closing(remote.events(progress=True)) as events:
            remote.submit(tiny_model)
            found = next(event for event in events if event.kind == "progress")
        assert found.data == remote.progress().as_dict()


def test_lease_is_for_any_client_and_waits_for_a_load(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    """The service's own `/v1`, and also if a caller appends `/v1`, as to a server of its own."""
    with serve(gate.binary, api_keys=["s3cret"]) as client:
        remote = Orchestrator.connect(str(client.base_url), "s3cret")
        generation = remote.submit(tiny_model)
        threading.Timer(0.2, gate.open).start()
        with remote.lease() as server:
            status = remote.status().loaded
            assert status is not None
            assert (server.pid, server.generation) == (status.pid, generation)
            assert server.base_url == f"{client.base_url}/v1".replace("//v1", "/v1")
            assert server.api_key == "s3cret"
            for base_url in (server.base_url, server.base_url + "/v1"):
                with openai.OpenAI(base_url=base_url, api_key=server.api_key) as one:
                    assert [model.id for model in one.models.list()] == [Path(tiny_model).stem]


def test_doubled_v1_lists_no_model_when_none_is_loaded(serve: Serve) -> None:
    with serve() as client:
        assert client.get("/v1/v1/models").json() == {"object": "list", "data": []}


def test_unload_can_cut_what_it_would_wait_for(serve: Serve, tiny_model: str) -> None:
    """And a swap that drains goes on at once if the model that runs is unloaded so."""
    endless = {"prompt": "x", "n_predict": -1, "stream": True, "ignore_eos": True}
    with serve(drain_timeout_s=600) as client:
        remote = Orchestrator.connect(str(client.base_url))
        pid = remote.load(tiny_model).pid
        with client.stream("POST", "/v1/completions", json=endless) as stream:
            chunks = stream.iter_raw()
            next(chunks)
            draining = threading.Thread(target=remote.unload)
            draining.start()
            status = until(client, lambda status: status["draining_left_s"] is not None)
            assert status["leases"] == 1
            assert remote.unload(cut=True).status == "unloaded"
            draining.join(20)
            with pytest.raises(httpx.RemoteProtocolError):
                list(chunks)
        assert not is_running(pid)
        wrong = client.post(PREFIX + "/unload", json={"cut": "yes"})
        assert (wrong.status_code, wrong.json()["field"]) == (422, "cut")


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"[" * 100_000, b'{"state": "Odd"}', b'{"state": 1}'],
    ids=["nothing", "empty", "list", "deep", "odd", "number"],
)
def test_another_service_is_not_taken_for_an_orchestrator(
    body: bytes, answering: Callable[[bytes], str]
) -> None:
    with pytest.raises(Unreachable, match="does not speak this API"):
        Orchestrator.connect(answering(body)).status()
