"""What the demo observes: the transitions of its orchestrator, and the process table.

The witness trusts only the kernel and the slot's token in the environment of a process, never the
orchestrator. A zombie counts as dead: it holds nothing any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, Self

from orchestrator.machine.states import State
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.server import process_table
from orchestrator.server.process_table import ProcessRow

_EVERY_S: Final = 0.002


class Timeline:
    """Keeps the transitions of a started orchestrator, and shows each as it happens.

    `show` is called on a thread that ends with the orchestrator; `began_at` is Unix time.
    """

    def __init__(
        self, orch: Orchestrator, began_at: float, show: Callable[[dict[str, Any]], None]
    ) -> None:
        self.moments: list[dict[str, Any]] = []
        self._orch = orch
        self._began_at = began_at
        self._show = show
        self._changed = threading.Condition()
        self.thread: threading.Thread = threading.Thread(
            target=self._follow, name="demo-timeline", daemon=True
        )
        self.thread.start()

    def catch_up(self) -> int:
        """Wait until every event so far was shown, and return the id of the last one."""
        newest = self._orch.last_event_id
        with self._changed:
            self._changed.wait_for(lambda: len(self.moments) >= newest)  # ids count from 1
        return newest

    def wait_for(self, state: State, *, after: int, timeout_s: float) -> None:
        """Wait until a state is entered after an event, or the time is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: any(m["id"] > after and m["state"] == state for m in self.moments),
                timeout_s,
            )

    def _follow(self) -> None:
        for event in self._orch.events(after=0):
            data = event.data
            ms = round(max(0.0, data["at"] - self._began_at) * 1000, 3)
            of_event = {name: data[name] for name in ("source", "trigger", "generation", "pid")}
            moment = {"id": event.id, "ms": ms, "state": data["dest"], **of_event}
            self._show(moment)
            with self._changed:
                self.moments.append(moment)
                self._changed.notify_all()


class Witness:
    """Counts the live servers with a token in their environment, until the context ends."""

    def __init__(self, token: str) -> None:
        self.looks: int = 0
        self.most: int = 0  # alive in one look
        self.pids: set[int] = set()
        self._token = token
        self._others: set[int] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="demo-witness", daemon=True)

    def __enter__(self) -> Self:
        self._others = set(process_table.pids())  # older than the slot, so no server of it
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def look(self) -> int:
        """Return how many servers are alive now; each leads a session of its own."""
        pids = set(process_table.pids())
        self._others &= pids
        rows = filter(None, map(process_table.row, pids - self._others))
        servers = {row.session for row in rows if self._is_server(row)}
        self.looks += 1
        self.pids |= servers
        self.most = max(self.most, len(servers))
        return len(servers)

    def _is_server(self, row: ProcessRow) -> bool:
        return not row.is_zombie and bool(process_table.bearers(self._token, [row.pid]))

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self.look()
