"""The warden: the thread that drains, signals and reaps the server of a slot.

No other thread signals or reaps, so a signal can never reach a reused pid. The server itself is
reaped last: until everything in the slot has exited, its zombie keeps its pid and process group
from being reused.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from orchestrator.base import launch
from orchestrator.base.log import event_log
from orchestrator.base.tokens import Generation
from orchestrator.base.waker import Waker
from orchestrator.errors import Problem, ServerUnavailable, StateDirError
from orchestrator.machine.commands import Kill
from orchestrator.machine.facts import Emptied, Exit, Exited, KillFailed
from orchestrator.server import ladder, process_table
from orchestrator.server.child import ServerProcess
from orchestrator.server.environment import API_KEY_NAME
from orchestrator.server.eviction import Eviction
from orchestrator.server.pin import Pin
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot import Slot

_log = event_log("orchestrator.server")
_READ_BYTES: Final = 1 << 16
_POLL_EXIT_S: Final = 0.02
_EXIT_LINES: Final = 40  # every later status contains them


@dataclass(slots=True, eq=False)
class _KillRun:
    command: Kill
    eviction: Eviction
    report: Callable[[Emptied | KillFailed], None]


class Warden(threading.Thread):
    """The thread that owns every process in a claimed slot.

    Args:
        on_exit: Called on this thread, once for each server.
        kill_grace_s: Seconds between SIGTERM and SIGKILL; 0 means SIGKILL at once.
    """

    def __init__(
        self, slot: Slot, on_exit: Callable[[Exited], None], *, kill_grace_s: float
    ) -> None:
        super().__init__(name=f"llama-warden-{slot.name}", daemon=True)
        self._slot = slot
        self._on_exit = on_exit
        self._grace_s = kill_grace_s
        self._todo: deque[Callable[[], None]] = deque()
        self._waker = Waker()
        self._server: ServerProcess | None = None
        self._run: _KillRun | None = None
        self._poll = select.poll()
        self._poll.register(self._waker.fd, select.POLLIN)
        self._closing = threading.Event()

    # ----------------------------------------------------------------- called from other threads

    def spawn(
        self,
        generation: Generation,
        argv: tuple[str, ...],
        environment: Mapping[str, str],
        lock_fd: int,
        announce: Callable[[ServerProcess], None],
    ) -> None:
        """Start a server that inherits the slot's lock, and watch it. Runs on the caller's thread.

        Args:
            announce: Called with the server before anything about it is reported.

        Raises:
            ServerUnavailable: The binary cannot be executed.
            StateDirError: The record cannot be written; nothing was started.
        """
        self._slot.remember(None)
        try:
            popen = launch.popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=(lock_fd,),
                start_new_session=True,
                bufsize=0,
            )
        except (OSError, ValueError) as error:
            self._slot.forget()
            raise _cannot_execute(argv[0], error) from error
        process = process_table.identify(popen.pid) or ProcessId(
            popen.pid, 0, process_table.boot_id()
        )
        server = ServerProcess(
            generation,
            Pin.of(process) or Pin(process, None),  # it may have exited already
            popen,
            family=lambda: {p.pid for p in self._slot.inhabitants(process.pid)},
            api_key=environment.get(API_KEY_NAME),
        )
        if popen.stdout is not None:
            server.stdout_fd = popen.stdout.fileno()
            os.set_blocking(server.stdout_fd, False)
        announce(server)
        self._submit(lambda: self._watch(server))
        try:
            self._slot.remember(process)
        except StateDirError as error:  # its lock, its token and the first record remain
            _log("warning", "slot.record_failed", pid=process.pid, error=error.message)

    def empty(
        self,
        command: Kill,
        server: ServerProcess | None,
        report: Callable[[Emptied | KillFailed], None],
    ) -> None:
        """Run the kill ladder on everything in the slot, and report once it is verified empty."""

        def begin() -> None:
            rungs = deque(ladder.kill_plan(self._grace_s, now=time.monotonic()))
            group = server.pid if server is not None and not server.is_reaped else None
            run = Eviction(self._slot, self._poll, rungs, server, group)
            self._run = _KillRun(command, run, report)

        self._submit(begin)

    def close(self) -> None:
        """End the thread; the slot must be empty, or emptying it must have failed."""
        self._submit(self._closing.set)
        self.join()

    def _submit(self, work: Callable[[], None]) -> None:
        self._todo.append(work)
        self._waker.wake()

    # ----------------------------------------------------------------------- on the warden's thread

    def run(self) -> None:
        while not self._closing.is_set():
            try:
                self._turn()
            except BaseException as error:  # noqa: BLE001 (this thread must survive any error)
                _log("exception", "warden.failed")
                if self._run is not None:
                    self._fail(self._run, f"{type(error).__name__}: {error}")
                time.sleep(_POLL_EXIT_S)
        self._waker.close()

    def _turn(self) -> None:
        for fd, _ in self._poll.poll(self._timeout_ms()):
            self._handle_ready(fd)
        while self._todo:
            self._todo.popleft()()
        if self._server is not None and self._server.must_be_polled:
            self._check_exit(self._server)
        if self._run is not None:
            self._advance(self._run)

    def _timeout_ms(self) -> float | None:
        if self._run is not None:
            return self._run.eviction.timeout_ms()
        if self._server is not None and self._server.must_be_polled:
            return _POLL_EXIT_S * 1000
        return None

    def _handle_ready(self, fd: int) -> None:
        server = self._server
        if fd == self._waker.fd:
            self._waker.clear()
        elif server is not None and fd == server.stdout_fd:
            self._drain(server)
        elif server is not None and fd == server.pin.fd:
            self._check_exit(server)
        # else: a pin of a kill run, which checks all of its pins anyway

    def _watch(self, server: ServerProcess) -> None:
        self._server = server
        if server.stdout_fd is not None:
            self._poll.register(server.stdout_fd, select.POLLIN)
        if server.pin.fd is not None:
            self._poll.register(server.pin.fd, select.POLLIN)

    def _drain(self, server: ServerProcess) -> None:
        """Read what is available, a bounded number of times: a flood must not starve the rest."""
        for _ in range(16):
            if server.stdout_fd is None:
                return
            try:
                data = os.read(server.stdout_fd, _READ_BYTES)
            except BlockingIOError:
                return
            if data:
                server.output.feed(data)
            else:
                self._close_pipe(server)

    def _close_pipe(self, server: ServerProcess) -> None:
        if server.stdout_fd is not None and server.popen.stdout is not None:
            self._poll.unregister(server.stdout_fd)
            server.stdout_fd = None
            server.popen.stdout.close()
            server.output.close()

    def _check_exit(self, server: ServerProcess) -> None:
        """Record an exit without reaping: the zombie keeps the pid ours."""
        if server.exit is not None or server.is_alive:
            return
        if server.pin.fd is not None:
            self._poll.unregister(server.pin.fd)
        self._drain(server)
        server.exit = Exit(server.pid, _returncode(server.popen), server.output.tail(_EXIT_LINES))
        _log("info", "process.exited", pid=server.pid, returncode=server.exit.returncode)
        server.notify()
        self._on_exit(Exited(server.generation, time.monotonic(), server.exit))

    def _advance(self, run: _KillRun) -> None:
        evidence = run.eviction.step()
        if evidence is None:
            return
        if not evidence.is_empty:
            self._fail(run, f"{evidence.reason}; fix that, then unload again")
            return
        exit_ = self._reap(run.eviction.server)
        self._slot.forget()
        self._run = None
        run.report(Emptied(run.command.generation, time.monotonic(), exit_))

    def _reap(self, server: ServerProcess | None) -> Exit | None:
        if server is None:
            return None
        self._drain(server)
        self._close_pipe(server)
        if not server.is_reaped:
            server.popen.wait()
            server.is_reaped = True
            server.pin.close()
            _log("info", "process.reaped", pid=server.pid, returncode=server.popen.returncode)
        if self._server is server:
            self._server = None
        return server.exit

    def _fail(self, run: _KillRun, why: str) -> None:
        """End a run without emptying the slot; the record keeps what the slot holds."""
        self._run = None
        run.eviction.close()
        message = f"the slot cannot be emptied: {why}"
        problem = Problem("slot_occupied", message, generation=run.command.generation)
        run.report(KillFailed(run.command.generation, time.monotonic(), problem))


def _cannot_execute(command: str, error: Exception) -> ServerUnavailable:
    """Return the error of a binary that could not be started (errno: see execve(2))."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    hints = {2: "it or its interpreter is missing", 8: "it may be built for another machine"}
    hint = hints.get(getattr(error, "errno", 0) or 0, "check llama_server")
    return ServerUnavailable.because(
        f"{command} cannot be started: {why} ({hint})", field="llama_server"
    )


def _returncode(popen: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status without reaping; None if another part of the host has taken it.

    A host that ignores SIGCHLD, or waits for any child, takes it. `Popen.wait` then reports 0,
    which would be wrong.
    """
    if not hasattr(os, "waitid"):
        return popen.poll()
    try:
        status = os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return None
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
