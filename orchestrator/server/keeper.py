"""The keeper: a small process between the host and its server, which it starts, ends and reaps.

There is one per orchestrator. It is single-threaded, uses the standard library only and starts
nothing but the server. Its host gives orders over a socket, and the host's end is one of them: the
server is ended, or kept for the next owner. No server outlives its keeper: a direct child gets
SIGKILL from the kernel when the keeper dies.

The next owner of the slot connects to a socket in the slot's folder, and becomes the host.

Orders have an `op` and an `id`, which the answer repeats:
- `spawn` with the descriptors of the specification, the slot's lock and the owner's lock: `pid` and
  the descriptors of the output and, on Linux, of the process; or `error`, its number and text
- `kill` with `grace_s`: `is_empty` once nothing is left, or the `pids` that survived
- `ask`: `is_empty`
Two have no answer: `terms`, with `grace_s` and `keep_s` for the end of the host, and `note` with
the `url` of the server.

Without being asked it says `hello` to each host first, and `exited` with a `pid` and its `status`.
The next owner's `hello` has a descriptor of the output that no host has read. If it may have the
server, it has the `server`'s pid and `url` and descriptors of its `memory`, which is what the host
had said of it, and its output.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from orchestrator.base import waitable
from orchestrator.server import ladder, tree
from orchestrator.server.tree import (
    VERSION,
    CannotExecute,
    Channel,
    Door,
    Host,
    Message,
    Part,
    Tree,
    text_of,
)

_VERIFY_EVERY_S: Final = 0.02
_READ_BYTES: Final = 1 << 16
_UNREAD_BYTES: Final = 1 << 18


class Keeper:
    """The loop of a keeper.

    Args:
        door: Listens for the next owner.
        wake_fd: Readable when a child may have ended; None where that must be polled.
        grace_s, keep_s: For the end of the host: how long a server has after SIGTERM, and how long
            it is kept before that.
        record: The record of the slot's server, removed with a server whose host is gone.

    Attributes:
        is_done: Nothing is left to do.
        channel: To its host, until that is gone.
        kill: The kill in progress.
        kept_until: When a server that is kept for the next owner is ended.
        poll: What it listens to.
    """

    def __init__(
        self,
        channel: Channel,
        below: Tree,
        host: Host,
        *,
        door: Door | None = None,
        wake_fd: int | None = None,
        grace_s: float = ladder.LEFT_GRACE_S,
        keep_s: float = 0.0,
        record: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_done: bool = False
        self.channel: Channel | None = channel
        self._tree = below
        self._host = host
        self._door = door
        self._wake_fd = wake_fd
        self._grace_s = grace_s
        self._keep_s = keep_s
        self._record = record
        self._memory = b""  # of its host, about the server
        self._url: str | None = None
        self._output: int | None = None
        self._unread = b""  # the end of what it has printed since its host is gone
        self._watched: int | None = None  # what tells that it has exited, until it has
        self._untold: int | None = None  # pid of the server, until its exit has been told
        self.kill: _Kill | None = None
        self.kept_until: float = math.inf
        self._is_heir = False
        self._clock = clock
        self.poll: waitable.Poll = waitable.poll()
        self._listen_to(channel.fd, host.fd, wake_fd, None if door is None else door.fd)

    def run(self) -> None:
        """Work until the host is gone, or has closed its socket, and nothing is left."""
        self._greet()
        while not self.is_done:
            self.turn([fd for fd, _ in self.poll.poll(self._timeout_ms())])
        self.close()

    def close(self) -> None:
        """Give back the descriptors: it may have been a thread."""
        self._forget_output()
        self._host.leave()

    def turn(self, ready: list[int]) -> None:
        """Read what is ready, notice exits, go on with a kill, and ask for the host."""
        for fd in sorted(ready, key=self._is_door):  # a host that has closed its end comes first
            if self.channel is not None and fd == self.channel.fd:
                self._listen(self.channel)
            elif fd == self._wake_fd:
                os.read(fd, _READ_BYTES)
            elif fd == self._output:
                self._drain(fd)
            elif self._door is not None and self._is_door(fd):
                self._let_in(self._door)
        if not self.is_done:
            self._look()

    def _listen_to(self, *fds: int | None) -> None:
        for fd in fds:
            if fd is not None:
                self.poll.register(fd, waitable.READABLE)

    def _is_door(self, fd: int) -> bool:
        return self._door is not None and fd == self._door.fd

    def _timeout_ms(self) -> float | None:
        waits = [self._host.ask_every_s, self.kept_until - self._clock()]
        if self.kill is not None:
            waits += [_VERIFY_EVERY_S, self.kill.next_at() - self._clock()]
        elif self._wake_fd is None and self._tree.exit_fd is None and self._untold is not None:
            waits.append(_VERIFY_EVERY_S)
        shortest = min(waits)
        return None if shortest == math.inf else max(0.0, shortest * 1000)

    # -------------------------------------------------------------------------------- the host

    def _greet(self, parts: tuple[Part, ...] = (), **more: Any) -> None:
        own = {"version": VERSION, "pid": os.getpid(), "pids": tree.process.pid_namespace()}
        own["contains"] = self._tree.contains
        self._say(parts, op="hello", **own, **more)

    def _let_in(self, door: Door) -> None:
        """Let the next owner be the host; anybody else hears nothing."""
        end, pid = door.accept()
        is_next = pid is not None and self._host.is_owner(pid)
        if not self._is_heir and (self._host.is_gone() or (is_next and self._host.is_silent)):
            self._inherit()
        if pid is None or not (self._is_heir and is_next):
            end.close()
            return
        self._host = self._host.succeeded_by(pid)
        self.channel = Channel(end)
        self._is_heir = False
        self._listen_to(self.channel.fd, self._host.fd)
        if self.kept_until == math.inf or self._output is None:  # it is being ended
            self._greet((self._unread,))
            self._untold = None
        else:
            self._unread += waitable.stop_reading(self._output)  # its host reads it from now on
            held = (self._unread, self._memory, self._output)
            self._greet(held, server=self._tree.leader, url=self._url)
            with contextlib.suppress(KeyError):
                self.poll.unregister(self._output)
        self._unread, self.kept_until = b"", math.inf

    def _say(self, parts: tuple[Part, ...] = (), **message: Any) -> None:
        if self.channel is not None:
            with contextlib.suppress(OSError):  # its end is noticed by reading
                self.channel.send(message, parts)

    def _listen(self, channel: Channel) -> None:
        received = channel.receive()
        if received is None:
            self.poll.unregister(channel.fd)
            channel.close()
            self.channel = None
            self._host.is_silent = True
            self.is_done = self._host.is_this_process  # what is left is for the next owner
            return
        for message, parts in received:
            match message["op"]:
                case "spawn":
                    self._spawn(message["id"], *parts)
                case "terms":
                    self._grace_s, self._keep_s = message["grace_s"], message["keep_s"]
                case "note":
                    self._url = message["url"]
                case "kill":
                    self._begin_kill(message["id"], message["grace_s"])
                case "ask":
                    self._say(id=message["id"], is_empty=self._tree.is_empty())

    def _spawn(self, order: int, spec: Part, lock: Part, owner: Part) -> None:
        if not isinstance(lock, int):
            raise TypeError("a lock is a descriptor")
        self._host.guard(owner)
        told = json.loads(text_of(spec))
        self._memory, self._url = told.pop("memory").encode(), None
        output, written = waitable.pipe()
        try:
            pid = self._tree.start(told, written, lock)
        except CannotExecute as error:
            waitable.close(output)
            self._say(id=order, error=[error.number, error.text])
            return
        finally:
            os.close(written)
            os.close(lock)
        self._forget_output()
        self._output, self._untold, self._unread = output, pid, b""
        self._watched = self._tree.exit_fd
        self._listen_to(self._watched)
        with contextlib.ExitStack() as opened:
            parts: list[Part] = [output]
            if (handle := tree.process.pidfd_to_send(pid)) is not None:
                parts.append(handle)
                opened.callback(os.close, handle)
            self._say(tuple(parts), id=order, pid=pid)

    # ------------------------------------------------------------------------------- the server

    def _look(self) -> None:
        if self._watched is not None and self._tree.exit_status()[0]:
            self.poll.unregister(self._watched)
            self._watched = None
        self._tree.reap_orphans()
        self._tell_exit()
        if not self._is_heir and self._host.is_gone():
            self._inherit()
        if self._clock() >= self.kept_until or (self.kept_until < math.inf and self._has_ended()):
            self._begin_last_kill()
        if self.kill is not None:
            self._advance(self.kill)
        elif self.channel is None and self._tree.is_empty():
            self.is_done = True

    def _tell_exit(self) -> None:
        if self._untold is not None:
            has_exited, status = self._tree.exit_status()
            if has_exited:
                self._say(op="exited", pid=self._untold, status=status)
                self._untold = None

    def _has_ended(self) -> bool:
        return self._tree.leader is None or self._tree.exit_status()[0]

    def _begin_kill(self, order: int | None, grace_s: float) -> None:
        self._memory, self.kept_until = b"", math.inf  # it is for nobody any more
        self.kill = _Kill(order, grace_s, self._clock())

    def _begin_last_kill(self) -> None:
        self._begin_kill(None, min(self._grace_s, ladder.LEFT_GRACE_S))

    def _inherit(self) -> None:
        """The host is gone: keep its server for the next owner, or end it."""
        self._is_heir = True
        if self.channel is not None:
            self.poll.unregister(self.channel.fd)
            self.channel.close()
            self.channel = None
        if self._host.fd is not None:
            self.poll.unregister(self._host.fd)
        if self._output is not None:
            self._listen_to(self._output)  # a full pipe would stop the server
        if self.kill is None and self._memory and self._keep_s > 0 and not self._has_ended():
            self.kept_until = self._clock() + self._keep_s
        else:
            self._begin_last_kill()

    def _advance(self, kill: _Kill) -> None:
        if self._tree.is_empty():
            self._tell_exit()
            self._forget_output()
            self._end(kill, is_empty=True)
            return
        now = self._clock()
        for signum in kill.due(now):
            if signum == ladder.KILL and kill.ends_at == math.inf:
                kill.ends_at = now + ladder.gone_within_s(
                    tree.process.resident_bytes(self._tree.leader)
                )
            self._tree.signal(signum)
            if signum != ladder.KILL:
                self._tree.signal(ladder.CONTINUE)
        if now >= kill.ends_at:
            self._end(kill, is_empty=False, pids=self._tree.pids())

    def _end(self, kill: _Kill, **answer: Any) -> None:
        self.kill = None
        if kill.order is not None:
            self._say(id=kill.order, **answer)
            return
        self.is_done = self._is_heir  # else the next owner has come meanwhile
        if answer["is_empty"] and self._is_heir and self._host.take_lock():
            with contextlib.suppress(OSError):
                os.unlink(self._record)

    def _drain(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if data := waitable.read(fd, _READ_BYTES):
                self._unread = (self._unread + data)[-_UNREAD_BYTES:]
            else:
                self.poll.unregister(fd)

    def _forget_output(self) -> None:
        if self._output is not None:
            with contextlib.suppress(KeyError):
                self.poll.unregister(self._output)
            waitable.close(self._output)
            self._output = None


class _Kill:
    """One run of the kill ladder; SIGKILL is repeated, for what was found late."""

    def __init__(self, order: int | None, grace_s: float, now: float) -> None:
        self.order = order
        self.ends_at: float = math.inf
        self._rungs = list(ladder.kill_plan(grace_s, now=now))

    def next_at(self) -> float:
        return self._rungs[0].at_s if self._rungs else math.inf

    def due(self, now: float) -> list[int]:
        found = []
        while self._rungs and self._rungs[0].at_s <= now:
            found.append(self._rungs.pop(0).signum)
        return found if found or self._rungs else [ladder.KILL]


def main() -> None:
    """Be the keeper that `link.py` starts; the argument is a JSON object."""
    given: Message = json.loads(sys.argv[1])
    channel, host, door, wake_fd = tree.become_keeper(given)
    terms = {name: given[name] for name in ("grace_s", "keep_s", "record")}
    Keeper(channel, tree.of_this_process(), host, door=door, wake_fd=wake_fd, **terms).run()
