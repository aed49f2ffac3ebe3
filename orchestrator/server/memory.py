"""How much memory a server may use: what the machine has left, within the limits of cgroups(7)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_CGROUPS: Final = "sys/fs/cgroup"


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory a new process could use; None if nothing is known.

    Args:
        root: Where `proc` and `sys` are mounted.
    """
    known = [*_free(root), *limits(root)]
    return min(known) if known else None


def limits(root: Path = Path("/")) -> Iterator[int]:
    """Yield the limits in bytes of this process's control group and of those above it.

    In a container that hides the groups above, its own is mounted at the top, and the rest of the
    path is not there.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = (*group.split(":", 2), "", "")[:3]
        if not controllers:
            top, name = root / _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top / path.lstrip("/")
        inside = [] if ".." in folder.parts else [folder, *folder.parents]
        for above in dict.fromkeys([top, *inside]):
            with contextlib.suppress(OSError, ValueError):  # it is not there, or "max"
                if above.is_relative_to(top):
                    yield int((above / name).read_text())


def _free(root: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
