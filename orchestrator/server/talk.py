"""Requests to our own server, each within its time, and over as soon as nobody needs the answer."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from orchestrator.base.tokens import CancelToken
from orchestrator.server.child import ServerProcess

HOST: Final = "127.0.0.1"
NO_ANSWER: Final = (OSError, ValueError, http.client.HTTPException)  # a length of 5000 digits
_ANSWER_S: Final = 2.0
_MAX_ANSWER: Final = 1 << 20


class _BoundedSocket(socket.socket):
    """A socket whose reads together end at one deadline, `ends` in monotonic seconds."""

    ends: float = 0.0

    def recv_into(self, *args: Any) -> int:
        self.settimeout(max(0.001, self.ends - time.monotonic()))
        return super().recv_into(*args)


class _Http(http.client.HTTPConnection):
    def __init__(self, port: int, open_: Callable[[int], _BoundedSocket]) -> None:
        super().__init__(HOST, port)
        self._open = open_

    def connect(self) -> None:
        self.sock = self._open(self.port)


class Talk:
    """Requests to one port, over one connection for as long as the server keeps it.

    Args:
        open_: Returns a connected socket.
    """

    def __init__(self, port: int, open_: Callable[[int], _BoundedSocket]) -> None:
        self._http = _Http(port, open_)

    def close(self) -> None:
        self._http.close()

    def ask(
        self,
        path: str,
        timeout_s: float,
        key: str | None = None,
        *,
        body: str | None = None,
        is_last: bool = False,
    ) -> tuple[int, bytes]:
        """GET a path, or POST a `body`, and return status and body, or raise one of `NO_ANSWER`.

        A kept connection may be closed at the moment when it is used again.
        """
        headers = {"Connection": "close"} if is_last else {}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        for may_retry in (self._http.sock is not None, False):
            try:
                return self._ask(path, timeout_s, headers, body)
            except (ConnectionError, http.client.BadStatusLine):
                self.close()
                if not may_retry:
                    raise
        raise AssertionError("the second attempt is the last")

    def _ask(
        self, path: str, timeout_s: float, headers: dict[str, str], body: str | None
    ) -> tuple[int, bytes]:
        if self._http.sock is None:
            self._http.connect()
        if isinstance(connected := self._http.sock, _BoundedSocket):
            connected.ends = time.monotonic() + timeout_s
        self._http.request("GET" if body is None else "POST", path, body, headers)
        answer = self._http.getresponse()
        read = answer.read(_MAX_ANSWER)
        if not answer.isclosed():
            raise http.client.IncompleteRead(read)
        return answer.status, read


class Connection:
    """Requests to the server, one connection at a time; proxy variables do not apply."""

    def __init__(self, server: ServerProcess, token: CancelToken) -> None:
        self._server = server
        self._token = token
        self._socket: socket.socket | None = None

    @contextlib.contextmanager
    def talk(self, port: int) -> Iterator[Talk]:
        """Yield requests to this port, until `interrupt`."""
        with contextlib.closing(Talk(port, self._connect)) as talk:
            try:
                yield talk
            finally:
                self._socket = None

    def interrupt(self) -> None:
        """End a request in flight if its answer is no longer needed; callable from any thread."""
        if self._is_over and (connected := self._socket) is not None:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    @property
    def _is_over(self) -> bool:
        return self._token.is_set() or self._server.exit is not None

    def _connect(self, port: int) -> _BoundedSocket:
        connected = _BoundedSocket()
        self._socket = connected  # before the check: an interrupt comes before or after it
        try:
            if self._is_over:
                raise ConnectionAbortedError
            connected.settimeout(_ANSWER_S)
            connected.connect((HOST, port))
        except OSError:
            connected.close()
            raise
        return connected
