"""A wait that other threads can end, for a cancel, an exit or new output."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import BinaryIO


class Waker:
    """A pipe to wait on; `wake` may be called from any thread.

    Attributes:
        fd: Readable once it is woken, until `clear`.
    """

    def __init__(self) -> None:
        self.fd: int
        self.fd, self._write = os.pipe()
        os.set_blocking(self._write, False)
        os.set_blocking(self.fd, False)
        self._is_open = True
        self._guard = threading.Lock()  # no write may reach a descriptor that was closed and reused

    def wake(self) -> None:
        with self._guard, contextlib.suppress(BlockingIOError):
            if self._is_open:
                os.write(self._write, b"x")

    def wait(self, seconds: float, also: BinaryIO | None = None) -> tuple[bool, bool]:
        """Return (was woken, `also` is readable) after at most `seconds`."""
        poll = select.poll()  # select() ends at descriptor 1024
        poll.register(self.fd, select.POLLIN)
        if also is not None:
            poll.register(also, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(seconds * 1000)]
        if woken := self.fd in ready:
            self.clear()
        return woken, len(ready) > woken

    def clear(self) -> None:
        os.read(self.fd, 4096)

    def close(self) -> None:
        with self._guard:
            self._is_open = False
            os.close(self.fd)
            os.close(self._write)
