"""What the paths of this machine are called where strangers read.

Over HTTP a path is shown as it was sent, or by the folder it is kept in: where links lead, where
this user lives and where this program keeps its things is nobody's business there. The Python API
and the logs of this process keep the truth.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from orchestrator import hub_cache

_MOST: Final = 128
_BEGINS: Final = re.compile(r"(?<![\w.~-])/")
_GOES_ON: Final = re.compile(r"[\w-]|\.\w")
_TEXTS: Final = frozenset(
    ("detail", "log_tail", "story", "argv", "running", "requested", "note", "lines")
)
"""Members that are read by people. Settings are not: they may be posted back."""


class _Names:
    """Names of paths, the oldest forgotten first. For any thread."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()
        self.changes = 0

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


_sent, _kept = _Names(), _Names()


def sent_as(path: str | os.PathLike[str], text: str) -> None:
    """A caller calls this path so; where it really leads, and what is beside it, is called alike.

    Looks at the disk.
    """
    beside = os.path.realpath(os.path.dirname(path) or os.curdir)
    names = {beside: os.path.dirname(text) or os.curdir, os.path.realpath(path): text}
    names |= {os.fspath(path): text} if os.path.isabs(path) else {}
    _sent.add(names)


def kept_in(path: str | os.PathLike[str], name: str) -> None:
    """This path is a place of ours, called so."""
    _kept.add(dict.fromkeys((os.path.abspath(path), os.path.realpath(path)), name))


def shown(text: str) -> str:
    """Return the text with every path that is known called by its name."""
    return _renaming()(text)


def shown_members(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an answer says, its texts as `shown`."""
    rename = _renaming()

    def say(value: Any, is_text: bool) -> Any:
        match value:
            case str() if is_text:
                return rename(value)
            case Mapping():
                return {
                    name: say(member, is_text or name in _TEXTS) for name, member in value.items()
                }
            case list() | tuple():
                return [say(member, is_text) for member in value]
            case _:
                return value

    return {name: say(member, name in _TEXTS) for name, member in answer.items()}


def _renaming() -> Callable[[str], str]:
    changes = _sent.changes + _kept.changes
    return _renaming_of(changes, os.path.expanduser("~"), str(hub_cache.directory()))


@lru_cache(maxsize=4)
def _renaming_of(_: int, home: str, cache: str) -> Callable[[str], str]:
    """Longest first, so that what is inside of a place goes before the place; in one pass, so that
    a name is not renamed again. No pattern of all names: to compile one takes 10 ms and more.
    """
    names = _sent.copy() | _kept.copy()
    for place, name in ((home, "~"), (cache, "<hub cache>")):
        names[place.rstrip("/")] = names[os.path.realpath(place)] = name
    known = tuple(sorted((path for path in names if len(path) > 1), key=len, reverse=True))

    def rename(text: str) -> str:
        said, done = [], 0
        for found in _BEGINS.finditer(text):
            at = found.start()
            if at < done or not text.startswith(known, at):
                continue
            for path in known:
                end = at + len(path)
                if text.startswith(path, at) and not _GOES_ON.match(text, end):
                    said += [text[done:at], names[path]]
                    done = end
                    break
        return "".join([*said, text[done:]])

    return rename
