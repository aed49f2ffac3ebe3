"""Every order of what may happen to a keeper, over its real loop and an abstract process tree.

`explore` replays sequences of events on a fresh `Keeper`, breadth first, and goes on from each new
situation once. The time is the test's: `wait` lets it pass to the next rung of the kill ladder, or
to the end of the patience after SIGKILL.
"""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestrator.server.keeper import Keeper
from orchestrator.server.tree import CannotExecute, Channel, Door, Host, Message, Part

_NO_PID = 1 << 22  # of the kernel's largest, so that no pidfd can be had


@dataclass
class FakeTree:
    """A server (`running`, `ended`, gone) and processes that have left its group.

    `is_deaf` ones ignore SIGTERM, `is_immortal` ones survive SIGKILL.
    """

    contains: bool = True
    exit_fd: int | None = None
    leader: int | None = None
    is_running: bool = False
    strays: int = 0
    is_deaf: bool = False
    is_immortal: bool = False
    status: int | None = None
    starts: int = 0
    signals: list[int] = field(default_factory=list)

    @property
    def is_really_empty(self) -> bool:
        return not self.is_running and not self.strays

    def happen(self, event: str) -> None:
        match event:
            case "exit":
                self.is_running, self.status = False, 3
            case "daemon":
                self.strays = 1
            case "daemon ends":
                self.strays = 0
            case "deaf":
                self.is_deaf = True
            case "immortal":
                self.is_immortal = True

    def start(self, spec: dict[str, Any], output: int, lock: int) -> int:
        if not self.is_empty():
            raise CannotExecute(0, "not empty")
        self.starts += 1
        self.leader, self.is_running, self.status = _NO_PID + self.starts, True, None
        return self.leader

    def signal(self, signum: int) -> None:
        self.signals.append(signum)
        is_fatal = signum == signal.SIGKILL or (signum == signal.SIGTERM and not self.is_deaf)
        if is_fatal and not self.is_immortal:
            if self.is_running:
                self.status = -signum
            self.is_running, self.strays = False, 0

    def exit_status(self) -> tuple[bool, int | None]:
        return not self.is_running, self.status

    def reap_orphans(self) -> None:
        pass

    def is_empty(self) -> bool:
        if self.is_really_empty:
            self.leader = None
        return self.is_really_empty

    def pids(self) -> list[int]:
        return [1] * (self.is_running + self.strays)


class FakeHost(Host):
    """A host whose end and whose lock are the test's."""

    def __init__(self, pid: int | None = None, fd: int | None = None) -> None:
        super().__init__(os.getpid() if pid is None else pid, None)
        self.is_dead = False
        self.is_lock_free = False
        self.is_replaced = False  # its lock is the next owner's
        if fd is not None:
            os.close(fd)

    def is_gone(self) -> bool:
        return self.is_dead or (self.is_silent and self.is_lock_free)

    def take_lock(self) -> bool:
        return self.is_gone()

    def is_owner(self, pid: int) -> bool:
        return self.is_replaced


class Broken(Exception):
    """A promise of the keeper that was broken, and the events that led to it."""


class Situation:
    """A keeper with all around it, and what its host has heard."""

    def __init__(
        self,
        keeper: Callable[..., Keeper] = Keeper,
        tree: Callable[[], FakeTree] = FakeTree,
        keep_s: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.keep_s = keep_s
        self.tree = tree()
        ours, theirs = Channel.pair()
        self.ours: Channel | None = ours
        self.path = os.path.join(tempfile.gettempdir(), f"door-{os.getpid()}")
        self.door = Door.at(self.path)
        self.keeper = keeper(
            Channel(theirs),
            self.tree,
            FakeHost(),
            door=self.door,
            grace_s=5.0,
            keep_s=keep_s,
            clock=lambda: self.now,
        )
        self.hosts = 1
        self.kept_since = 0.0
        self.has_killed = False  # the server, or has begun to
        self.signals_before = 0  # it was started
        self.orders = 0
        self.kills: set[int] = set()  # not answered yet
        self.untold: int | None = None
        self.starts_at_the_end: int | None = None

    @property
    def host(self) -> FakeHost:
        host = self.keeper._host
        assert isinstance(host, FakeHost)
        return host

    def close(self) -> None:
        """Give back all descriptors."""
        if self.door is not None:
            self.door.close()
            os.unlink(self.path)
        if self.ours is not None:
            self.ours.close()
        if self.keeper.channel is not None:
            self.keeper.channel.close()
        self.keeper.close()

    def _ready(self) -> list[int]:
        return [fd for fd, _ in self.keeper.poll.poll(0)]

    @property
    def key(self) -> tuple[object, ...]:
        """What decides everything that may follow."""
        tree, host, kill = self.tree, self.host, self.keeper.kill
        return (
            (tree.is_running, tree.leader is None, tree.strays, tree.is_deaf, tree.is_immortal),
            (host.is_dead, host.is_silent, host.is_lock_free, self.ours is None),
            None if kill is None else (kill.order is None, kill.next_at() - self.now, kill.ends_at),
            (bool(self.kills), self.untold is None, self.keeper.is_done, tree.starts > 1),
            (self.hosts, self.has_killed, self.keeper.kept_until - self.now),
        )

    def events(self) -> Iterator[str]:
        """Name what may happen now."""
        tree, host = self.tree, self.host
        if self.keeper.is_done:
            return
        if self.ours is not None and not host.is_dead:
            yield "ask"
            yield "close"
            if not self.kills:
                yield "kill"
                if tree.starts < 2:
                    yield "spawn"
        if not host.is_dead:
            yield "host dies"
        if self.ours is None and not host.is_lock_free:
            yield "lock is free"
        if self.keeper.kill is not None or self.keeper.kept_until < math.inf:
            yield "wait"
        if self.hosts == 1:
            yield "stranger"
            if host.is_gone() or host.is_silent:
                yield "next owner"
        yield from self._events_below()

    def _events_below(self) -> Iterator[str]:
        tree = self.tree
        if tree.is_running:
            yield "exit"
            if not tree.strays:
                yield "daemon"
            if not tree.is_deaf:
                yield "deaf"
            if not tree.is_immortal:
                yield "immortal"
        if tree.strays:
            yield "daemon ends"

    def happen(self, event: str) -> None:
        tree, host = self.tree, self.host
        match event:
            case "spawn" | "kill" | "ask":
                self._order(event)
            case "close":
                assert self.ours is not None
                self.ours.close()
                self.ours = None
            case "host dies":
                host.is_dead = True
                self.starts_at_the_end = tree.starts
            case "lock is free":
                host.is_lock_free = True
                self.starts_at_the_end = tree.starts
            case "wait":
                kill = self.keeper.kill
                if kill is None:
                    self.now = self.keeper.kept_until
                else:
                    self.now = min(kill.next_at(), kill.ends_at)
            case "stranger":
                self._knock()
            case "next owner":
                host.is_replaced = True
                self._knock()
            case _:
                tree.happen(event)
        starts = tree.starts
        self.has_killed |= len(tree.signals) > self.signals_before or event == "kill"
        was_really_empty = tree.is_really_empty
        self.keeper.turn(self._ready())
        if tree.starts > starts:
            self.has_killed, self.signals_before = False, len(tree.signals)
        self._hear(was_really_empty)
        self._check()

    def _knock(self) -> None:
        """Connect to the door; only the next owner is let in, and is the host from then on."""
        was_kept = self.keeper.kept_until < math.inf or self.may_be_kept
        end, before = Channel.to(self.path), self.host
        self.keeper.turn(self._ready())
        hello = [message for message, _ in _received(end)]
        if self.ours is not None and before.is_replaced:
            self.ours.close()
        if before.is_replaced:
            self.ours = end
        else:
            end.close()
        if not before.is_replaced:
            _promise(not hello, "a stranger is let in")
            return
        _promise(bool(hello), "the next owner is not let in")
        _promise("server" not in hello[0] or was_kept, "what is being ended is handed over")
        self.hosts, self.kills = 2, set()
        self.starts_at_the_end, self.untold = None, hello[0].get("server")

    @property
    def may_be_kept(self) -> bool:
        """Whether the server goes on if the host ends now."""
        is_kept = self.keep_s > 0 and self.keeper.kill is None and not self.has_killed
        return is_kept and self.tree.is_running

    def _order(self, op: str) -> None:
        assert self.ours is not None
        self.orders += 1
        if op == "spawn":
            with spec_file() as spec, null_file() as lock, null_file() as owner:
                self.ours.send({"op": op, "id": self.orders}, (spec, lock, owner))
            return
        if op == "kill":
            self.kills.add(self.orders)
        self.ours.send({"op": op, "id": self.orders, "grace_s": 1.0})

    def _hear(self, was_really_empty: bool) -> None:
        for message, _ in self._received():
            if "pid" in message and message.get("op") != "exited":
                _promise(self.untold is None, "a start beside a server whose exit was not told")
                self.untold = message["pid"]
            elif message.get("op") == "exited":
                _promise(message["pid"] == self.untold, "an exit that is told twice")
                _promise(message["status"] is not None, "an exit without its status")
                self.untold = None
            elif message.get("is_empty"):
                _promise(self.tree.is_really_empty, "empty, and something runs")
                _promise(self.untold is None or message["id"] not in self.kills, "a lost exit")
            elif message.get("is_empty") is False and "pids" not in message:
                _promise(not was_really_empty, "not empty, and nothing runs")
            self.kills.discard(message.get("id", 0))

    def _received(self) -> list[tuple[Message, list[Part]]]:
        return [] if self.ours is None else _received(self.ours)

    def _check(self) -> None:
        tree, host, kill = self.tree, self.host, self.keeper.kill
        if self.ours is not None and self.kills and not host.is_dead:
            _promise(kill is not None, "a kill that is never answered")
        if self.starts_at_the_end is not None:
            _promise(tree.starts == self.starts_at_the_end, "a start without a host")
        is_kept = self.keeper.kept_until < math.inf
        if host.is_gone() and not self.keeper.is_done and not is_kept:
            _promise(kill is not None and kill.order is None, "a dead host's server goes on")
        self.kept_since = self.now if not is_kept else self.kept_since
        if is_kept:
            _promise(self.now - self.kept_since < self.keep_s, "kept too long")
            _promise(not self.has_killed, "what was being ended is kept")
        if self.keeper.is_done:
            has_tried = signal.SIGKILL in tree.signals and tree.is_immortal
            _promise(tree.is_really_empty or has_tried, "it has left something")
            _promise(host.is_gone() or self.ours is None, "it has left its host")
        if kill is not None:
            _promise(self.now < kill.ends_at, "a kill without an end")


def explore(
    keeper: Callable[..., Keeper] = Keeper,
    tree: Callable[[], FakeTree] = FakeTree,
    keep_s: float = 0.0,
) -> int:
    """Let everything happen in every order, and return how many situations there are.

    Raises:
        Broken: A promise was broken; the shortest story.
    """
    seen: set[tuple[object, ...]] = set()
    todo: deque[tuple[str, ...]] = deque([()])
    while todo:
        story = todo.popleft()
        situation = Situation(keeper, tree, keep_s)
        try:
            for event in story:
                situation.happen(event)
            if situation.key not in seen:
                seen.add(situation.key)
                todo += [(*story, event) for event in situation.events()]
        except Broken as broken:
            raise Broken(f"{broken}: {', '.join(story)}") from None
        finally:
            situation.close()
    return len(seen)


def _received(channel: Channel) -> list[tuple[Message, list[Part]]]:
    found: list[tuple[Message, list[Part]]] = []
    while received := channel.receive():
        found += received
    for _, parts in found:
        for part in parts:
            if isinstance(part, int):
                os.close(part)
    return found


def _promise(is_kept: bool, otherwise: str) -> None:
    if not is_kept:
        raise Broken(otherwise)


@contextmanager
def spec_file() -> Iterator[int]:
    fd = os.memfd_create("spec")
    os.write(fd, json.dumps({"argv": ["server"], "env": {}, "cwd": "/", "memory": "it"}).encode())
    yield fd
    os.close(fd)


@contextmanager
def null_file() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDWR)
    yield fd
    os.close(fd)
