"""Watches the process table for servers of one state directory, from a process of its own.

Every millisecond it looks for new processes of servers and checks which of other servers are still
alive, by their pidfds and after the new one was found: a reported pair is proof, not an estimate.
Processes of one server have the same API key in their environment, which is new for each start; the
token there names the slot: pairs are of one slot, `most` counts the servers of all. It misses a
server that lives for less than one scan; the lock of `fake_server.py` covers that.

    python monitor.py STATE_DIR RESULT    # until its standard input is closed
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TOKEN = b"LLAMA_ORCHESTRATOR_SLOT_TOKEN="
KEY = b"LLAMA_API_KEY="
YOUNG_S = 2.0


class Monitor:
    def __init__(self, directory: str) -> None:
        self.wanted = TOKEN + os.fsencode(directory) + b"/"
        self.known: dict[int, float] = {}  # pids that may not have executed the server yet
        self.passed: set[int] = set()
        self.alive: dict[int, int] = {}  # pid -> pidfd
        self.servers: dict[int, tuple[bytes, bytes]] = {}  # pid -> token and key
        self.poll = select.poll()
        self.seen: list[dict[str, Any]] = []
        self.pairs: list[tuple[int, int]] = []
        self.most = 0
        self.looks = 0

    def look(self) -> None:
        self.looks += 1
        now = time.monotonic()
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self.passed &= pids
        self.known = {pid: at for pid, at in self.known.items() if pid in pids}
        for pid in pids - self.passed - self.alive.keys():
            first = self.known.setdefault(pid, now)
            if (server := self.server_of(pid)) is not None:
                del self.known[pid]
                self.add(pid, server)
            elif now - first > YOUNG_S:
                self.passed.add(pid)
                del self.known[pid]

    def server_of(self, pid: int) -> tuple[bytes, bytes] | None:
        """Return the token and the API key of a server of the directory; None: another process."""
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:
            return None
        token = next((value for value in variables if value.startswith(self.wanted)), None)
        if token is None:
            return None
        return token, next(value for value in variables if value.startswith(KEY))

    def add(self, pid: int, server: tuple[bytes, bytes]) -> None:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return
        at = time.monotonic()
        others = {
            old: self.servers[old]
            for old, old_fd in self.alive.items()
            if self.servers[old] != server and not has_exited(old_fd)
        }
        self.pairs += [(old, pid) for old, other in others.items() if other[0] == server[0]]
        self.most = max(self.most, len({*others.values(), server}))
        self.alive[pid], self.servers[pid] = fd, server
        self.poll.register(fd, select.POLLIN)
        self.seen.append({"pid": pid, "at": at})

    def sleep(self, seconds: float) -> None:
        """Wait, at most until the next exit."""
        for fd, _ in self.poll.poll(seconds * 1000):
            pid = next((pid for pid, known in self.alive.items() if known == fd), None)
            if pid is not None:
                self.poll.unregister(fd)
                os.close(fd)
                del self.alive[pid]


def has_exited(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def main(directory: str, result: str) -> None:
    monitor = Monitor(directory)
    for name in os.listdir("/proc"):  # processes older than this cannot be servers of the test
        if name.isdigit() and monitor.server_of(int(name)) is None:
            monitor.passed.add(int(name))
    print("watching", flush=True)
    stop = select.poll()
    stop.register(0, select.POLLIN)
    while not stop.poll(0):
        monitor.look()
        monitor.sleep(0.001)
    monitor.look()
    report = {
        "seen": monitor.seen,
        "pairs": monitor.pairs,
        "most": monitor.most,
        "left": sorted(monitor.alive),
        "looks": monitor.looks,
    }
    with open(result, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
