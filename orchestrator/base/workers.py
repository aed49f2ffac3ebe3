"""Daemon threads for work that may block: look-ups, questions to the Hub, downloads, probes.

One set serves every orchestrator of a process. A thread that is free takes the next job at once; a
new one is started only when none is free, and ends when it has had nothing to do for a while.
Nobody joins them, so that a mount that never answers holds up neither a close nor the exit of the
interpreter.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any, Final, TypeVar

MOST: Final = 128
_IDLE_S: Final = 5.0

_T = TypeVar("_T")
_Job = tuple[Future[Any], Callable[[], Any]]


class Workers:
    """A bounded number of daemon threads.

    Args:
        most: How many there are at most; further jobs wait for one that is free.
        idle_s: Seconds without a job after which one ends.
    """

    def __init__(self, most: int = MOST, idle_s: float = _IDLE_S) -> None:
        self._most = most
        self._idle_s = idle_s
        self._guard = threading.Lock()  # of the three below
        self._free: list[queue.SimpleQueue[_Job]] = []
        self._backlog: deque[_Job] = deque()
        self._count = 0

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Have it done, and return its future; cancelling that before it begins drops it.

        Raises:
            RuntimeError: no thread can be started, and none is there.
        """
        future: Future[_T] = Future()
        with self._guard:
            if self._free:
                self._free.pop().put((future, work))
            elif self._count == self._most or not self._start((future, work)):
                self._backlog.append((future, work))
        return future

    def _start(self, first: _Job) -> bool:
        box: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        box.put(first)
        thread = threading.Thread(target=self._run, args=(box,), name="llama-worker", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._count:
                raise
            return False
        self._count += 1
        return True

    def _run(self, box: queue.SimpleQueue[_Job]) -> None:
        while (job := self._next(box)) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                try:
                    result = work()
                except BaseException as error:  # noqa: BLE001 (it is for whoever waits)
                    future.set_exception(error)
                else:
                    future.set_result(result)
            del job, future, work
            with self._guard:
                if self._backlog:
                    box.put(self._backlog.popleft())
                else:
                    self._free.append(box)

    def _next(self, box: queue.SimpleQueue[_Job]) -> _Job | None:
        """Return the next job of a thread; None when it may end."""
        try:
            return box.get(timeout=self._idle_s)
        except queue.Empty:
            with self._guard:
                if box in self._free:
                    self._free.remove(box)
                    self._count -= 1
                    return None
            return box.get()  # it was handed over in this moment


@cache
def shared() -> Workers:
    """Return the workers of this process."""
    return Workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared.cache_clear)  # a fork has none of the threads
