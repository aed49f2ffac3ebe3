"""The warden: the thread of the host that gives a keeper its orders and hears what it says.

It reads the server's output, reports its exit, and has the slot emptied. What the keeper cannot
prove, or cannot do because it has been killed, is done here by the slow look-up (eviction.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from orchestrator.base import launch
from orchestrator.base.log import event_log
from orchestrator.base.threads import NoThread
from orchestrator.base.tokens import Generation
from orchestrator.base.waker import Waker
from orchestrator.errors import Problem, ServerUnavailable, StateDirError, Unavailable
from orchestrator.machine.commands import Kill
from orchestrator.machine.facts import Emptied, Exit, Exited, KillFailed, SlotEvidence
from orchestrator.server import eviction, process_table
from orchestrator.server.child import ServerProcess
from orchestrator.server.environment import API_KEY_NAME
from orchestrator.server.link import ANSWER_S, Answer, KeeperGone, KeeperLink
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
    answer: Future[Answer] | None = None
    ends_at: float = math.inf


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
        self._link: KeeperLink | None = None
        self._links: dict[int, KeeperLink] = {}  # what is polled: the last one may not have ended
        self._server: ServerProcess | None = None
        self._last_exit: tuple[int, int | None] | None = None  # pid and status, as the keeper says
        self._status_due = math.inf  # when to give up waiting for the status of an exit
        self._run: _KillRun | None = None
        self._poll = select.poll()
        self._poll.register(self._waker.fd, select.POLLIN)
        self._closing = threading.Event()

    # ----------------------------------------------------------------- called from other threads

    def prepare(self) -> None:
        """End what a dead owner left in the slot, and have a keeper, so that no spawn waits for it.

        Its keeper becomes ours, if it has one. A failure is only logged.
        """
        ended, evidence = self._succeed()
        if ended:
            _log("warning", "slot.reaped", pids=sorted(ended), is_empty=evidence.is_empty)
        try:
            if self._link is None:
                self._start_keeper()
        except (OSError, NoThread) as error:
            _log("error", "keeper.unavailable", error=str(error))

    def _succeed(self) -> tuple[set[int], SlotEvidence]:
        link = KeeperLink.succeed(self._slot)
        if link is None:
            return eviction.reap(self._slot)
        server = self._slot.recall()
        ended = {server.pid} if server is not None and process_table.is_alive(server) else set()
        with contextlib.suppress(KeeperGone):
            order = link.order("kill", grace_s=eviction.LEFT_GRACE_S)
            if link.wait(order.done) and order.result()[0]["is_empty"] and link.contains:
                self._use(link)
                evidence = self._slot.verify()
                return ended, evidence if evidence.is_empty else eviction.reap(self._slot)[1]
        link.end()
        others, evidence = eviction.reap(self._slot)
        return ended | others, evidence

    def spawn(
        self,
        generation: Generation,
        argv: tuple[str, ...],
        environment: Mapping[str, str],
        lock_fd: int,
        announce: Callable[[ServerProcess], None],
    ) -> None:
        """Have a server started that inherits the slot's lock. Runs on the owner's thread.

        Args:
            announce: Called with the server before anything about it is reported.

        Raises:
            ServerUnavailable: The binary cannot be executed.
            StateDirError: The record cannot be written; nothing was started.
            Unavailable: There is no keeper, or it has ended meanwhile: a kill ends what it left.
        """
        spec = {"argv": argv, "env": dict(environment), "cwd": _working_directory()}
        link, (answer, fds) = self._order_spawn(json.dumps(spec), lock_fd)
        if "error" in answer:
            self._slot.forget()
            raise _cannot_execute(argv[0], *answer["error"])
        if not fds:  # there was no room for them in this process
            raise _no_hand_over("too many open files: raise the limit (ulimit -n, LimitNOFILE)")
        pid = answer["pid"]
        process = process_table.identify(pid) or ProcessId(pid, 0, process_table.boot_id())
        server = ServerProcess(
            generation,
            Pin(process, fds[1] if len(fds) > 1 else None),
            family=lambda: self._family(link, pid),
            output_fd=fds[0],
            api_key=environment.get(API_KEY_NAME),
        )
        announce(server)
        self._submit(lambda: self._watch(server))
        try:
            self._slot.remember(process, self._keeper_id)
        except StateDirError as error:  # its lock, its token and the first record remain
            _log("warning", "slot.record_failed", pid=pid, error=error.message)

    def is_empty(self) -> SlotEvidence:
        """Ask the keeper whether it has no child, in about 0.1 ms. Runs on the owner's thread."""
        link = self._link
        if link is None:
            return SlotEvidence(True)  # what a killed keeper left was looked for at its end
        try:
            answer, _ = self._answer_to(link, link.order("ask"))
        except KeeperGone:
            return SlotEvidence(True)
        if answer["is_empty"]:
            return SlotEvidence(True)
        return SlotEvidence(False, "a process of the last server is still alive")

    def empty(
        self,
        command: Kill,
        server: ServerProcess | None,
        report: Callable[[Emptied | KillFailed], None],
    ) -> None:
        """Run the kill ladder on everything in the slot, and report once it is verified empty."""
        self._submit(lambda: self._begin(_KillRun(command, server, report)))

    def close(self) -> None:
        """End the thread and the keeper; the slot is empty, or emptying it has failed."""
        self._submit(self._closing.set)
        self.join()
        for link in self._links.values():
            link.end()
        with contextlib.suppress(OSError):
            self._slot.door_path.unlink()

    def _submit(self, work: Callable[[], None]) -> None:
        self._todo.append(work)
        self._waker.wake()

    # ------------------------------------------------------------------------------- the keeper

    @property
    def _keeper_id(self) -> ProcessId | None:
        return self._link.pin.process if self._link is not None and self._link.pin else None

    def _start_keeper(self) -> KeeperLink:
        """Start a keeper; raises OSError or NoThread."""
        try:
            return self._use(KeeperLink.start(self._slot, self._grace_s))
        except launch.NoInterpreter as error:
            return self._start_thread(str(error))

    def _start_thread(self, why: str) -> KeeperLink:
        _log("error", "keeper.in_process", why=why)
        return self._use(KeeperLink.start_thread())

    def _use(self, link: KeeperLink) -> KeeperLink:
        def listen() -> None:
            self._links[link.fd] = link
            self._poll.register(link.fd, select.POLLIN)

        self._link = link
        self._submit(listen)
        return link

    def _order_spawn(self, spec: str, lock_fd: int) -> tuple[KeeperLink, Answer]:
        """Order a spawn. It is repeated only if the first one cannot have been carried out."""
        try:
            link = self._link or self._start_keeper()
            try:
                order = self._send_spawn(link, spec, lock_fd)
            except KeeperGone:  # it has ended since, and has not received this
                link = self._start_keeper()
                order = self._send_spawn(link, spec, lock_fd)
            try:
                return link, self._answer_to(link, order)
            except KeeperGone as error:
                if link.pid is not None:
                    raise
                link = self._start_thread(f"it has never reported, and now {error}")
                return link, self._answer_to(link, self._send_spawn(link, spec, lock_fd))
        except (KeeperGone, OSError, NoThread) as error:
            raise _no_hand_over(error) from error

    def _send_spawn(self, link: KeeperLink, spec: str, lock_fd: int) -> Future[Answer]:
        with launch.output_file() as file:
            file.write(spec.encode())
            file.flush()
            owner_fd = self._slot.open_owner()
            try:
                self._slot.remember(None, self._keeper_id)
                return link.order("spawn", (file.fileno(), lock_fd, owner_fd))
            finally:
                os.close(owner_fd)

    def _answer_to(self, link: KeeperLink, order: Future[Answer]) -> Answer:
        try:
            return order.result(ANSWER_S)
        except TimeoutError:
            link.kill()
            raise KeeperGone(f"the keeper did not answer within {ANSWER_S:g} s") from None

    def _family(self, link: KeeperLink, pid: int) -> set[int]:
        if link.contains and link.pid is not None:
            return process_table.descendants({link.pid}) | {pid}
        return {p.pid for p in self._slot.inhabitants(pid)}

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
        _log("warning", "keeper.ended", pid=link.pid)
        self._poll.unregister(link.fd)
        del self._links[link.fd]
        link.end()
        if self._link is link:
            self._link = None
            if self._server is not None:
                self._exited(self._server, None)

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
                if self._link is not None:
                    self._link.resume()

    def _watch(self, server: ServerProcess) -> None:
        self._server = server
        for fd in (server.output_fd, server.pin.fd):
            if fd is not None:
                self._poll.register(fd, select.POLLIN)

    def _drain(self, server: ServerProcess) -> None:
        """Read what is available, a bounded number of times: a flood must not starve the rest."""
        for _ in range(16):
            if server.output_fd is None:
                return
            try:
                data = os.read(server.output_fd, _READ_BYTES)
            except BlockingIOError:
                return
            if data:
                server.output.feed(data)
            else:
                self._poll.unregister(server.output_fd)
                os.close(server.output_fd)
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
        if self._link is not None:
            run.ends_at = time.monotonic() + self._grace_s + _HUNG_S
            with contextlib.suppress(KeeperGone):
                run.answer = self._link.order("kill", grace_s=self._grace_s)

    def _advance(self, run: _KillRun) -> None:
        if run.answer is not None and not run.answer.done():
            if time.monotonic() >= run.ends_at and self._link is not None:
                self._link.kill()
                run.ends_at = math.inf
            return
        try:
            answer = run.answer.result()[0] if run.answer is not None else {}
        except KeeperGone:
            answer = {}
        is_contained = self._link is not None and self._link.contains
        if is_contained and (pids := answer.get("pids")):
            _log("error", "process.kill_failed", pids=pids)
            self._fail(run, f"processes {pids} did not end after SIGKILL")
            return
        is_proof = is_contained and answer.get("is_empty")
        evidence = self._slot.verify() if is_proof else SlotEvidence(False)
        if is_proof and not evidence.is_empty:  # a program that the host starts has it for 1 ms
            time.sleep(_POLL_EXIT_S)
            evidence = self._slot.verify()
        if not evidence.is_empty:
            evidence = eviction.evict(self._slot, self._grace_s)[1]
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


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return "/"


def _unregister(poll: select.poll, fd: int) -> None:
    with contextlib.suppress(KeyError):
        poll.unregister(fd)


def _no_hand_over(why: object) -> Unavailable:
    return Unavailable.because(f"the process that keeps the server cannot take it over: {why}")


def _cannot_execute(command: str, number: int, why: str) -> ServerUnavailable:
    """Return the error of a binary that could not be started (errno: see execve(2))."""
    hints = {2: "it or its interpreter is missing", 8: "it may be built for another machine"}
    hint = hints.get(number, "check llama_server")
    return ServerUnavailable.because(
        f"{command} cannot be started: {why} ({hint})", field="llama_server"
    )
