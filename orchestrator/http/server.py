"""The HTTP server of `serve`, `run` and a replica: uvicorn with our limits, and without signals."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from orchestrator.http.connections import IDLE_S, BoundedProtocol

_BACKLOG: Final = 1024
_OPEN_REQUESTS_S: Final = 2


def listener(host: str, port: int) -> socket.socket:
    """Return a listener that names its protocol: without it asyncio leaves Nagle's algorithm on,
    and a response waits 40 ms for the acknowledgement of its head.

    Raises:
        OSError, UnicodeError: it cannot listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, made.detach())


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_of(app: ASGIApp) -> uvicorn.Server:
    """Return a server for an app; the signals are the caller's."""
    made = uvicorn.Server(
        uvicorn.Config(
            app,
            server_header=False,
            log_config=None,
            access_log=False,
            http=BoundedProtocol,
            timeout_keep_alive=int(IDLE_S),
            timeout_graceful_shutdown=_OPEN_REQUESTS_S,
        )
    )
    made.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    return made
