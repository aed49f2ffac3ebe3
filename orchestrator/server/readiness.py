"""Readiness of a started server: whether this very child answers on a socket of its own.

The server picks a free port itself. An address in its output is believed once the kernel confirms
that one of its processes listens there, so the 200 of another server cannot count. The wait is
woken by output, by the exit and by the load's token; in between it probes at a growing interval.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Final

from orchestrator.base.tokens import CancelToken
from orchestrator.base.waker import Waker
from orchestrator.errors import Problem
from orchestrator.machine.facts import ServerFacts
from orchestrator.server import failures, process_table
from orchestrator.server.child import ServerProcess
from orchestrator.server.output import MAX_LINES, TAIL_LINES
from orchestrator.server.talk import HOST, NO_ANSWER, Connection
from orchestrator.server.work import WorkMeter

_ANSWER_S: Final = 2.0
_PROPS_S: Final = 1.0
_SCAN_S: Final = 0.03  # to announce an address, before its sockets are looked at
_LONGEST_SCAN_S: Final = 0.5
FIRST_PROBE_S: Final = 0.0015
LONGEST_PROBE_S: Final = 0.25
_PROBE_GROWTH: Final = 1.3
_REFUSALS: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_OTHER_KEY: Final = Problem("server_start_failed", "the server refuses the key it was given")
_UNPROTECTED: Final = Problem(
    "server_start_failed",
    "this llama-server answers requests without its API key: use a newer one, or set "
    "protect_server=False",
    field="llama_server",
    reason="unprotected",
)


@dataclass(slots=True)
class ReadProgress:
    """How much of the model the server has read; never decreases."""

    bytes_total: int | None
    bytes_done: int = 0

    def advance_to(self, bytes_done: int) -> None:
        capped = bytes_done if self.bytes_total is None else min(bytes_done, self.bytes_total)
        self.bytes_done = max(self.bytes_done, capped)


def wait_ready(
    server: ServerProcess,
    token: CancelToken,
    *,
    stall_timeout_s: float,
    progress: ReadProgress,
    extra_args: tuple[str, ...] = (),
) -> ServerFacts | Problem:
    """Wait until this server is ready, exits, stalls or is cancelled.

    Args:
        server: Only its own sockets are probed.
        token: The load's; setting it ends the wait within a millisecond or two.
        stall_timeout_s: Seconds without any sign of work before giving up.
        progress: Updated while the model is read.
        extra_args: The caller's flags, to tell whether one of them is to blame.

    Returns:
        What the server reports about itself, or why it is not ready.
    """
    waker, finder, connection = Waker(), _PortFinder(server), ProbeConnection(server, token)
    work, output, heard = WorkMeter(server), server.output, 0
    pause: float | None = None

    def wake() -> None:
        nonlocal heard
        # there may be a lot of output before an address is known, and our own requests may be in it
        is_news, heard = output.unprompted_bytes > heard, max(output.unprompted_bytes, heard)
        is_known = finder.found is not None or bool(output.announced)
        if (is_known and is_news) or server.exit is not None or token.is_set():
            waker.wake()
        connection.interrupt()

    server.listeners.append(wake)
    token.on_set(wake)
    try:
        while not token.is_set():
            if server.exit is not None or not server.is_alive:
                return _why_exited(server, waker, extra_args)
            port = finder.port()
            with work.probing():
                facts = None if port is None else connection.facts(port)
            if facts is not None and server.is_alive:
                progress.advance_to(progress.bytes_total or 0)
                return facts
            idle_s = work.idle_s()
            progress.advance_to(work.bytes_loaded)
            if idle_s >= stall_timeout_s:
                return Problem(
                    "stalled",
                    f"the server made no progress for {stall_timeout_s:g} s: see its output, or "
                    "raise stall_timeout_s",
                    field="stall_timeout_s",
                    log_tail=output.tail(),
                )
            pause = next_probe_s(pause)
            if waker.wait(min(pause, stall_timeout_s))[0] and port is not None:
                pause = None
        return Problem("cancelled", "the load was cancelled")
    finally:
        server.listeners.remove(wake)
        waker.close()


def _why_exited(server: ServerProcess, waker: Waker, extra_args: tuple[str, ...]) -> Problem:
    ends = time.monotonic() + _ANSWER_S
    while server.exit is None and time.monotonic() < ends:  # the warden is about to see the exit
        waker.wait(0.05)
    returncode = server.exit.returncode if server.exit else None
    why = failures.explain(returncode, server.output.tail(MAX_LINES), extra_args)
    return replace(why, log_tail=why.log_tail[-TAIL_LINES:])


def next_probe_s(last_s: float | None) -> float:
    """Return the seconds until the next readiness probe.

    Args:
        last_s: The previous return value; None for the first probe.
    """
    return FIRST_PROBE_S if last_s is None else min(last_s * _PROBE_GROWTH, LONGEST_PROBE_S)


@dataclass(slots=True)
class _PortFinder:
    """The port this server listens on, once the kernel has confirmed it."""

    server: ServerProcess
    found: int | None = None
    refused: set[str] = field(default_factory=set)
    scan_every_s: float = _SCAN_S
    next_scan: float = field(default_factory=lambda: time.monotonic() + _SCAN_S)

    def port(self) -> int | None:
        """Return the port, from the server's output or else from its open sockets."""
        server = self.server
        for url in server.output.announced if self.found is None else ():
            port = int(url.rpartition(":")[2])
            is_new = url not in self.refused and 0 < port < 1 << 16
            if is_new and (_may_listen({server.pid}, port) or _may_listen(server.family(), port)):
                self.found = port
                break
            self.refused.add(url)
        if self.found is None and time.monotonic() >= self.next_scan:
            bound, _ = process_table.listening(server.family())
            self.found = next((port for host, port in sorted(bound) if host == HOST), None)
            self.scan_every_s = min(2 * self.scan_every_s, _LONGEST_SCAN_S)
            self.next_scan = time.monotonic() + self.scan_every_s
        return self.found


def _may_listen(pids: set[int], port: int) -> bool:
    """Ask the kernel: output may contain anything, such as metadata of the model. The sockets of a
    binary that carries capabilities are hidden, so its output is believed.
    """
    bound, is_hidden = process_table.listening(pids)
    return is_hidden or port in {port for _, port in bound}


class ProbeConnection(Connection):
    """Asks a server that has been started whether it is ready."""

    def facts(self, port: int) -> ServerFacts | Problem | None:
        """Ask /health and, once it is 200, /props; None while the server is not ready.

        A server that was given a key must also refuse requests without it: one that does not know
        about keys would answer everyone.
        """
        key = self._server.api_key
        with self.talk(port) as talk:
            try:
                if talk.ask("/health", _ANSWER_S)[0] != HTTPStatus.OK:
                    return None
                keyless: int = HTTPStatus.UNAUTHORIZED
                if key is not None:
                    keyless = talk.ask("/slots", _PROPS_S)[0]
                status, body = 0, b""
                with contextlib.suppress(*NO_ANSWER):  # /health decides, /props only describes
                    status, body = talk.ask("/props", _PROPS_S, key, is_last=True)
            except NO_ANSWER:
                return None
        if keyless not in _REFUSALS:
            return _UNPROTECTED
        if status in _REFUSALS:
            return _OTHER_KEY
        found = _facts(f"http://{HOST}:{port}", body if status == HTTPStatus.OK else b"")
        return replace(found, api_key=key)


def _facts(base_url: str, props: bytes) -> ServerFacts:
    try:
        members = json.loads(props)
        context = members["default_generation_settings"]["n_ctx"]
        vision = bool(members.get("modalities", {}).get("vision", False))
        slots = members.get("total_slots")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ServerFacts(base_url)
    return ServerFacts(
        base_url,
        context if type(context) is int else None,
        vision,
        total_slots=slots if type(slots) is int and slots > 0 else None,
    )
