"""The watch over a Healthy server, which finds out whether it hangs.

It hangs if one probe after the other is not answered, and meanwhile it shows no sign of work
(work.py). Counted are probes: whoever was paused for an hour has missed one. `/health` is answered
by the threads that serve HTTP, so while somebody uses the server `/slots` is asked too, which waits
for the loop that computes. Each probe has a connection of its own: an open one would hold up the
server's end.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from orchestrator.base import threads, waitable
from orchestrator.base.log import event_log
from orchestrator.base.threads import NoThread
from orchestrator.base.waker import Waker
from orchestrator.machine.facts import Exit, Hung
from orchestrator.server.child import ServerProcess
from orchestrator.server.output import TAIL_LINES
from orchestrator.server.work import WorkMeter

PROBES: Final = 5
"""Unanswered ones in a row that make a hang; together they take the time that is allowed."""
_SAMPLE_S: Final = 1.0
_log = event_log("orchestrator.server")


class Watch(threading.Thread):
    """Watches one server until it hangs, ends, or `stop` is called.

    Args:
        base_url: Where it listens.
        timeout_s: Seconds without an answer and without work that make a hang.
        is_used: Whether somebody uses the server now.
        report: Called once, if it hangs.
    """

    def __init__(
        self,
        server: ServerProcess,
        base_url: str,
        timeout_s: float,
        is_used: Callable[[], bool],
        report: Callable[[Hung], None],
    ) -> None:
        super().__init__(name=f"llama-watch-{server.pid}", daemon=True)
        self._server = server
        self._port = int(base_url.rpartition(":")[2])
        self._period_s = timeout_s / PROBES
        self._is_used = is_used
        self._report = report
        self._waker = Waker()
        self._is_over = False

    def begin(self) -> None:
        """Start the thread; without one the server is not watched."""
        self._server.listeners.append(self._look)
        try:
            threads.start(self)
        except NoThread as error:
            self._end()
            _log("error", "watch.unavailable", pid=self._server.pid, error=str(error))
        self._look()  # it may have ended since

    def stop(self) -> None:
        """End the watch soon; callable from any thread."""
        self._is_over = True
        self._waker.wake()

    def _look(self) -> None:
        if self._server.exit is not None:
            self.stop()

    def run(self) -> None:
        try:
            self._watch()
        except Exception:  # noqa: BLE001 (a server is not ended because our watch has failed)
            _log("exception", "watch.failed", pid=self._server.pid)
        finally:
            self._end()

    def _end(self) -> None:
        self._server.listeners.remove(self._look)
        self._waker.close()

    def _watch(self) -> None:
        silent, since = 0, time.monotonic()
        while not self._is_over:
            if silent == 0:
                meter = WorkMeter(self._server)
                meter.idle_s()
            if self._is_answered(meter):
                silent = 0
                self._waker.wait(self._period_s)
                since = time.monotonic()
            elif meter.idle_s() < self._period_s / 2:  # it has worked meanwhile
                silent, since = 0, time.monotonic()
            else:
                silent += 1
            if silent >= PROBES and not self._is_over:
                self._hang(time.monotonic() - since)
                return

    def _hang(self, silent_s: float) -> None:
        server = self._server
        _log("error", "process.hung", pid=server.pid, silent_s=round(silent_s, 3))
        tail = server.output.tail(TAIL_LINES)
        exit_ = Exit(server.pid, returncode=None, log_tail=tail, reason="hung")
        self._report(Hung(server.generation, time.monotonic(), exit_, silent_s))

    def _is_answered(self, meter: WorkMeter) -> bool:
        """Send a probe, and return whether it is answered within its time."""
        ends = time.monotonic() + self._period_s
        paths = ("/health", "/slots") if self._is_used() else ("/health",)
        return all(self._answers(path, ends, meter) for path in paths)

    def _answers(self, path: str, ends: float, meter: WorkMeter) -> bool:
        key = self._server.api_key
        lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
        lines += [f"Authorization: Bearer {key}"] if key else []
        with socket.socket() as connected, contextlib.suppress(OSError):
            connected.setblocking(False)
            connected.connect_ex(("127.0.0.1", self._port))  # its queue may be full
            if self._waits_for(waitable.WRITABLE, connected, ends, meter):
                connected.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
                is_heard = self._waits_for(waitable.READABLE, connected, ends, meter)
                return is_heard and bool(connected.recv(1 << 16))
        return False

    def _waits_for(
        self, event: int, connected: socket.socket, ends: float, meter: WorkMeter
    ) -> bool:
        """Wait for a connection, or for an answer, and look for work if it takes long."""
        poll = waitable.poll()
        poll.register(connected, event)
        poll.register(self._waker.fd, waitable.READABLE)
        while not self._is_over:
            left_s = max(0.0, ends - time.monotonic())
            if ready := poll.poll(min(left_s, _SAMPLE_S) * 1000):
                return any(fd == connected.fileno() for fd, _ in ready)
            meter.idle_s()
            if left_s <= _SAMPLE_S:
                return False
        return False
