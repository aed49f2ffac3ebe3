"""The host's end of its keeper: starting it, giving orders, and noticing its end."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from orchestrator.base import launch, threads, waitable
from orchestrator.server import process_table, tree
from orchestrator.server.environment import inherited_environment
from orchestrator.server.ladder import CONTINUE, KILL, LEFT_GRACE_S
from orchestrator.server.pin import Pin, wait_exited
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot import Slot
from orchestrator.server.tree import VERSION, Channel, Message, Part, text_of

ANSWER_S: Final = 10.0
"""How long an order may take that takes a millisecond."""
_END_S: Final = 1.0
_OURS: Final = (errno.EMFILE, errno.ENFILE)  # about this process, not the keeper
_CODE: Final = (
    "import json, sys; sys.path.append(json.loads(sys.argv[1])['package']); "
    "from orchestrator.server.keeper import main; main()"
)

Answer = tuple[Message, list[Part]]


@dataclass(frozen=True, slots=True)
class KeptServer:
    """A server that was kept for the next owner.

    Attributes:
        memory: What its last owner had said of it.
        url: Where it listened, if that was known.
        output_fd: Its output.
    """

    pid: int
    memory: bytes
    url: str | None
    output_fd: int


class KeeperGone(Exception):
    """The keeper has ended, or does not answer; its server has ended with it."""


class KeeperLink:
    """A keeper that has been started. Any thread may give orders; one receives.

    Attributes:
        pid: Its pid, from its first message on; this process's if it is a thread.
        contains: Whether it proves by itself that nothing is left of a server.
        pin: Handle of its process; None before its first message, and for a thread.
        unread: The end of what its server has printed since its last host is gone.
        kept: Its server, if it was kept for us.
        can_keep: Whether the next owner can reach it.
    """

    def __init__(
        self, channel: Channel, helper: tree.Helper | None, *, can_keep: bool = False
    ) -> None:
        self.can_keep: bool = can_keep
        self.pid: int | None = None
        self.contains: bool = False
        self.pin: Pin | None = None
        self.unread: bytes = b""
        self.kept: KeptServer | None = None
        self._channel = channel
        self._helper = helper
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Answer]] = {}
        _links.add(self)

    @classmethod
    def start(cls, slot: Slot, grace_s: float, keep_s: float = 0.0) -> Self:
        """Start the keeper of a claimed slot, in about 2 ms; it listens some 30 ms later.

        Where there is no interpreter to run it with, it is a thread of this process: then the
        server survives a killed host, until the next owner of the slot ends it.

        Raises:
            OSError: It cannot be started.
        """
        given = {
            "slot": str(slot.directory),  # for who reads a list of processes
            "package": str(Path(__file__).parents[2]),
            "host": os.getpid(),
            "grace_s": grace_s,
            "keep_s": keep_s,
            "record": str(slot.record_path),
        }
        command = (launch.interpreter(), "-I", "-S", "-c", _CODE)
        channel, helper, can_keep = tree.start_keeper(
            command, given, str(slot.door_path), inherited_environment()
        )
        return cls(channel, helper, can_keep=can_keep)

    @classmethod
    def succeed(cls, slot: Slot) -> Self | None:
        """Return the keeper of this slot's last owner, if it works for us now.

        Its server, if it has one, was kept for us, or is being ended.
        """
        slot.continue_keeper()
        try:
            channel = Channel.to(str(slot.door_path))
        except OSError:  # there is none
            return None
        link = cls(channel, None, can_keep=True)
        if link.wait(lambda: link.pid is not None) and link.pin is not None:
            return link
        if link.pid is not None:  # of another version, or in a container with other numbers
            with contextlib.suppress(KeeperGone):
                link.wait(link.order("kill", grace_s=LEFT_GRACE_S).done)
        link.end()
        return None

    def wait(self, is_true: Callable[[], bool]) -> bool:
        """Receive until something is true; False if the keeper ends, or says nothing for long."""
        while not is_true():
            self.resume()
            if not waitable.is_ready(self.fd, ANSWER_S) or self.receive() is None:
                return False
        return True

    @classmethod
    def start_thread(cls) -> Self:
        """Start a keeper that is a thread of this process; raises OSError or NoThread."""
        from orchestrator.server.keeper import Keeper

        ours, theirs = Channel.pair()
        loop = Keeper(Channel(theirs), tree.in_this_process(), tree.Host(None, None))
        threads.start(threading.Thread(target=loop.run, name="llama-keeper", daemon=True))
        return cls(ours, None)

    @property
    def fd(self) -> int:
        return self._channel.fd

    @property
    def process(self) -> ProcessId | None:
        """Who it is, for the record; None before its first message, and for a thread."""
        return None if self.pin is None else self.pin.process

    def order(self, op: str, parts: tuple[Part, ...] = (), **more: Any) -> Future[Answer]:
        """Send an order; its answer, or `KeeperGone`, comes with `receive`.

        Raises:
            KeeperGone: The keeper has ended, and has not received it.
            OSError: This process has no descriptor left for it.
        """
        number = next(self._numbers)
        answer = self._waiting[number] = Future()
        self.resume()
        try:
            self._channel.send({"op": op, "id": number, **more}, parts)
        except OSError as error:
            self._waiting.pop(number, None)
            if error.errno in _OURS:
                raise
            raise KeeperGone(str(error)) from error
        return answer

    def tell(self, op: str, **more: Any) -> None:
        """Send an order that has no answer; a keeper that is gone does not need it."""
        with contextlib.suppress(OSError):
            self._channel.send({"op": op, **more})

    def receive(self) -> list[Message] | None:
        """Settle the orders that were answered, and return what else was said; None at the end."""
        received = self._channel.receive()
        if received is None:
            for answer in tuple(self._waiting.values()):
                answer.set_exception(KeeperGone("the keeper has ended"))
            self._waiting.clear()
            return None
        said = []
        for message, parts in received:
            if (answering := self._waiting.pop(message.get("id", 0), None)) is not None:
                answering.set_result((message, parts))
            elif message.get("op") == "hello":
                self._meet(message, parts)
            else:
                said.append(message)
        return said

    def _meet(self, hello: Message, parts: list[Part]) -> None:
        pid = self.pid = hello["pid"]
        self.contains = hello["contains"]
        if hello["version"] == VERSION and hello["pids"] == tree.process.pid_namespace():
            found = process_table.identify(pid)
            self.pin = None if found is None else Pin.of(found)  # None for a thread
            unread, memory, output = [*parts, None, None, None][:3]
            if unread is not None:
                self.unread = text_of(unread)
            if memory is not None and isinstance(output, int):
                self.kept = KeptServer(hello["server"], text_of(memory), hello["url"], output)
        else:
            for part in parts:
                if isinstance(part, int):
                    waitable.close(part)
        if self._helper is not None:
            self._helper.wait()

    def resume(self) -> None:
        """Continue a stopped keeper; one that runs does not notice."""
        if self.pin is not None:
            self.pin.signal(CONTINUE)

    def kill(self) -> None:
        """End the keeper at once, and with it its server; `receive` will say so."""
        if self.pin is not None:
            self.pin.signal(KILL)
        elif self._helper is not None:
            self._helper.kill()

    def leave(self) -> None:
        """Close our end. Once the owner's lock is free, the keeper has no host any more."""
        self._channel.close()
        if self.pin is not None:
            self.pin.close()

    def end(self) -> None:
        """End the keeper, which may be stopped, and give everything back."""
        self.kill()
        self._channel.close()  # for one that has yet to say hello
        if self._helper is not None:
            self._helper.wait()
        if self.pin is not None:
            wait_exited([self.pin], _END_S)
            tree.process.reap(self.pin.process.pid)
            self.pin.close()


_links: Final[weakref.WeakSet[KeeperLink]] = weakref.WeakSet()


def _forget_all() -> None:
    for link in tuple(_links):
        link._channel.close()  # noqa: SLF001 (a forked worker has no keeper)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
