"""A wait that other threads can end, for a cancel, an exit or new output."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import BinaryIO


class Waker:
    """A pipe to wait on; `wake` may be called from any thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        os.set_blocking(self._read, False)
        self._is_open = True
        self._guard = threading.Lock()  # no write may reach a descriptor that was closed and reused

    def wake(self) -> None:
        with self._guard, contextlib.suppress(BlockingIOError):
            if self._is_open:
                os.write(self._write, b"x")

    def wait(self, seconds: float, also: BinaryIO | None = None) -> tuple[bool, bool]:
        """Return (was woken, `also` is readable) after at most `seconds`."""
        poll = select.poll()  # select() ends at descriptor 1024
        poll.register(self._read, select.POLLIN)
        if also is not None:
            poll.register(also, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(seconds * 1000)]
        if woken := self._read in ready:
            os.read(self._read, 4096)
        return woken, len(ready) > woken

    def close(self) -> None:
        with self._guard:
            self._is_open = False
            os.close(self._read)
            os.close(self._write)
