"""Is our own child ready? Never a port, never another process: this child, on its own socket.

The server picks a free port itself; what its output says of it is believed once the kernel says
that one of its own processes listens there, so a foreign 200 cannot count. The wait is woken by the
child's output, by its exit and by the load's token, and probes in between at an interval that
adapts.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from dataclasses import dataclass, field, replace
from typing import Final

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
_STATUS: Final = re.compile(rb"HTTP/\S*\s+(\d{3})(?!\S)")
_LENGTH: Final = re.compile(rb"\s*content-length\s*:\s*(\d{1,15})\s*", re.IGNORECASE)
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
    waker, finder = Waker(), _Finder(server)

    def tell() -> None:
        """Output says nothing while nobody knows where to ask, and there is a lot of it."""
        if finder.found is not None or server.output.announced or server.exit is not None:
            waker.wake()

    server.listeners.append(tell)
    token.on_set(waker.wake)
    try:
        verdict = _wait(finder, token, waker, stall_timeout_s, progress)
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
            facts = _Visit(server, waker, token).facts(port)
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


@dataclass(frozen=True, slots=True)
class _Visit:
    """One connection to the child, by plain sockets: a token or an exit interrupts it at any point,
    also while it connects, and no proxy variable can send it elsewhere.
    """

    server: ServerProcess
    waker: Waker
    token: CancelToken

    def facts(self, port: int) -> ServerFacts | Problem | None:
        """Ask /health and, once it is 200, /props. None: not ready yet.

        A server that has a key must also refuse who does not: one that knows nothing of keys would
        be open to everybody without a word.
        """
        key = self.server.api_key
        try:
            with socket.socket() as connection:
                connection.setblocking(False)
                connection.connect_ex((_HOST, port))
                ends = time.monotonic() + _ANSWER_S
                if not self._is_ready(connection, select.POLLOUT, ends):
                    return None
                status, _ = self._ask(connection, "/health", _ANSWER_S)
                if status != 200:
                    return None
                status, body = self._ask(connection, "/props", _PROPS_S, key)
                keyless = 401 if key is None else self._ask(connection, "/slots", _PROPS_S)[0]
        except OSError:
            return None
        if keyless not in {401, 403}:
            return _UNPROTECTED if keyless else None
        found = _facts(f"http://{_HOST}:{port}", body if status == 200 else b"")
        return replace(found, api_key=key)

    def _ask(
        self, connection: socket.socket, path: str, timeout_s: float, key: str | None = None
    ) -> tuple[int, bytes]:
        """GET a path and return (status, body); (0, b"") when there is no answer to wait for."""
        shown = "" if key is None else f"Authorization: Bearer {key}\r\n"
        request = f"GET {path} HTTP/1.1\r\nHost: {_HOST}\r\n{shown}Accept: */*\r\n\r\n"
        connection.send(request.encode())
        ends = time.monotonic() + timeout_s
        data = b""
        while len(data) < _MAX_ANSWER and self._is_ready(connection, select.POLLIN, ends):
            more = connection.recv(65536)
            data += more
            whole = _whole_answer(data, ended=not more)
            if whole is not None or not more:
                return whole or (0, b"")
        return 0, b""

    def _is_ready(self, connection: socket.socket, events: int, ends: float) -> bool:
        """Wait for the connection; False when the time or the reason to wait is over."""
        while (left := ends - time.monotonic()) > 0:
            woken, is_ready = self.waker.wait(left, connection, events)
            if woken and (self.token.is_set() or self.server.exit is not None):
                return False
            if is_ready:
                return True
        return False


def _facts(base_url: str, props: bytes) -> ServerFacts:
    try:
        members = json.loads(props)
        context = members["default_generation_settings"]["n_ctx"]
        vision = bool(members.get("modalities", {}).get("vision", False))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ServerFacts(base_url)
    return ServerFacts(base_url, context if type(context) is int else None, vision)


def _whole_answer(data: bytes, *, ended: bool) -> tuple[int, bytes] | None:
    """Return (status, body) once all of it is there."""
    head, found, body = data.partition(b"\r\n\r\n")
    status = _STATUS.match(head)
    if not found or status is None:
        return None
    length = None
    for line in head.split(b"\r\n")[1:]:
        if (stated := _LENGTH.fullmatch(line)) is not None:
            length = int(stated[1])
    if length is None and not ended:
        return None
    if length is not None and len(body) < length:
        return None
    return int(status[1]), body if length is None else body[:length]
