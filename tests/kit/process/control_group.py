"""A memory control group of a test's own, of either version of cgroups(7)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.kit.process.support import until

_TOP: Final = Path("/sys/fs/cgroup")
_LIMITS: Final = {1: "memory.limit_in_bytes", 2: "memory.max"}
_KILLS: Final = {1: "memory.oom_control", 2: "memory.events"}
_PEAKS: Final = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """The group; a process joins it by writing its pid into `procs`."""

    folder: Path
    version: int

    @property
    def procs(self) -> Path:
        return self.folder / "cgroup.procs"

    @property
    def oom_kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        lines = (self.folder / _KILLS[self.version]).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    @property
    def peak_bytes(self) -> int | None:
        """The most that was ever used, page cache included; None before Linux 5.19 or so."""
        with contextlib.suppress(OSError):
            return int((self.folder / _PEAKS[self.version]).read_text())
        return None


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group with this limit below our own; skips the test where that is not allowed."""
    try:
        group = _made(limit_bytes)
    except OSError as error:
        pytest.skip(f"NO WRITABLE MEMORY CONTROL GROUP, so this is not tested: {error}")
    try:
        yield group
    finally:
        until(lambda: _is_removed(group.folder), "the end of the group's processes")


def _made(limit_bytes: int) -> MemoryGroup:
    """Raises OSError."""
    for version, parent in _parents():
        if version == 2:
            (parent / "cgroup.subtree_control").write_text("+memory")
        folder = parent / f"llama-test-{os.getpid()}"
        folder.mkdir()
        try:
            (folder / _LIMITS[version]).write_text(str(limit_bytes))
            with contextlib.suppress(OSError):  # there is none where swap is not accounted
                swap = "memory.memsw.limit_in_bytes" if version == 1 else "memory.swap.max"
                (folder / swap).write_text(str(limit_bytes if version == 1 else 0))
        except OSError:
            folder.rmdir()
            raise
        return MemoryGroup(folder, version)
    raise OSError("none is mounted")


def _parents() -> Iterator[tuple[int, Path]]:
    """Yield our own memory group, or the top of what can be seen of them."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version, top = 1, _TOP / "memory"
        elif not controllers and "memory" in _read(_TOP / "cgroup.controllers").split():
            version, top = 2, _TOP
        else:
            continue
        own = top / path.lstrip("/")
        yield version, own if own.is_dir() else top


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def _is_removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()
