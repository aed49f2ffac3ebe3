"""Daemon threads for work that may block: look-ups, Hub requests, downloads, probes.

All orchestrators of a process share one set. A new thread starts only if none is idle, and ends
after a while without a job. The last one stays while a slot is claimed, so that its calls need no
further thread. Unlike those of `concurrent.futures` the threads are never joined: a mount that does
not answer delays neither `close()` nor the exit of the interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any, Final, TypeVar

from orchestrator.base import threads
from orchestrator.base.threads import NoThread

MOST: Final = 512  # a thread waits for ever for a disk that does not answer
_IDLE_S: Final = 5.0

_T = TypeVar("_T")
_Job = tuple[Future[Any], Callable[[], Any]]


class Workers:
    """A bounded set of daemon threads.

    Args:
        most: The largest number of threads; further jobs wait for an idle one.
        idle_s: Seconds without a job after which a thread ends.
    """

    def __init__(self, most: int = MOST, idle_s: float = _IDLE_S) -> None:
        self._most = most
        self._idle_s = idle_s
        self._guard = threading.Lock()  # of what is below
        self._idle: list[queue.SimpleQueue[_Job]] = []
        self._backlog: deque[_Job] = deque()
        self._count = 0
        self._claims = 0

    def claim(self) -> None:
        """Have a thread, and keep it until `release`; raises NoThread."""
        with self._guard:
            if not self._count:
                self._idle.append(self._start())
            self._claims += 1

    def release(self) -> None:
        """Undo one `claim`."""
        with self._guard:
            self._claims -= 1

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Run `work` on a thread; cancelling the future before it starts drops it.

        Raises:
            NoThread: no thread can be started, and none is running; the work is dropped.
        """
        future: Future[_T] = Future()
        with self._guard:
            if (box := self._free()) is None:
                self._backlog.append((future, work))
            else:
                box.put((future, work))
        return future

    def _free(self) -> queue.SimpleQueue[_Job] | None:
        """Return the box of an idle or new thread; None if the job must wait for one."""
        if self._idle:
            return self._idle.pop()
        if self._count == self._most:
            return None
        try:
            return self._start()
        except NoThread:
            if not self._count:
                raise
            return None

    def _start(self) -> queue.SimpleQueue[_Job]:
        box: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        run = threading.Thread(target=self._run, args=(box,), name="llama-worker", daemon=True)
        threads.start(run)
        self._count += 1
        return box

    def _run(self, box: queue.SimpleQueue[_Job]) -> None:
        while (job := self._next(box)) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 (the future carries it)
                    future.set_exception(error)
            del job, future, work
            with self._guard:
                if self._backlog:
                    box.put(self._backlog.popleft())
                else:
                    self._idle.append(box)

    def _next(self, box: queue.SimpleQueue[_Job]) -> _Job | None:
        """Return the thread's next job, or None if it should end."""
        while True:
            with contextlib.suppress(queue.Empty):
                return box.get(timeout=self._idle_s)
            with self._guard:  # a job may have been assigned in between
                if box in self._idle and (self._count > 1 or not self._claims):
                    self._idle.remove(box)
                    self._count -= 1
                    return None


@cache
def shared() -> Workers:
    """Return the workers of this process."""
    return Workers()


async def waited(work: Callable[[], _T]) -> _T:
    """Run `work` on a thread of this process. Unlike for `asyncio.to_thread`, the end of the event
    loop does not wait for it.
    """
    return await asyncio.wrap_future(shared().submit(work))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared.cache_clear)  # a fork has none of the threads
