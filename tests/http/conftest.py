"""A real uvicorn on a port of its own, and a llama.cpp server that waits at a gate.

The gate makes "while it loads" last as long as a test needs: the server process is there, and goes
on to be a real server when the gate is opened.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fastapi
import httpx
import pytest
import uvicorn
from starlette.routing import Route

from orchestrator import AsyncOrchestrator
from orchestrator.http import PassThrough, create_app
from orchestrator.server import embedded

PREFIX = "/api/inference"
DEADLINE_S = 20.0
Serve = Callable[..., AbstractContextManager[httpx.Client]]


@contextlib.contextmanager
def serving(app: fastapi.FastAPI, port: int = 0) -> Iterator[httpx.Client]:
    """Serve an app on loopback; its lifespan has ended when this returns."""
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=base_url, timeout=DEADLINE_S, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)
    assert not thread.is_alive(), "the HTTP server did not end"


@dataclass(frozen=True)
class Gate:
    """A server binary whose processes wait until the gate is opened."""

    binary: str
    key: Path

    def open(self) -> None:
        self.key.touch()


def passing_on(lender: object, **options: Any) -> fastapi.FastAPI:
    """An app that is nothing but a pass-through to whoever lends a server."""
    passed_on = PassThrough(cast("AsyncOrchestrator", lender), **options)

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        await passed_on.close()

    app = fastapi.FastAPI(lifespan=lifespan)
    app.router.routes.append(Route("/v1/{path:path}", passed_on))
    return app


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    key, binary = tmp_path / "open", tmp_path / "gated-server"
    server = f"{sys.executable} -P {embedded.__file__}"
    waits = f'while [ ! -e "{key}" ]; do sleep 0.01; done'
    binary.write_text(f'#!/bin/sh\n{waits}\nexec {server} "$@"\n')
    binary.chmod(0o755)
    return Gate(str(binary), key)


@pytest.fixture
def serve(state_dir: Path) -> Serve:
    """Serve an orchestrator of this test's own."""

    def start(
        llama_server: str = "embedded", **options: Any
    ) -> AbstractContextManager[httpx.Client]:
        return serving(create_app(llama_server=llama_server, state_dir=state_dir, **options))

    return start


def until(client: httpx.Client, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Ask for the status until it is as wanted, and return it."""
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        status: dict[str, Any] = client.get(PREFIX + "/status").json()
        if holds(status):
            return status
    raise AssertionError(f"never happened; the status is {status}")


def is_held(status: dict[str, Any]) -> bool:
    """A load waits at the gate."""
    return bool(status["state"] == "WaitingHealth")


def problem(answer: httpx.Response) -> tuple[int, str]:
    """The status and category of what must be a problem document."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    members = answer.json()
    assert members["status"] == answer.status_code
    assert members["detail"]
    return answer.status_code, members["category"]
