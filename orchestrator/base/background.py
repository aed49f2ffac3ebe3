"""Work that may block, done in order by one thread behind a bounded queue.

Callers never wait and get no error: a terminal, a full pipe or a handler of the host can stop this
thread only. Where it is slower than its callers, the oldest work is dropped and counted.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from orchestrator.base import threads
from orchestrator.base.threads import NoThread

CAPACITY: Final = 10_000
FLUSH_S: Final = 1.0


class Background:
    """A queue of calls and its thread, which starts with the first call.

    Args:
        name: Name of the thread.
        report_loss: Called on the thread with the number of calls that were dropped.
        capacity: How many calls may wait.
    """

    def __init__(
        self, name: str, report_loss: Callable[[int], None], capacity: int = CAPACITY
    ) -> None:
        self._name = name
        self._report_loss = report_loss
        self._capacity = capacity
        self._begin()
        atexit.register(self.flush)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        """A fork begins anew: it has the queue, whose work is its parent's, but no thread."""
        self._changed = threading.Condition()  # its lock is never held during a call
        self._queue: deque[Callable[[], object]] = deque()
        self._thread: threading.Thread | None = None
        self._put = self._done = self._dropped = 0
        self._given_up: int | None = None

    def put(self, work: Callable[[], object]) -> None:
        """Have the thread call `work`. From the thread itself, call it now."""
        if threading.current_thread() is self._thread:
            work()
            return
        with self._changed:
            if len(self._queue) == self._capacity:
                self._queue.popleft()
                self._dropped += 1
                self._done += 1
            self._queue.append(work)
            self._put += 1
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                with contextlib.suppress(NoThread):  # the next call tries again
                    threads.start(thread)
                    self._thread = thread
            self._changed.notify_all()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until the work so far is done, and return whether it is.

        After a wait in vain, there is no other before a call has ended.
        """
        with self._changed:
            put = self._put
            if self._given_up == self._done:
                timeout_s = 0.0
            is_done = self._changed.wait_for(lambda: self._done >= put, timeout_s)
            self._given_up = None if is_done else self._done
            return is_done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                work, dropped = self._queue.popleft(), self._dropped
                self._dropped = 0
            if dropped:
                _call(partial(self._report_loss, dropped))
            _call(work)
            with self._changed:
                self._done += 1
                self._changed.notify_all()


def _call(work: Callable[[], object]) -> None:
    try:
        work()
    except BaseException:  # noqa: BLE001 (code of the host must not end the thread)
        with contextlib.suppress(Exception):
            traceback.print_exc()
