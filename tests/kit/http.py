"""An app on a real uvicorn, on a port of its own, and what its tests ask of it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fastapi
import httpx
import uvicorn
from starlette.routing import Route

from orchestrator import AsyncOrchestrator
from orchestrator.http import PassThrough

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
