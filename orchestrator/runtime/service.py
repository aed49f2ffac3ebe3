"""A running orchestrator service, and single exchanges with it over HTTP.

The standard library's client follows neither proxy variables nor redirects: a key goes to the given
address and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import SplitResult, urlsplit

from orchestrator.errors import InvalidRequest, Problem, Unreachable

Json = dict[str, Any]

_T = TypeVar("_T")
_CONNECTIONS: Final = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


@dataclass(frozen=True, slots=True)
class Service:
    """The address of a service, and the key for it.

    Raises:
        InvalidRequest: `field` is `url` or `api_key`.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))
        try:
            is_usable = self.base.scheme in _CONNECTIONS and bool(self.base.hostname)
            is_usable = is_usable and self.base.port != 0 and not self.base.username
            is_usable = is_usable and not (self.base.query or self.base.fragment)
        except ValueError:
            is_usable = False
        if not is_usable:
            given = "one with a user name" if "@" in self.url else repr(self.url)
            message = f"url must be like http://127.0.0.1:8642, not {given}"
            raise InvalidRequest.because(message, field="url")
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable()):
            message = "api_key must consist of printable ASCII characters"
            raise InvalidRequest.because(message, field="api_key")

    @property
    def base(self) -> SplitResult:
        return urlsplit(self.url)

    def not_understood(self) -> Unreachable:
        """Return the error of an answer that is none of an orchestrator's."""
        return Unreachable.because(f"{self.url} does not speak this API", field="url")

    def understood(self, parse: Callable[[Json], _T], text: str | bytes) -> _T:
        """Return what a JSON object means. Raises the error of a service of another kind."""
        try:
            document = json.loads(text)
            if not isinstance(document, dict):
                raise self.not_understood()
            return parse(document)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise self.not_understood() from error


class Exchange:
    """One request to a service, and its response. Any thread may abort it.

    Args:
        path: Below the URL of the service.
        body: Sent as JSON.
        timeout_s: For each step of the network; None waits without end, though not for a machine
            that is gone.
    """

    def __init__(
        self,
        service: Service,
        method: str,
        path: str,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        self._service = service
        self._method, self._path = method, service.base.path + path
        self._headers = dict(headers or {})
        self._body = None if body is None else json.dumps(body)
        if self._body is not None:
            self._headers["Content-Type"] = "application/json"
        if service.api_key is not None:
            self._headers["Authorization"] = f"Bearer {service.api_key}"
        base = service.base
        self._connection = _CONNECTIONS[base.scheme](
            base.hostname or "", base.port, timeout=timeout_s
        )
        self._sock: socket.socket | None = None  # the connection lets go of it with some answers
        self._is_aborted = False

    def json(self, parse: Callable[[Json], _T]) -> _T:
        """Return what the answer means; one without a body is an empty object.

        Raises:
            OrchestratorError: the service's own error, of its category.
            Unreachable: it does not respond, or is no orchestrator.
        """
        with self._reported(), contextlib.closing(self._connection):
            return self._service.understood(parse, self._begin().read() or b"{}")

    def open(self) -> Lines:
        """Return a stream whose head has arrived; raises as `json` does."""
        with self._reported():
            try:
                return Lines(self, self._begin())
            except BaseException:
                self.close()
                raise

    def next_line(self, response: http.client.HTTPResponse) -> str:
        """Return the next line of a stream, "" at its end."""
        with self._reported():
            return response.readline().decode("utf-8", "replace")

    def close(self) -> None:
        self._connection.close()

    def abort(self) -> None:
        """End it: whatever waits for the service gets an error. A load is withdrawn by that."""
        self._is_aborted = True
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _begin(self) -> http.client.HTTPResponse:
        """Send the request, and return the response of which only the head has been read."""
        connection = self._connection
        connection.connect()
        self._sock = connection.sock
        _notice_dead_peer(connection.sock)
        if self._is_aborted:  # before there was a socket
            raise ConnectionAbortedError
        connection.request(self._method, self._path, self._body, self._headers)
        response: http.client.HTTPResponse = connection.getresponse()
        if response.status < 300:
            return response
        parse = partial(_problem, response.status)
        raise self._service.understood(parse, response.read()).error()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            message = (
                f"{self._service.url} does not respond ({why}): start `llama-orchestrator serve`, "
                "or give its URL"
            )
            raise Unreachable.because(message, field="url") from error


class Lines(Iterator[str]):
    """The lines of a stream. To be closed, unless it has ended."""

    def __init__(self, exchange: Exchange, response: http.client.HTTPResponse) -> None:
        self._exchange, self._response = exchange, response

    def __next__(self) -> str:
        if line := self._exchange.next_line(self._response):
            return line.rstrip("\r\n")
        self.close()
        raise StopIteration

    def close(self) -> None:
        self._response.close()
        self._exchange.close()

    __del__ = close


def _problem(status: int, document: Json) -> Problem:
    """Return the problem of a document; below `/v1` it is an error as OpenAI's API has it."""
    if not isinstance(error := document.get("error"), dict):
        return Problem.from_dict(document)
    code, title = error.get("code"), http.client.responses.get(status, "Error")
    category = code if isinstance(code, str) else "http_error"
    members = {"category": category, "detail": error["message"], "field": error.get("param")}
    return Problem.from_dict({**members, "status": status, "title": title})


def _notice_dead_peer(sock: socket.socket) -> None:
    """Have the kernel end a connection whose other machine is gone, however long a load takes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
