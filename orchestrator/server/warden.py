"""The warden: the thread that drains, signals and reaps the server of a slot.

No other thread signals or reaps, so a signal can never reach a reused pid. The server itself is
reaped last: until everything in the slot has exited, its zombie keeps its pid and process group
from being reused.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from orchestrator.base import launch
from orchestrator.base.log import event_log
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem, ServerUnavailable, StateDirError
from orchestrator.machine.commands import Kill
from orchestrator.machine.facts import Emptied, Exit, Exited, KillFailed
from orchestrator.server import ladder, process_table
from orchestrator.server.child import ServerProcess
from orchestrator.server.environment import API_KEY_NAME
from orchestrator.server.process_table import Pin, ProcessId
from orchestrator.server.slot import Slot

_log = event_log("orchestrator.server")
_READ_BYTES: Final = 1 << 16
_VERIFY_EVERY_S: Final = 0.02
_POLL_EXIT_S: Final = 0.02
_EXIT_LINES: Final = 40  # every later status contains them


@dataclass(slots=True, eq=False)
class _KillRun:
    """A kill ladder in progress."""

    command: Kill
    server: ServerProcess | None
    rungs: deque[ladder.SignalAt]
    report: Callable[[Emptied | KillFailed], None]
    gives_up_at: float = math.inf
    why: str = ""
    sent: tuple[int, ...] = ()
    pins: dict[int, Pin] = field(default_factory=dict)


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
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._server: ServerProcess | None = None
        self._run: _KillRun | None = None
        self._poll = select.poll()
        self._poll.register(self._wake_read, select.POLLIN)
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
            api_key=environment.get(API_KEY_NAME, "").partition(",")[0] or None,
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
            rungs = ladder.kill_plan(self._grace_s, now=time.monotonic())
            self._run = _KillRun(command, server, deque(rungs), report)

        self._submit(begin)

    def close(self) -> None:
        """End the thread; the slot must be empty, or emptying it must have failed."""
        self._submit(self._closing.set)
        self.join()

    def _submit(self, work: Callable[[], None]) -> None:
        self._todo.append(work)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

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
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)

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
            next_rung = [rung.at_s - time.monotonic() for rung in tuple(self._run.rungs)[:1]]
            return max(0.0, min([_VERIFY_EVERY_S, *next_rung]) * 1000)
        if self._server is not None and self._server.must_be_polled:
            return _POLL_EXIT_S * 1000
        return None

    def _handle_ready(self, fd: int) -> None:
        server = self._server
        if fd == self._wake_read:
            os.read(self._wake_read, 4096)
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
        self._verify(run)
        now = time.monotonic()
        if self._run is not run:
            return
        while run.rungs and run.rungs[0].at_s <= now:
            self._signal_all(run, run.rungs.popleft().signum)
        if now >= run.gives_up_at:
            self._give_up(run)

    def _signal_all(self, run: _KillRun, signum: int) -> None:
        """Signal the server's process group, then each process that has left the group."""
        server, is_first = run.server, not run.sent
        run.sent = (signum,) if signum == signal.SIGKILL else (signum, signal.SIGCONT)
        if not run.rungs:
            resident = process_table.resident_bytes(server.pid) if server else 0
            run.gives_up_at = time.monotonic() + ladder.gone_within_s(resident)
        group = server.pid if server is not None and server.exit is None else None
        if group is not None:
            if is_first:  # its descendants can only be found while it is running
                self._pin(run, self._slot.identified(process_table.descendants({group})))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                for sent in run.sent:
                    os.killpg(group, sent)  # not reaped, so the group is still ours
        if not is_first:
            self._pin(run, self._inhabitants(run))
        for pin in run.pins.values():
            if group is None or process_table.group_of(pin.process.pid) != group:
                for sent in run.sent:  # once each: llama-server ends at once at a second SIGTERM
                    pin.signal(sent)

    def _inhabitants(self, run: _KillRun) -> set[ProcessId]:
        group = run.server.pid if run.server is not None and not run.server.is_reaped else None
        found = self._slot.inhabitants(group)
        return {p for p in found if run.server is None or p != run.server.pin.process}

    def _pin(self, run: _KillRun, processes: Iterable[ProcessId]) -> list[Pin]:
        """Pin the processes that are new to this run, and return the new pins."""
        new = [p for p in processes if p.pid not in run.pins]
        pins = [pin for p in new if (pin := Pin.of(p)) is not None]
        for pin in pins:
            run.pins[pin.process.pid] = pin
            if pin.fd is not None:
                self._poll.register(pin.fd, select.POLLIN)
        return pins

    def _unpin(self, run: _KillRun, pin: Pin) -> None:
        del run.pins[pin.process.pid]
        if pin.fd is not None:
            self._poll.unregister(pin.fd)
        pin.close()

    def _verify(self, run: _KillRun) -> None:
        """Report once the slot is empty: all known processes are dead, no new one is found, and
        the lock can be taken.
        """
        for pin in tuple(run.pins.values()):
            if pin.has_exited:
                self._unpin(run, pin)
        if run.pins or (run.server is not None and run.server.exit is None):
            return
        late = self._pin(run, self._inhabitants(run))
        evidence, lock_fd = self._slot.take_lock() if not late else (None, None)
        if evidence is not None and not evidence.is_empty:
            run.why = evidence.reason
            late = self._pin(run, self._slot.lock_holders())
        for pin in late:
            for signum in run.sent:
                pin.signal(signum)
        if lock_fd is None:
            return
        os.close(lock_fd)
        exit_ = self._reap(run.server)
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

    def _give_up(self, run: _KillRun) -> None:
        alive = set(run.pins)
        if run.server is not None and run.server.exit is None:
            alive.add(run.server.pid)
        for pin in tuple(run.pins.values()):
            self._unpin(run, pin)
        pids = sorted(alive)
        _log("error", "process.kill_failed", pids=pids)
        why = f"processes {pids} did not end after SIGKILL" if pids else run.why
        self._fail(run, f"{why}; fix that, then unload again")

    def _fail(self, run: _KillRun, why: str) -> None:
        """End a run without emptying the slot; the record keeps what the slot holds."""
        self._run = None
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
