"""Looks at the process table again and again: how many servers of a slot are alive at once?

A witness from outside: it believes the kernel and the slot's token in a process's environment, and
asks the orchestrator nothing. A zombie is dead: it holds nothing any more.
"""

from __future__ import annotations

import os
import threading
from typing import Final, Self

from orchestrator.server import process_table
from orchestrator.server.process_table import ProcessRow

_EVERY_S: Final = 0.002


class Witness:
    """Counts the servers of one slot until it is closed.

    Args:
        token: `NAME=value` that the servers of the slot carry in their environment.

    Attributes:
        looks: How often it has looked.
        most: Most servers alive in one look.
        pids: Every server it has seen.
    """

    def __init__(self, token: str) -> None:
        self.looks: int = 0
        self.most: int = 0
        self.pids: set[int] = set()
        self._token = token
        self._strangers: set[int] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="demo-witness", daemon=True)

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def look(self) -> int:
        """Return how many servers are alive now. Sessions are counted: a server leads its own."""
        alive = [row for row in self._rows() if not row.is_zombie and self._is_server(row)]
        self.looks += 1
        self.pids |= {row.session for row in alive}
        servers = len({row.session for row in alive})
        self.most = max(self.most, servers)
        return servers

    def _rows(self) -> list[ProcessRow]:
        """Everybody but those who were looked at before and are no servers."""
        pids = set(process_table.pids())
        self._strangers &= pids
        return [
            row for pid in pids - self._strangers if (row := process_table.row(pid)) is not None
        ]

    def _is_server(self, row: ProcessRow) -> bool:
        """A child of ours may not have become a server yet, so it is asked again the next time."""
        if process_table.bearers(self._token, [row.pid]):
            return True
        if row.ppid != os.getpid():
            self._strangers.add(row.pid)
        return False

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self.look()
