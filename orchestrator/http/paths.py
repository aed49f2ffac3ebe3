"""Hide local paths in text that leaves over HTTP.

A path is shown as it was sent, or by the folder it is kept in. The Python API and the logs of this
process keep the truth.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from orchestrator.base.paths import KEPT, SENT
from orchestrator.models.hub import cache

_BEGINS: Final = re.compile(r"(?<![\w.~-])/")
_GOES_ON: Final = re.compile(r"[\w-]|\.\w")
_TEXTS: Final = frozenset(
    ("detail", "log_tail", "story", "argv", "running", "requested", "note", "lines")
)
"""Members that are read by people. Settings are not: they may be posted back."""


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
    changes = SENT.changes + KEPT.changes
    return _renaming_of(changes, os.path.expanduser("~"), str(cache.directory()))


@lru_cache(maxsize=4)
def _renaming_of(_: int, home: str, cache: str) -> Callable[[str], str]:
    """Longest first, so that what is inside of a place goes before the place; in one pass, so that
    a name is not renamed again. No pattern of all names: to compile one takes 10 ms and more.
    """
    names = SENT.copy() | KEPT.copy()
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
