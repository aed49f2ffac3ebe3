"""What of a file is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def make_cold(path: Path | str) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def in_memory(path: Path | str) -> float:
    """Return which part of a file is in the page cache, as mincore(2) says."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = os.path.getsize(path)
    pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        found = (ctypes.c_ubyte * pages)()
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
        return sum(byte & 1 for byte in found) / pages
