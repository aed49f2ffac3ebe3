"""The warden: the thread of the host that gives a keeper its orders and hears what it says.

It reads the server's output, reports its exit, and has the slot emptied. What the keeper cannot
prove, or cannot do because it has been killed, is done here by the slow look-up (eviction.py).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final

from orchestrator.base import waitable
from orchestrator.base.log import event_log
from orchestrator.base.tokens import Generation
from orchestrator.base.waker import Waker
from orchestrator.errors import Problem, StateDirError
from orchestrator.machine.commands import Kill
from orchestrator.machine.facts import Emptied, Exit, Exited, KillFailed, SlotEvidence
from orchestrator.server import eviction, process_table, tree
from orchestrator.server.child import ServerProcess
from orchestrator.server.environment import API_KEY_NAME
from orchestrator.server.keepers import Keepers
from orchestrator.server.ladder import LEFT_GRACE_S
from orchestrator.server.link import ANSWER_S, Answer, KeeperGone, KeeperLink, KeptServer
from orchestrator.server.pin import Pin
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot import Slot

_log = event_log("orchestrator.server")
_READ_BYTES: Final = 1 << 16
_POLL_EXIT_S: Final = 0.02
_STATUS_S: Final = 10.0
_HUNG_S: Final = 120.0  # a keeper gives up after 5 s and 0.25 s for each GiB of its server
_EXIT_LINES: Final = 40  # every later status contains them


@dataclass(slots=True, eq=False)
class _KillRun:
    command: Kill
    server: ServerProcess | None
    report: Callable[[Emptied | KillFailed], None]
    grace_s: float
    answer: Future[Answer] | None = None
    ends_at: float = math.inf


class Warden(threading.Thread):
    """The thread that owns every process in a claimed slot.

    Args:
        on_exit: Called on this thread, once for each server.
        kill_grace_s: Seconds between SIGTERM and SIGKILL; 0 means SIGKILL at once.
        keep_s: How long a server is kept after the end of this host; 0 = it is ended.

    Attributes:
        keepers: Who it gets its keeper from.
    """

    def __init__(
        self,
        slot: Slot,
        on_exit: Callable[[Exited], None],
        *,
        kill_grace_s: float,
        keep_s: float = 0.0,
    ) -> None:
        super().__init__(name=f"llama-warden-{slot.name}", daemon=True)
        self._slot = slot
        self._on_exit = on_exit
        self._grace_s = kill_grace_s
        self._todo: deque[Callable[[], None]] = deque()
        self._waker = Waker()
        self.keepers: Keepers = Keepers(slot, kill_grace_s, keep_s, self._listen)
        self._links: dict[int, KeeperLink] = {}  # what is polled: the last one may not have ended
        self._server: ServerProcess | None = None
        self._last_exit: tuple[int, int | None] | None = None  # pid and status, as the keeper says
        self._status_due = math.inf  # when to give up waiting for the status of an exit
        self._run: _KillRun | None = None
        self._poll = waitable.poll()
        self._poll.register(self._waker.fd, waitable.READABLE)
        self._closing = threading.Event()

    # ----------------------------------------------------------------- called from other threads

    def spawn(
        self,
        generation: Generation,
        argv: tuple[str, ...],
        environment: Mapping[str, str],
        lock_fd: int,
        memory: str,
        announce: Callable[[ServerProcess], None],
    ) -> None:
        """Have a server started that inherits the slot's lock. Runs on the owner's thread.

        Args:
            memory: What the next owner is told of it.
            announce: Called with the server before anything about it is reported.

        Raises:
            ServerUnavailable: The binary cannot be executed.
            StateDirError: The record cannot be written; nothing was started.
            Unavailable: There is no keeper, or it has ended meanwhile: a kill ends what it left.
        """
        link, pid, fds = self.keepers.spawn(argv, environment, lock_fd, memory)
        process = process_table.identify(pid) or ProcessId(pid, 0, process_table.boot_id())
        pin = Pin(process, fds[1] if len(fds) > 1 else tree.process.pidfd(pid))
        key = environment.get(API_KEY_NAME)
        server = self._server_of(link, generation, pin, fds[0], key)
        announce(server)
        self._submit(lambda: self._watch(server))
        try:
            self._slot.remember(process, link.process)
        except StateDirError as error:  # its lock, its token and the first record remain
            _log("warning", "slot.record_failed", pid=pid, error=error.message)

    def adopt(
        self, process: ProcessId, kept: KeptServer, generation: Generation, api_key: str | None
    ) -> ServerProcess | None:
        """Go on with a server that was kept for us; None if it has ended since."""
        link, pin = self.keepers.present, Pin.of(process)
        if link is None or pin is None:
            waitable.close(kept.output_fd)
            return None
        server = self._server_of(link, generation, pin, kept.output_fd, api_key)
        if kept.url is not None:
            server.output.announced = (kept.url,)
        server.output.feed(link.unread)
        self._submit(lambda: self._watch(server))
        return server

    def _server_of(
        self,
        link: KeeperLink,
        generation: Generation,
        pin: Pin,
        output_fd: int,
        api_key: str | None,
    ) -> ServerProcess:
        family = partial(self.keepers.family, link, pin.process.pid)
        return ServerProcess(generation, pin, family, output_fd=output_fd, api_key=api_key)

    def empty(
        self,
        command: Kill,
        server: ServerProcess | None,
        report: Callable[[Emptied | KillFailed], None],
    ) -> None:
        """Run the kill ladder on everything in the slot, and report once it is verified empty."""
        grace_s = self._grace_s if server is not None else min(self._grace_s, LEFT_GRACE_S)
        self._submit(lambda: self._begin(_KillRun(command, server, report, grace_s)))

    def close(self, *, keep: bool = False) -> None:
        """End the thread, and the keeper if it is not to keep its server for the next owner.

        Otherwise the slot is empty, or emptying it has failed.
        """
        self._submit(self._closing.set)
        self.join()
        for link in self._links.values():
            if keep and link is self.keepers.present:
                link.leave()
            else:
                link.end()
        if keep:
            if self._server is not None:
                self._server.close()
            return
        with contextlib.suppress(OSError):
            self._slot.door_path.unlink()

    def _listen(self, link: KeeperLink) -> None:
        def listen() -> None:
            self._links[link.fd] = link
            self._poll.register(link.fd, waitable.READABLE)

        self._submit(listen)

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
        if (server := self._server) is not None:
            if self._last_exit is not None and self._last_exit[0] == server.pid:
                self._exited(server, self._last_exit[1])
                self._last_exit = None
            elif time.monotonic() >= self._status_due:
                self._exited(server, None)
        if self._run is not None:
            self._advance(self._run)

    def _timeout_ms(self) -> float | None:
        due = min(self._status_due, self._run.ends_at if self._run is not None else math.inf)
        return None if due == math.inf else max(0.0, (due - time.monotonic()) * 1000)

    def _handle_ready(self, fd: int) -> None:
        server = self._server
        if fd == self._waker.fd:
            self._waker.clear()
        elif (link := self._links.get(fd)) is not None:
            self._hear(link)
        elif server is not None and fd == server.output_fd:
            self._drain(server)
        elif server is not None and fd == server.pin.fd:
            self._poll.unregister(fd)
            if server.exit is None:
                self._status_due = time.monotonic() + _STATUS_S
                if (link := self.keepers.present) is not None:
                    link.resume()

    def _hear(self, link: KeeperLink) -> None:
        said = link.receive()
        if said is None:
            self._lose(link)
            return
        for message in said:
            if message["op"] == "exited":
                self._last_exit = message["pid"], message["status"]

    def _lose(self, link: KeeperLink) -> None:
        """A keeper has ended, and its server with it; an unreachable rest is ended by a kill."""
        self._poll.unregister(link.fd)
        del self._links[link.fd]
        if self.keepers.lose(link) and self._server is not None:
            self._exited(self._server, None)

    def _watch(self, server: ServerProcess) -> None:
        self._server = server
        for fd in (server.output_fd, server.pin.fd):
            if fd is not None:
                self._poll.register(fd, waitable.READABLE)

    def _drain(self, server: ServerProcess) -> None:
        """Read what is available, a bounded number of times: a flood must not starve the rest."""
        for _ in range(16):
            if server.output_fd is None:
                return
            try:
                data = waitable.read(server.output_fd, _READ_BYTES)
            except BlockingIOError:
                return
            if data:
                server.output.feed(data)
            else:
                self._poll.unregister(server.output_fd)
                waitable.close(server.output_fd)
                server.output_fd = None
                server.output.close()

    def _exited(self, server: ServerProcess, status: int | None) -> None:
        """Report an exit, once; what the server has left is only ended by a kill."""
        self._status_due = math.inf
        if server.exit is not None:
            return
        self._drain(server)
        server.exit = Exit(server.pid, status, server.output.tail(_EXIT_LINES))
        _log("info", "process.exited", pid=server.pid, returncode=status)
        server.notify()
        self._on_exit(Exited(server.generation, time.monotonic(), server.exit))

    def _begin(self, run: _KillRun) -> None:
        self._run = run
        if (link := self.keepers.present) is not None:
            patience_s = ANSWER_S if link.pid is None else run.grace_s + _HUNG_S
            run.ends_at = time.monotonic() + patience_s
            with contextlib.suppress(KeeperGone):
                run.answer = link.order("kill", grace_s=run.grace_s)

    def _advance(self, run: _KillRun) -> None:
        link = self.keepers.present
        if run.answer is not None and not run.answer.done():
            if time.monotonic() >= run.ends_at and link is not None:
                link.kill()
                run.ends_at = math.inf
            return
        try:
            answer = run.answer.result()[0] if run.answer is not None else {}
        except KeeperGone:
            answer = {}
        is_contained = link is not None and link.contains
        if is_contained and (pids := answer.get("pids")):
            _log("error", "process.kill_failed", pids=pids)
            self._fail(run, f"processes {pids} did not end after SIGKILL")
            return
        ours = link.process if link is not None else None
        is_found = run.server is None and run.command.child is not None
        is_stranger = is_found and self._slot.recall_keeper() != ours  # a dead owner's
        is_proof = is_contained and answer.get("is_empty") and not is_stranger
        evidence = self._slot.verify() if is_proof else SlotEvidence(False)
        if is_stranger:
            evidence = eviction.reap(self._slot, ours)[1]
        elif not evidence.is_empty:
            evidence = eviction.evict(self._slot, run.grace_s)[1]
        if not evidence.is_empty:
            self._fail(run, evidence.reason)
            return
        self._end(run)

    def _end(self, run: _KillRun) -> None:
        exit_ = None
        if (server := run.server) is not None:
            exit_ = server.exit
            self._drain(server)
            for fd in (server.output_fd, server.pin.fd):
                if fd is not None and server is self._server:
                    _unregister(self._poll, fd)
            server.close()
            _log("info", "process.reaped", pid=server.pid)
            if self._server is server:
                self._server, self._status_due = None, math.inf
        self._slot.forget()
        self._run = None
        run.report(Emptied(run.command.generation, time.monotonic(), exit_))

    def _fail(self, run: _KillRun, why: str) -> None:
        """End a run without emptying the slot; the record keeps what the slot holds."""
        self._run = None
        message = f"the slot cannot be emptied: {why}; fix that, then unload again"
        problem = Problem("slot_occupied", message, generation=run.command.generation)
        run.report(KillFailed(run.command.generation, time.monotonic(), problem))


def _unregister(poll: waitable.Poll, fd: int) -> None:
    with contextlib.suppress(KeyError):
        poll.unregister(fd)
