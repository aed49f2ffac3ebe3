"""What callers call the paths they have sent, and the names of our own folders.

Kept for whoever shows paths to strangers (`http.paths`); nothing here is shown.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

_MOST: Final = 128


class _Names:
    """Names of paths, the oldest forgotten first. For any thread."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()
        self.changes: int = 0

    def add(self, names: Mapping[str, str]) -> None:
        with self._lock:
            if all(self._names.get(path) == name for path, name in names.items()):
                return
            self.changes += 1
            for path, name in names.items():
                self._names[path] = name
                self._names.move_to_end(path)
            while len(self._names) > _MOST:
                self._names.popitem(last=False)

    def copy(self) -> dict[str, str]:
        with self._lock:
            return dict(self._names)


SENT: Final = _Names()
KEPT: Final = _Names()


def sent_as(path: str | os.PathLike[str], text: str) -> None:
    """A caller calls this path so; where it really leads, and what is beside it, is called alike.

    Looks at the disk.
    """
    beside = os.path.realpath(os.path.dirname(path) or os.curdir)
    names = {beside: os.path.dirname(text) or os.curdir, os.path.realpath(path): text}
    names |= {os.fspath(path): text} if os.path.isabs(path) else {}
    SENT.add(names)


def kept_in(path: str | os.PathLike[str], name: str) -> None:
    """This path is a place of ours, called so."""
    KEPT.add(dict.fromkeys((os.path.abspath(path), os.path.realpath(path)), name))
