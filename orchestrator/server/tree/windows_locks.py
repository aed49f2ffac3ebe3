"""The locks of a slot: a file that is opened without sharing its writing. A server inherits the
handle, and Windows frees the file with the last one. Standard library only.
"""

from __future__ import annotations

import _winapi
import msvcrt
import os
from pathlib import Path
from typing import Final

from orchestrator.server.tree.port import Part

_IN_USE: Final = 32  # ERROR_SHARING_VIOLATION
_SHARE_READING: Final = 1
_OPEN_ALWAYS: Final = 4
_seized: Final[list[int]] = []


def open_lock(path: Path) -> int:
    """Return a descriptor of a lock file, new or old, without its lock. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_BINARY | os.O_NOINHERIT)


def take(path: Path | str) -> int | None:
    """Return a descriptor that holds the file's lock; None while another process holds it.

    Raises:
        OSError: The file cannot be opened.
    """
    access = _winapi.GENERIC_READ | _winapi.GENERIC_WRITE
    try:
        handle = _winapi.CreateFile(
            str(path), access, _SHARE_READING, _winapi.NULL, _OPEN_ALWAYS, 0, 0
        )
    except OSError as error:
        if error.winerror == _IN_USE:
            return None
        raise
    return msvcrt.open_osfhandle(handle, os.O_RDWR | os.O_BINARY)


def is_free(path: Path | str, _fd: int = -1) -> bool:
    """Return whether nobody has the lock of the file at this path, which cannot be replaced."""
    try:
        fd = take(path)
    except OSError:
        return False
    if fd is not None:
        os.close(fd)
    return fd is not None


def for_keeper(path: Path) -> Part:
    """Return what a keeper needs to see that the owner's lock is free."""
    return os.fsencode(path)


def seize(lock: Part | None) -> bool:
    """Take a lock by what `for_keeper` returned, for the rest of this process."""
    fd = take(os.fsdecode(lock)) if isinstance(lock, bytes) else None
    if fd is not None:
        _seized.append(fd)
    return fd is not None


def is_given_up(lock: Part | None) -> bool:
    return isinstance(lock, bytes) and is_free(os.fsdecode(lock))


def read(lock: Part | None) -> bytes:
    """Return what its owner has written into the file. Raises OSError."""
    if not isinstance(lock, bytes):
        raise FileNotFoundError
    with open(os.fsdecode(lock), "rb") as file:
        return file.read(4096)


def let_go(lock: Part | None) -> None:
    """Close what `for_keeper` returned."""
