"""The locks of a slot: `flock`, which a server inherits, and which the kernel frees with the last
descriptor.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from orchestrator.server.tree.port import Part

if TYPE_CHECKING:
    from pathlib import Path


def open_lock(path: Path) -> int:
    """Return a descriptor of a lock file, new or old, without its lock. Raises OSError."""
    from orchestrator.base import launch  # keepers, which call neither, start sooner without it
    from orchestrator.base.private_file import open_file

    return launch.beyond_streams(open_file(path, os.O_RDWR | os.O_CREAT))


def take(path: Path) -> int | None:
    """Return a descriptor that holds the file's lock; None while another process holds it.

    Raises:
        OSError: The file cannot be opened.
    """
    fd = open_lock(path)
    if _lock(fd):
        return fd
    os.close(fd)
    return None


def is_free(_path: Path | None, fd: int) -> bool:
    """Return whether nobody has the lock of the file of this descriptor, wherever it is now."""
    if not _lock(fd):
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)  # no server inherits this one
    return True


def for_keeper(path: Path) -> Part:
    """Return what a keeper needs to see that the owner's lock is free. Raises OSError."""
    return open_lock(path)


def let_go(lock: Part | None) -> None:
    """Close what `for_keeper` returned, or its copy."""
    if isinstance(lock, int):
        os.close(lock)


def seize(lock: Part | None) -> bool:
    """Take a lock by a copy of what `for_keeper` returned, until that is closed."""
    return _lock(_fd_of(lock))


def is_given_up(lock: Part | None) -> bool:
    """Return whether nobody has it."""
    return is_free(None, _fd_of(lock))


def read(lock: Part | None) -> bytes:
    """Return what its owner has written into the file. Raises OSError."""
    return os.pread(_fd_of(lock), 4096, 0)


def _fd_of(lock: Part | None) -> int:
    return lock if isinstance(lock, int) else -1


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ValueError):
        return False
    return True
