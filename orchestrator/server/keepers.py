"""The keeper of a slot, and another one once it has ended.

Orders that must be answered at once, by the owner's thread, go through here; the warden, which
receives for all keepers, is told of each new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from orchestrator.base import launch
from orchestrator.base.log import event_log
from orchestrator.base.threads import NoThread
from orchestrator.errors import ServerUnavailable, Unavailable
from orchestrator.machine.facts import SlotEvidence
from orchestrator.server import eviction, process_table
from orchestrator.server.link import ANSWER_S, Answer, KeeperGone, KeeperLink, KeptServer
from orchestrator.server.output import OutputRing
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot import Slot
from orchestrator.server.tree import locks

_LAST_LINES: Final = 20
_log = event_log("orchestrator.server")


@dataclass(frozen=True, slots=True)
class Left:
    """What a dead owner has left in a slot.

    Attributes:
        process: One of its processes; None if it is not known which it is.
        kept: Its server, with everything that is known of it, if that was kept for us.
    """

    process: ProcessId | None
    kept: KeptServer | None = None


class Keepers:
    """Who starts, ends and reaps the servers of a claimed slot.

    Args:
        grace_s: Of the kill ladder.
        keep_s: How long a server is kept after the end of this host; 0 = it is ended.
        listen: Called with each keeper; to receive from it until it ends, and then to call `lose`.
    """

    def __init__(
        self, slot: Slot, grace_s: float, keep_s: float, listen: Callable[[KeeperLink], None]
    ) -> None:
        self._slot = slot
        self._grace_s = grace_s
        self._keep_s = keep_s
        self._listen = listen
        self.present: KeeperLink | None = None

    def prepare(self) -> Left | None:
        """Have a keeper, so that no spawn waits for it, and return what a dead owner has left.

        Its keeper becomes ours, if it has one. A failure is only logged.
        """
        link = KeeperLink.succeed(self._slot)
        left = self._look_up() if link is None else self._inherit(link)
        if left is not None and left.kept is not None:
            _log("info", "slot.kept", pid=left.kept.pid)
        elif left is not None:
            _log("warning", "slot.occupied", pid=left.process.pid if left.process else None)
        try:
            if self.present is None:
                self._start()
        except (OSError, NoThread) as error:
            _log("error", "keeper.unavailable", error=str(error))
        return left

    def _look_up(self) -> Left | None:
        found = eviction.look_up(self._slot)
        if not found and self._slot.verify().is_empty:
            eviction.reap(self._slot)  # a keeper without a server may be stopped
            return None
        recorded = self._slot.recall()
        return Left(recorded if recorded in found else next(iter(found), None))

    def _inherit(self, link: KeeperLink) -> Left | None:
        link.tell("terms", grace_s=self._grace_s, keep_s=self._keep_s)
        self._use(link)
        if link.kept is None and (words := _lines(link.unread)):
            _log("warning", "output.recovered", lines=words)
        recorded, kept = self._slot.recall(), link.kept
        if kept is not None:
            if recorded is not None and recorded == process_table.identify(kept.pid):
                return Left(recorded, kept)
            os.close(kept.output_fd)
        if self.is_empty().is_empty and self._slot.verify().is_empty:
            self._slot.forget()
            return None
        is_alive = recorded is not None and process_table.is_alive(recorded)
        return Left(recorded if is_alive else None)

    def lose(self, link: KeeperLink) -> bool:
        """Give back a keeper that has ended; return whether it was the present one."""
        _log("warning", "keeper.ended", pid=link.pid)
        link.end()
        was_present = self.present is link
        if was_present:
            self.present = None
        return was_present

    @property
    def can_keep(self) -> bool:
        """Whether the server goes on if we end now."""
        link = self.present
        return link is not None and link.can_keep and link.contains and self._keep_s > 0

    def note(self, url: str) -> None:
        """Tell the keeper where the server listens, for the next owner."""
        if (link := self.present) is not None:
            link.tell("note", url=url)

    def is_empty(self) -> SlotEvidence:
        """Ask the keeper whether it has no child, in about 0.1 ms."""
        link = self.present
        if link is None:
            return SlotEvidence(True)  # what a killed keeper left was looked for at its end
        try:
            answer, _ = _answer_to(link, link.order("ask"))
        except KeeperGone:
            return SlotEvidence(True)
        if answer["is_empty"]:
            return SlotEvidence(True)
        return SlotEvidence(False, "a process of the last server is still alive")

    def spawn(
        self, argv: tuple[str, ...], environment: Mapping[str, str], lock_fd: int, memory: str
    ) -> tuple[KeeperLink, int, list[int]]:
        """Have a server started, and return its keeper, its pid, and its descriptors: its output
        and, on Linux, its pidfd. The keeper tells `memory` to the next owner, if it keeps it.

        Raises:
            ServerUnavailable: The binary cannot be executed.
            StateDirError: The record cannot be written; nothing was started.
            Unavailable: There is no keeper, or it has ended meanwhile: a kill ends what it left.
        """
        spec = {"argv": argv, "env": dict(environment), "cwd": _working_directory()}
        spec["memory"] = memory
        try:
            link, (answer, fds) = self._order_spawn(json.dumps(spec).encode(), lock_fd)
        except (KeeperGone, OSError, NoThread) as error:
            raise _no_hand_over(error) from error
        except ImportError as error:
            why = "the files of this package are gone or replaced: restart this program"
            raise _no_hand_over(why) from error
        if "error" in answer:
            self._slot.forget()
            raise _cannot_execute(argv[0], *answer["error"])
        if not fds:  # there was no room for them in this process
            raise _no_hand_over("too many open files: raise the limit (ulimit -n, LimitNOFILE)")
        return link, answer["pid"], [fd for fd in fds if isinstance(fd, int)]

    def _order_spawn(self, spec: bytes, lock_fd: int) -> tuple[KeeperLink, Answer]:
        """Order a spawn. It is repeated only if the first one cannot have been carried out."""
        link = self.present or self._start()
        try:
            order = self._send_spawn(link, spec, lock_fd)
        except KeeperGone:  # it has ended since, and has not received this
            link = self._start()
            order = self._send_spawn(link, spec, lock_fd)
        try:
            return link, _answer_to(link, order)
        except KeeperGone as error:
            if link.pid is not None:
                raise
            link = self._start_thread(f"it has never reported, and now {error}")
            return link, _answer_to(link, self._send_spawn(link, spec, lock_fd))

    def _send_spawn(self, link: KeeperLink, spec: bytes, lock_fd: int) -> Future[Answer]:
        owner = self._slot.owner_for_keeper()
        try:
            self._slot.remember(None, link.process)
            return link.order("spawn", (spec, lock_fd, owner))
        finally:
            locks.let_go(owner)

    def family(self, link: KeeperLink, pid: int) -> set[int]:
        """Return the pids of a server and everything that it started."""
        if link.contains and link.pid is not None:
            return process_table.descendants({link.pid}) | {pid}
        return {p.pid for p in self._slot.inhabitants(pid)}

    def _start(self) -> KeeperLink:
        """Start a keeper; raises OSError or NoThread."""
        try:
            return self._use(KeeperLink.start(self._slot, self._grace_s, self._keep_s))
        except launch.NoInterpreter as error:
            return self._start_thread(str(error))

    def _start_thread(self, why: str) -> KeeperLink:
        _log("error", "keeper.replaced", why=why)
        return self._use(KeeperLink.start_thread())

    def _use(self, link: KeeperLink) -> KeeperLink:
        self.present = link
        self._listen(link)
        return link


def _lines(output: bytes) -> tuple[str, ...]:
    ring = OutputRing()
    ring.feed(output)
    ring.close()
    return ring.tail(_LAST_LINES)


def _answer_to(link: KeeperLink, order: Future[Answer]) -> Answer:
    try:
        return order.result(ANSWER_S)
    except TimeoutError:
        link.kill()
        raise KeeperGone(f"the keeper did not answer within {ANSWER_S:g} s") from None


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return "/"


def _no_hand_over(why: object) -> Unavailable:
    return Unavailable.because(f"the process that keeps the server cannot take it over: {why}")


def _cannot_execute(command: str, number: int, why: str) -> ServerUnavailable:
    """Return the error of a binary that could not be started (errno: see execve(2))."""
    hints = {2: "it or its interpreter is missing", 8: "it may be built for another machine"}
    hint = hints.get(number, "check llama_server")
    return ServerUnavailable.because(
        f"{command} cannot be started: {why} ({hint})", field="llama_server"
    )
