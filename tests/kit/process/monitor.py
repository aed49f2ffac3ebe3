"""Watches the process table for servers of one state directory, from a process of its own.

Every millisecond it looks for new processes of servers and checks which of other servers are still
alive, by their pidfds and after the new one was found: a reported pair is proof, not an estimate.
Processes of one server have the same API key in their environment, which is new for each start. It
misses a server that lives for less than one scan; the lock of `fake_server.py` covers that.

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
        self.keys: dict[int, bytes] = {}
        self.poll = select.poll()
        self.seen: list[dict[str, Any]] = []
        self.pairs: list[tuple[int, int]] = []
        self.looks = 0

    def look(self) -> None:
        self.looks += 1
        now = time.monotonic()
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self.passed &= pids
        self.known = {pid: at for pid, at in self.known.items() if pid in pids}
        for pid in pids - self.passed - self.alive.keys():
            first = self.known.setdefault(pid, now)
            if (key := self.key_of_server(pid)) is not None:
                del self.known[pid]
                self.add(pid, key)
            elif now - first > YOUNG_S:
                self.passed.add(pid)
                del self.known[pid]

    def key_of_server(self, pid: int) -> bytes | None:
        """Return the API key of a server of the directory, None for another process."""
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:
            return None
        if not any(value.startswith(self.wanted) for value in variables):
            return None
        return next(value for value in variables if value.startswith(KEY))

    def add(self, pid: int, key: bytes) -> None:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return
        at = time.monotonic()
        self.pairs += [
            (old, pid)
            for old, old_fd in self.alive.items()
            if self.keys[old] != key and not has_exited(old_fd)
        ]
        self.alive[pid], self.keys[pid] = fd, key
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
        if name.isdigit() and monitor.key_of_server(int(name)) is None:
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
        "left": sorted(monitor.alive),
        "looks": monitor.looks,
    }
    with open(result, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
