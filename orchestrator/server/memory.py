"""How much memory a server may use: what the machine has left, within the limits of cgroups(7)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_CGROUPS: Final = "sys/fs/cgroup"


class _Names(NamedTuple):
    limit: str
    use: str
    cache: str  # in memory.stat


_V1: Final = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
_V2: Final = _Names("memory.max", "memory.current", "file")


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory a new process could use; None if nothing is known.

    Args:
        root: Where `proc` and `sys` are mounted.
    """
    return total_and_available_bytes(root)[1]


def total_and_available_bytes(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Return the memory of this machine, or the least limit on it, and what is available of it;
    None for what is not known.
    """
    groups, machine = list(_groups(root)), _machine(root)
    totals = [limit for limit, _ in groups] + machine.get("MemTotal", [])
    available = [left for _, left in groups] + machine.get("MemAvailable", [])
    return min(totals, default=None), min(available, default=None)


def limits(root: Path = Path("/")) -> Iterator[int]:
    """Yield the limits in bytes of this process's control group and of those above it."""
    return (limit for limit, _ in _groups(root))


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit of each group, and what is left of it.

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
            top, names = root / _CGROUPS, _V2
        elif "memory" in controllers.split(","):
            top, names = root / _CGROUPS / "memory", _V1
        else:
            continue
        folder = top / path.lstrip("/")
        inside = [] if ".." in folder.parts else [folder, *folder.parents]
        for above in dict.fromkeys([top, *inside]):
            with contextlib.suppress(OSError, ValueError):  # it is not there, or "max"
                if above.is_relative_to(top):
                    limit = int((above / names.limit).read_text())
                    yield limit, max(0, limit - _kept(above, names))


def _kept(group: Path, names: _Names) -> int:
    """Return what a group uses, without the page cache, which makes room."""
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int((group / names.use).read_text()) - int(stat.get(names.cache, 0))
    return 0


def _machine(root: Path) -> dict[str, list[int]]:
    """Return the amounts in /proc/meminfo that are well-formed."""
    found: dict[str, list[int]] = {}
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            with contextlib.suppress(ValueError, IndexError):
                name, amount = line.split()[:2]
                found.setdefault(name.rstrip(":"), []).append(int(amount) * 1024)
    return found
