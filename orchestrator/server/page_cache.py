"""Reading the files of the next model ahead, while the running server drains and ends.

A server maps its model: what is in the page cache by then costs it nothing. Files are read in
pieces, and nobody waits for the piece being read. They are left alone where they would not stay, or
would take the pages of the model that still answers.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from orchestrator.server import memory

_PIECE: Final = 8 << 20
_PAGE: Final = 4096
_MARGIN: Final = 0.1  # of what is available


def read_ahead(
    paths: Iterable[str],
    pids: Iterable[int],
    is_over: Callable[[], bool],
    advance_to: Callable[[int], None] = lambda _: None,
) -> int:
    """Bring files into the page cache, if they fit, and return how many bytes were read.

    Args:
        pids: Of the server that runs, whose mapped files stay.
        is_over: Asked before each piece; True ends it.
        advance_to: Told how many bytes are in the page cache so far.

    Raises:
        OSError: A file cannot be read.
    """
    if sys.platform == "win32":
        return 0
    wanted = list(paths)
    size = sum(os.stat(path).st_size for path in wanted)
    if size > _room(pids):
        return 0
    done, passed, buffer = 0, 0, bytearray(_PIECE)
    for path in wanted:
        with open(path, "rb", buffering=0) as file:
            for offset in range(0, os.fstat(file.fileno()).st_size, _PIECE):
                if is_over():
                    return done
                if not _is_cached(file.fileno(), offset):
                    done += os.preadv(file.fileno(), [buffer], offset)
                passed += _PIECE
                advance_to(min(passed, size))
    return done


def _room(pids: Iterable[int]) -> float:
    available = memory.available_bytes()
    if available is None:
        return 0.0
    return available * (1 - _MARGIN) - sum(map(_mapped_bytes, pids))


def _mapped_bytes(pid: int) -> int:
    """Return how much of its files a process has in memory."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssFile:"):
                return int(line.split()[1]) * 1024
    return 0


def _is_cached(fd: int, offset: int) -> bool:
    """Ask for a few pages of a piece without waiting for the disk."""
    if sys.platform != "linux":
        return False
    page = bytearray(_PAGE)
    try:
        for part in range(4):
            os.preadv(fd, [page], offset + part * (_PIECE // 4), os.RWF_NOWAIT)
    except OSError:  # it is not there, or this cannot be asked
        return False
    return True
