"""An app on a real uvicorn, on a port of its own, and helpers to query it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
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
from orchestrator.base.tokens import Generation
from orchestrator.http import PassThrough
from orchestrator.runtime.answers import LeasedServer

PREFIX = "/api/inference"
DEADLINE_S = 20.0
Serve = Callable[..., AbstractContextManager[httpx.Client]]


@contextlib.contextmanager
def serving(app: fastapi.FastAPI, port: int = 0, **options: Any) -> Iterator[httpx.Client]:
    """Serve an app on loopback, with options of uvicorn; its lifespan ends before this returns."""
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, **options)
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
    """A llama.cpp server whose processes begin only when the gate is opened.

    So a load is in flight for as long as a test needs.
    """

    binary: str
    key: Path

    def open(self) -> None:
        self.key.touch()


class Lender:
    """An orchestrator, as far as a pass-through can see; None as URL: no model becomes Healthy."""

    def __init__(self, base_url: str | None) -> None:
        self.base_url = base_url
        self.is_returned = threading.Event()

    def known_paths(self) -> tuple[()]:
        return ()

    def observe(self, _: object) -> None:
        pass

    def judge_of_prompts(self, _: Generation) -> None:
        pass

    def leased_at_once(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[LeasedServer]:
        if self.base_url is None:
            await asyncio.Event().wait()
        try:
            yield LeasedServer(self.base_url or "", 1, Generation(1))
        finally:
            self.is_returned.set()


def pass_through_app(lender: Lender, **options: Any) -> fastapi.FastAPI:
    """Return an app that is nothing but a pass-through."""
    passed_on = PassThrough(cast("AsyncOrchestrator", lender), **options)

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        await passed_on.close()

    app = fastapi.FastAPI(lifespan=lifespan)
    app.router.routes.append(Route("/v1/{path:path}", passed_on))
    return app


def until(client: httpx.Client, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Poll the status until `holds` returns true for it, and return it."""
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        status: dict[str, Any] = client.get(PREFIX + "/status").json()
        if holds(status):
            return status
    raise AssertionError(f"timed out; the status is {status}")


@contextlib.contextmanager
def using_the_server(url: str) -> Iterator[None]:
    """Hold a request below `/v1` in the server: its body does not end."""
    host = url.rstrip("/").partition("://")[2]
    with contextlib.closing(http.client.HTTPConnection(host)) as uploading:
        uploading.putrequest("POST", "/v1/completions")
        uploading.putheader("Transfer-Encoding", "chunked")
        uploading.endheaders(b"1\r\n{\r\n")
        with httpx.Client(base_url=url, trust_env=False) as client:
            until(client, lambda status: status["leases"])
        yield


def is_at_gate(status: dict[str, Any]) -> bool:
    """Return whether a load waits at the gate."""
    return bool(status["state"] == "WaitingHealth")


def category_of(body: bytes | str) -> str:
    """Return the category in a problem document, or in an error of OpenAI's API."""
    members = json.loads(body)
    return str(members["error"]["code"] if "error" in members else members.get("category", ""))


def problem(answer: httpx.Response) -> tuple[int, str]:
    """Return status and category of an answer, which must be a problem document.

    Below `/v1/` it must be an error of OpenAI's API, with nothing else in it.
    """
    if "/v1/" in answer.url.path:
        assert answer.headers["content-type"] == "application/json", answer.text
        [(name, error)] = answer.json().items()
        assert (name, {*error} - {"param"}) == ("error", {"message", "type", "code"})
        return answer.status_code, error["code"]
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    members = answer.json()
    assert members["status"] == answer.status_code
    assert members["detail"]
    return answer.status_code, members["category"]
