"""A host that is told to stop: `uvicorn` processes with streams open and requests that wait."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from orchestrator import AsyncModelPool, AsyncOrchestrator, Event
from orchestrator.errors import ShuttingDown
from orchestrator.http import create_app
from orchestrator.http.shutdown import Shutdown
from tests.kit.command import COMMAND, environment
from tests.kit.http import DEADLINE_S, PREFIX, Gate, serving
from tests.kit.process.servers import servers_of
from tests.kit.process.support import until

STOPS_IN_S = 2.0

APPS = """
import contextlib, os
from fastapi import FastAPI
from orchestrator import AsyncOrchestrator
from orchestrator.http import create_app, router

OPTIONS = {"llama_server": os.environ["SERVER"], "state_dir": os.environ["STATE"]}

@contextlib.asynccontextmanager
async def of_its_own(app):
    yield

def whole():
    return create_app(**OPTIONS)

def routes():
    app = FastAPI(lifespan=of_its_own)
    app.include_router(router(AsyncOrchestrator(**OPTIONS)))
    return app

def mounted():
    app = FastAPI(lifespan=of_its_own)
    app.mount("/inner", create_app(**OPTIONS))
    return app

def nested():
    app = FastAPI()
    app.mount("/outer", mounted())
    return app
"""
PREFIXES = {"whole": "", "routes": "", "mounted": "/inner", "nested": "/outer/inner", "serve": ""}


class Host:
    """A uvicorn of its own, and clients of it on threads."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url
        self.ended: dict[str, httpx.Response | Exception] = {}
        self._clients: list[threading.Thread] = []

    def state(self) -> str | None:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(self.url + "/api/inference/status", trust_env=False, timeout=5)
            return str(answer.json()["state"]) if answer.status_code == 200 else None
        return None

    def open(self, path: str, body: dict[str, Any] | None = None) -> None:
        """Send a request, and wait for its first line, if it has no body."""
        has_begun = threading.Event()

        def send() -> None:
            try:
                method = "GET" if body is None else "POST"
                with httpx.stream(
                    method, self.url + path, json=body, trust_env=False, timeout=DEADLINE_S
                ) as answer:
                    has_begun.set()
                    answer.read()
                    self.ended[path] = answer
            except httpx.HTTPError as error:
                self.ended[path] = error

        client = threading.Thread(target=send)
        client.start()
        self._clients.append(client)
        if body is None:
            assert has_begun.wait(DEADLINE_S), path

    def stop(self, signum: int) -> float:
        """Send a signal, and return how many seconds the process then lived."""
        began = time.monotonic()
        self.process.send_signal(signum)
        self.process.wait(DEADLINE_S)
        took_s = time.monotonic() - began
        for client in self._clients:
            client.join(DEADLINE_S)
        return took_s

    def answer(self, path: str) -> httpx.Response:
        found = self.ended[path]
        assert isinstance(found, httpx.Response), found
        return found


@pytest.fixture
def begin(tmp_path: Path, state_dir: Path) -> Iterator[Callable[..., Host]]:
    """Start `uvicorn --factory` with one of the apps, or `serve`."""
    (tmp_path / "apps.py").write_text(APPS)
    with contextlib.ExitStack() as stack:

        def start(app: str, *args: str, server: str = "embedded") -> Host:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            command = [sys.executable, "-m", "uvicorn", "--factory", f"apps:{app}"]
            if app == "serve":
                command = [*COMMAND, "serve", "--llama-server", server]
                command += ["--state-dir", str(state_dir)]
            process = subprocess.Popen(
                [*command, "--port", str(port), "--log-level", "warning", *args],
                env=environment() | {"SERVER": server, "STATE": str(state_dir)},
                cwd=tmp_path,
                start_new_session=True,
            )
            stack.callback(process.wait)
            stack.callback(_kill_group, process.pid)
            host = Host(process, f"http://127.0.0.1:{port}{PREFIXES[app]}")
            until(host.state, "the app")
            return host

        yield start


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("app", PREFIXES)
def test_open_streams_do_not_hold_up_the_end_of_the_host(
    begin: Callable[..., Host], state_dir: Path, tiny_model: str, app: str, signum: int
) -> None:
    """uvicorn waits for open requests first, and without end, before an app hears of it."""
    host = begin(app)
    where, body = host.url + "/api/inference/load", {"model_path": tiny_model}
    answer = httpx.post(where, json=body, trust_env=False, timeout=DEADLINE_S)
    assert answer.status_code == 200
    streams = ("/api/inference/events", "/api/inference/logs?follow=true")
    for path in streams:
        host.open(path)
    assert host.stop(signum) < STOPS_IN_S
    assert [host.answer(path).status_code for path in streams] == [200, 200]
    assert servers_of(state_dir) == set()


@pytest.mark.parametrize("app", ["whole", "mounted", "serve"])
def test_waiting_requests_are_answered_when_the_host_is_stopped(
    begin: Callable[..., Host], state_dir: Path, tiny_model: str, gate: Gate, app: str
) -> None:
    """A load, a request below `/v1` that is held for it, and a wait for its outcome."""
    host = begin(app, server=gate.binary)
    host.open("/api/inference/load", {"model_path": tiny_model})
    until(lambda: host.state() == "WaitingHealth", "the load")
    place = urlsplit(host.url)
    waiting = http.client.HTTPConnection(place.netloc, timeout=DEADLINE_S)
    waiting.request("GET", place.path + "/api/inference/loads/1?wait_s=60")
    host.open("/v1/chat/completions", {"messages": []})
    until(lambda: "held_requests 1.0" in _metrics(host), "the held request")
    assert host.stop(signal.SIGTERM) < STOPS_IN_S
    with contextlib.closing(waiting):
        polled = json.loads(waiting.getresponse().read())
    # `serve` closes its orchestrator first, which then answers nothing else
    assert polled["category"] == "shutting_down" if app == "serve" else polled["generation"] == 1
    load = host.answer("/api/inference/load")
    assert (load.status_code, load.json()["category"]) == (503, "shutting_down")
    held = host.answer("/v1/chat/completions")
    assert held.status_code == 503
    assert "shutting_down" in held.text
    assert servers_of(state_dir) == set()


def _metrics(host: Host) -> str:
    return httpx.get(host.url + "/metrics", trust_env=False, timeout=5).text


def test_a_reload_does_not_wait_for_an_open_stream(
    begin: Callable[..., Host], tmp_path: Path
) -> None:
    """`uvicorn --reload` ends the process that serves before it starts the next one."""
    host = begin("whole", "--reload", "--reload-dir", str(tmp_path))
    (before,) = _children(host.process.pid)
    host.open("/api/inference/events")
    began = time.monotonic()
    (tmp_path / "apps.py").write_text(APPS + "\n# changed\n")
    until(lambda: not _is_alive(before), "the end of the old process")
    took_s = time.monotonic() - began
    until(host.state, "the new process")
    assert took_s < STOPS_IN_S + 1.0  # the change is noticed within a moment
    host.open("/api/inference/logs?follow=true")
    assert host.stop(signal.SIGINT) < STOPS_IN_S + 1.0


def _children(pid: int) -> list[int]:
    """Return the processes that uvicorn has started to serve."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in found}
    return [child for child, line in lines.items() if "spawn_main" in line]


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# -------------------------------------------------------------------------------------- handlers


@pytest.fixture
def server() -> Iterator[list[int]]:
    """What the handler of a server has heard; it is on SIGUSR1."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda signum, _: heard.append(signum))
    yield heard
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def shutdown() -> Shutdown:
    return Shutdown(signal.SIGUSR1)


async def forever() -> None:
    await asyncio.Event().wait()


async def raised_in(wait: Any) -> str:
    """Raise the signal while something waits, and return what that ends with."""
    waiting = asyncio.ensure_future(wait)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    signal.raise_signal(signal.SIGUSR1)
    try:
        return str(await asyncio.wait_for(waiting, DEADLINE_S))
    except ShuttingDown as error:
        return error.category


def test_a_wait_ends_and_the_server_hears_the_signal_too(
    server: list[int], shutdown: Shutdown
) -> None:
    assert not shutdown.has_begun
    assert asyncio.run(raised_in(shutdown.wait(forever()))) == "shutting_down"
    assert server == [signal.SIGUSR1]
    assert shutdown.has_begun


def test_a_wait_that_begins_after_the_signal_ends_at_once(
    server: list[int], shutdown: Shutdown
) -> None:
    """The server closes its listener a moment after the signal."""
    asyncio.run(raised_in(shutdown.wait(forever())))
    with pytest.raises(ShuttingDown):
        asyncio.run(shutdown.wait(forever()))

    async def stream() -> Any:
        await forever()
        yield 1

    async def read() -> list[Any]:
        return [item async for item in shutdown.until(stream())]

    assert asyncio.run(read()) == []


def test_a_host_that_lives_on_answers_again(
    server: list[int], shutdown: Shutdown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every signal ends a host."""
    asyncio.run(raised_in(shutdown.wait(forever())))
    later = time.monotonic() + 6
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not shutdown.has_begun
    assert asyncio.run(shutdown.wait(asyncio.sleep(0, "done"))) == "done"


@pytest.mark.parametrize("path", ["/events", "/logs?follow=true"])
def test_a_signal_right_after_the_head_ends_the_first_stream(
    server: list[int], state_dir: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """It has sent its head before it takes its first step; a mounted app has no lifespan."""
    monkeypatch.setattr("orchestrator.http.app.HOST", Shutdown(signal.SIGUSR1))

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
            signal.raise_signal(signal.SIGUSR1)

    async def receive() -> Any:
        await forever()

    async def ask() -> None:
        orch = AsyncOrchestrator(llama_server="embedded", state_dir=state_dir)
        name, _, query = (PREFIX + path).partition("?")
        scope: dict[str, Any] = {"type": "http", "method": "GET", "path": name}
        scope |= {"headers": [(b"host", b"localhost")]}
        scope |= {"raw_path": name.encode(), "query_string": query.encode(), "http_version": "1.1"}
        scope |= {"scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
        async with orch:
            await asyncio.wait_for(create_app(orch)(scope, receive, send), DEADLINE_S)

    asyncio.run(ask())
    assert server == [signal.SIGUSR1]


def test_a_time_out_inside_of_a_wait_stays_one(server: list[int], shutdown: Shutdown) -> None:
    async def too_slow() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        asyncio.run(shutdown.wait(too_slow()))


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_signal_without_a_handler_is_left_alone(shutdown: Shutdown, handler: Any) -> None:
    """Nobody waits for anything then; and what is ignored stays ignored."""
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        assert asyncio.run(shutdown.wait(asyncio.sleep(0, "done"))) == "done"
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_handlers_are_covered_once_and_restored(server: list[int], shutdown: Shutdown) -> None:
    theirs = signal.getsignal(signal.SIGUSR1)
    for _ in range(3):
        asyncio.run(shutdown.wait(asyncio.sleep(0)))
    signal.raise_signal(signal.SIGUSR1)
    assert server == [signal.SIGUSR1]
    shutdown.restore()
    assert signal.getsignal(signal.SIGUSR1) is theirs


def test_a_handler_that_others_put_over_ours_is_covered_and_left(
    server: list[int], shutdown: Shutdown
) -> None:
    """Both call what they cover, and nobody calls in circles."""
    asyncio.run(shutdown.wait(asyncio.sleep(0)))
    ours: Any = signal.getsignal(signal.SIGUSR1)
    others: list[int] = []

    def other(signum: int, frame: Any) -> None:
        others.append(signum)
        ours(signum, frame)

    signal.signal(signal.SIGUSR1, other)
    shutdown.restore()
    assert signal.getsignal(signal.SIGUSR1) is other
    shutdown.listen()
    signal.raise_signal(signal.SIGUSR1)
    assert (len(server), len(others)) == (1, 1)


def test_app_that_ends_outside_of_the_main_thread_leaves_the_handlers(
    server: list[int], shutdown: Shutdown
) -> None:
    """As one in a test client does, in a process whose main thread has served another one."""
    theirs = signal.getsignal(signal.SIGUSR1)
    shutdown.listen()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(shutdown.restore).result(DEADLINE_S)
    signal.raise_signal(signal.SIGUSR1)
    assert server == [signal.SIGUSR1]
    shutdown.restore()
    assert signal.getsignal(signal.SIGUSR1) is theirs


def test_outside_of_the_main_thread_nothing_is_covered(
    server: list[int], shutdown: Shutdown
) -> None:
    """Python allows handlers in the main thread only."""
    theirs = signal.getsignal(signal.SIGUSR1)
    done: list[str] = []
    thread = threading.Thread(
        target=lambda: done.append(asyncio.run(shutdown.wait(asyncio.sleep(0, "done"))))
    )
    thread.start()
    thread.join(DEADLINE_S)
    assert done == ["done"]
    assert signal.getsignal(signal.SIGUSR1) is theirs


class Endless:
    """Events without end, and when their reader has gone."""

    def __init__(self) -> None:
        self.has_ended = threading.Event()

    async def events(self, after: int | None = None) -> AsyncGenerator[Event, None]:
        try:
            for number in itertools.count(1):
                yield Event(number, "transition", {"model": "a"})
        finally:
            self.has_ended.set()


def reads_a_little(client: httpx.Client, path: str) -> None:
    with client.stream("GET", path) as stream:
        next(stream.iter_lines())


@pytest.fixture
def no_cycles() -> Iterator[None]:
    """Nothing ends because its garbage happens to be collected."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_cycles")
def test_stream_of_events_ends_when_its_client_has_gone(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it waits to be read, which the framework leaves as it is."""
    endless = Endless()
    orch = AsyncOrchestrator(state_dir=state_dir)
    monkeypatch.setattr(orch, "events", endless.events)
    with serving(create_app(orch)) as client:
        reads_a_little(client, f"{PREFIX}/events")
        assert endless.has_ended.wait(DEADLINE_S)


@pytest.mark.usefixtures("no_cycles")
@pytest.mark.parametrize("path", ["/api/events", "/api/models/a/events"])
def test_stream_of_events_of_a_pool_ends_when_its_client_has_gone(
    path: str, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = Endless()
    pool = AsyncModelPool({"models": {"a": {"model_path": "a.gguf"}}}, state_dir=state_dir)
    monkeypatch.setattr(pool, "events", endless.events)
    with serving(create_app(pool=pool)) as client:
        reads_a_little(client, path)
        assert endless.has_ended.wait(DEADLINE_S)
