"""Is our own child ready? Never a port, never another process: this child, on its own socket.

The server picks a free port itself; what its output says of it is believed once the kernel says
that one of its own processes listens there, so a foreign 200 cannot count. The wait is woken by the
child's output, by its exit and by the load's token, and probes in between at an interval that
adapts.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Final, cast

from orchestrator.base.tokens import CancelToken
from orchestrator.base.waker import Waker
from orchestrator.errors import Problem
from orchestrator.machine.facts import Exit, ServerFacts
from orchestrator.server import failures, ladder, process_table
from orchestrator.server.child import ServerProcess
from orchestrator.server.output import MAX_LINES, TAIL_LINES

_ANSWER_S: Final = 2.0
_PROPS_S: Final = 1.0
_SAMPLE_S: Final = 0.25
_LOOK_UP_S: Final = 0.03  # a look at the process table costs 3 to 8 ms
_LOOK_UP_MOST_S: Final = 0.5
_MAX_ANSWER: Final = 1 << 20
_HOST: Final = "127.0.0.1"
NO_ANSWER: Final = (OSError, ValueError, http.client.HTTPException)  # a length of 5000 digits
_PORTS: Final = range(1, 65536)
_UNPROTECTED: Final = Problem(
    "server_start_failed",
    "this llama-server answers without the key it was given: use a newer one, or protect_server="
    "False",
    field="llama_server",
    reason="unprotected",
)


@dataclass(slots=True)
class LoadProgress:
    """How much of the model the child has taken in; never goes back."""

    bytes_total: int | None
    bytes_done: int = 0

    def saw(self, bytes_done: int) -> None:
        capped = bytes_done if self.bytes_total is None else min(bytes_done, self.bytes_total)
        self.bytes_done = max(self.bytes_done, capped)


@dataclass(slots=True)
class _StallClock:
    """Any sign of work resets it: bytes read, memory grown, a line printed."""

    server: ServerProcess
    progress: LoadProgress
    last_work: float = field(default_factory=time.monotonic)
    last_sample: float = 0.0
    seen: tuple[int, int, int] = (0, 0, 0)

    def idle_s(self) -> float:
        now = time.monotonic()
        if now - self.last_sample >= _SAMPLE_S:
            self.last_sample = now
            read = process_table.bytes_read(self.server.pid)
            resident = process_table.resident_bytes(self.server.pid)
            self.progress.saw(max(read, resident))
            sample = (read, resident, self.server.output.bytes_seen)
            if any(new > old for new, old in zip(sample, self.seen, strict=True)):
                self.last_work = now
                self.seen = sample
        return now - self.last_work


def wait_ready(
    server: ServerProcess,
    token: CancelToken,
    *,
    stall_timeout_s: float,
    progress: LoadProgress,
    extra_args: tuple[str, ...] = (),
) -> ServerFacts | Problem:
    """Wait until this child serves, ends, stalls or is not wanted any more.

    Args:
        server: The child; only its own sockets are probed.
        token: Of the load; setting it ends the wait within a millisecond or two.
        stall_timeout_s: Seconds without any sign of work before giving up.
        progress: Updated as the model is read.
        extra_args: The caller's flags, to be named if one of them is to blame.

    Returns:
        What the server says of itself, or why it will not be ready.
    """
    waker, finder, visits = Waker(), _Finder(server), _Visits(server, token)

    def tell() -> None:
        """Output says nothing while nobody knows where to ask, and there is a lot of it."""
        if finder.found is not None or server.output.announced or server.exit is not None:
            waker.wake()
        visits.interrupt()

    def give_up() -> None:
        waker.wake()
        visits.interrupt()

    server.listeners.append(tell)
    token.on_set(give_up)
    try:
        verdict = _wait(finder, visits, token, waker, stall_timeout_s, progress)
        if verdict is None:
            seen = _exit_of(server, waker)
            returncode = seen.returncode if seen else None
            why = failures.explain(returncode, server.output.tail(MAX_LINES), extra_args)
            return replace(why, log_tail=why.log_tail[-TAIL_LINES:])
        return verdict
    finally:
        server.listeners.remove(tell)
        waker.close()


def _wait(
    finder: _Finder,
    visits: _Visits,
    token: CancelToken,
    waker: Waker,
    stall_timeout_s: float,
    progress: LoadProgress,
) -> ServerFacts | Problem | None:
    """None: the server has ended."""
    server = finder.server
    clock = _StallClock(server, progress)
    pause: float | None = None
    while True:
        if token.is_set():
            return Problem("cancelled", "the load is not wanted any more")
        if server.exit is not None or not server.is_alive:
            return None
        port = finder.port()
        if port is not None:
            facts = visits.facts(port)
            if facts is not None and server.is_alive:
                progress.saw(progress.bytes_total or 0)
                return facts
        if clock.idle_s() >= stall_timeout_s:
            return Problem(
                "stalled",
                f"no sign of progress for {stall_timeout_s:g} s: look at the output, or raise "
                "stall_timeout_s",
                field="stall_timeout_s",
                log_tail=server.output.tail(),
            )
        pause = ladder.next_probe_s(pause)
        if waker.wait(min(pause, stall_timeout_s))[0]:
            pause = None if port is not None else pause


def _exit_of(server: ServerProcess, waker: Waker) -> Exit | None:
    """The warden sees the exit and the last output within moments of the kernel."""
    ends = time.monotonic() + _ANSWER_S
    while server.exit is None and time.monotonic() < ends:
        waker.wait(0.05)
    return server.exit


@dataclass(slots=True)
class _Finder:
    """Where this child listens, once the kernel has confirmed it."""

    server: ServerProcess
    found: int | None = None
    refused: set[str] = field(default_factory=set)
    look_every: float = _LOOK_UP_S
    next_look: float = field(default_factory=lambda: time.monotonic() + _LOOK_UP_S)

    def port(self) -> int | None:
        """Return the port, from what the child announces or else from its open sockets."""
        for url in self.server.output.announced if self.found is None else ():
            port = int(url.rpartition(":")[2])
            if url not in self.refused and port in _PORTS and self._is_ours(port):
                self.found = port
                break
            self.refused.add(url)
        if self.found is None and time.monotonic() >= self.next_look:
            ports = process_table.listening(self.server.family())
            self.found = next((port for host, port in ports if host == _HOST), None)
            self.look_every = min(2 * self.look_every, _LOOK_UP_MOST_S)
            self.next_look = time.monotonic() + self.look_every
        return self.found

    def _is_ours(self, port: int) -> bool:
        """The child prints what it likes, its model's metadata too: ask the kernel. A binary that
        carries capabilities may not be looked into, and is believed.
        """
        mine = process_table.listens({self.server.pid}, port)
        return mine is not False or process_table.listens(self.server.family(), port) is not False


class _BoundedSocket(socket.socket):
    """Reads until a moment, however slowly an answer comes.

    Attributes:
        ends: That moment, monotonic seconds.
    """

    ends: float = 0.0

    def recv_into(self, *args: Any) -> int:
        self.settimeout(max(0.001, self.ends - time.monotonic()))
        return super().recv_into(*args)


class _Visits:
    """Questions to the child, one connection at a time. No proxy variable sends them elsewhere."""

    def __init__(self, server: ServerProcess, token: CancelToken) -> None:
        self._server = server
        self._token = token
        self._socket: socket.socket | None = None

    def interrupt(self) -> None:
        """End the question that is under way, from any thread."""
        if self._is_over and (connected := self._socket) is not None:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    @property
    def _is_over(self) -> bool:
        return self._token.is_set() or self._server.exit is not None

    def facts(self, port: int) -> ServerFacts | Problem | None:
        """Ask /health and, once it is 200, /props. None: not ready yet.

        A server that has a key must also refuse who does not: one that knows nothing of keys would
        be open to everybody without a word.
        """
        key = self._server.api_key
        try:
            with _BoundedSocket() as connected:
                self._socket = connected  # before it is looked whether all is over
                connection = self._connection(connected, port)
                if _ask(connection, "/health", _ANSWER_S)[0] != HTTPStatus.OK:
                    return None
                status, body = 0, b""
                with contextlib.suppress(*NO_ANSWER):  # it is ready, whatever it says of itself
                    status, body = _ask(connection, "/props", _PROPS_S, key)
                keyless = 401 if key is None else _ask(connection, "/slots", _PROPS_S)[0]
        except NO_ANSWER:
            return None
        finally:
            self._socket = None
        if keyless not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return _UNPROTECTED
        found = _facts(f"http://{_HOST}:{port}", body if status == HTTPStatus.OK else b"")
        return replace(found, api_key=key)

    def _connection(self, connected: _BoundedSocket, port: int) -> http.client.HTTPConnection:
        if self._is_over:
            raise ConnectionAbortedError
        connected.settimeout(_ANSWER_S)
        connected.connect((_HOST, port))
        connection = http.client.HTTPConnection(_HOST, port)
        connection.auto_open = 0  # what the server has closed stays closed
        connection.sock = connected
        return connection


def _ask(
    connection: http.client.HTTPConnection, path: str, timeout_s: float, key: str | None = None
) -> tuple[int, bytes]:
    """GET a path and return its status and its body.

    Raises:
        OSError, HTTPException: there is no answer, or none in time.
    """
    connected = cast("_BoundedSocket", connection.sock)
    if connected is None:
        raise ConnectionResetError
    connected.ends = time.monotonic() + timeout_s
    connected.settimeout(timeout_s)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
    answer = connection.getresponse()
    body = answer.read(_MAX_ANSWER)
    if not answer.isclosed():
        raise http.client.IncompleteRead(body)
    return answer.status, body


def _facts(base_url: str, props: bytes) -> ServerFacts:
    try:
        members = json.loads(props)
        context = members["default_generation_settings"]["n_ctx"]
        vision = bool(members.get("modalities", {}).get("vision", False))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ServerFacts(base_url)
    return ServerFacts(base_url, context if type(context) is int else None, vision)
