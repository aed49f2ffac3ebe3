"""Watches the process table for servers of one state directory, from a process of its own.

Every millisecond it looks for new servers and checks which older ones are still alive, by their
pidfds and after the new one was found: a reported pair is proof, not an estimate. It misses a
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
YOUNG_S = 2.0


class Monitor:
    def __init__(self, directory: str) -> None:
        self.wanted = TOKEN + os.fsencode(directory) + b"/"
        self.known: dict[int, float] = {}  # pids that may not have executed the server yet
        self.passed: set[int] = set()
        self.alive: dict[int, int] = {}  # pid -> pidfd
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
            if self.is_server(pid):
                del self.known[pid]
                self.add(pid)
            elif now - first > YOUNG_S:
                self.passed.add(pid)
                del self.known[pid]

    def is_server(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:
            return False
        return any(value.startswith(self.wanted) for value in variables)

    def add(self, pid: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return
        at = time.monotonic()
        self.pairs += [(old, pid) for old, old_fd in self.alive.items() if not has_exited(old_fd)]
        self.alive[pid] = fd
        self.poll.register(fd, select.POLLIN)
        self.seen.append({"pid": pid, "at": at, "kin": kin_of(pid)})

    def sleep(self, seconds: float) -> None:
        """Wait, at most until the next exit."""
        for fd, _ in self.poll.poll(seconds * 1000):
            pid = next((pid for pid, known in self.alive.items() if known == fd), None)
            if pid is not None:
                self.poll.unregister(fd)
                os.close(fd)
                del self.alive[pid]


def kin_of(pid: int) -> list[int]:
    """Return its parent and the leader of its session."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return []
    return [int(fields[1]), int(fields[3])]


def has_exited(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def main(directory: str, result: str) -> None:
    monitor = Monitor(directory)
    for name in os.listdir("/proc"):  # processes older than this cannot be servers of the test
        if name.isdigit() and not monitor.is_server(int(name)):
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
