"""What can be waited for, by number: descriptors, and handles on Windows. Standard library only."""

from __future__ import annotations

import sys
from typing import Final, TypeAlias

if sys.platform == "win32":
    from orchestrator.base.windows import (
        READABLE,
        WRITABLE,
        Poll,
        close,
        pipe,
        poll,
        read,
        stop_reading,
    )
else:
    import os
    import select

    READABLE: Final[int] = select.POLLIN
    WRITABLE: Final[int] = select.POLLOUT
    Poll: TypeAlias = select.poll
    close: Final = os.close
    read: Final = os.read

    def poll() -> select.poll:
        return select.poll()  # select() ends at descriptor 1024

    def pipe() -> tuple[int, int]:
        """Return a pipe's reading end, of which `read` never waits, and a descriptor to write."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        return reading, writing

    def stop_reading(_fd: int) -> bytes:
        """Leave a pipe to another process; return what had been read ahead."""
        return b""


__all__ = [
    "READABLE",
    "WRITABLE",
    "Poll",
    "close",
    "is_ready",
    "pipe",
    "poll",
    "read",
    "stop_reading",
]


def is_ready(fd: int, within_s: float = 0.0) -> bool:
    """Wait for one thing; return whether it has come."""
    one = poll()
    one.register(fd, READABLE)
    return bool(one.poll(within_s * 1000))
