"""Hide local paths in text that leaves over HTTP.

A path is shown as it was sent, or by the folder it is kept in, as far as this orchestrator knows
it. The Python API and the logs of this process keep the truth.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Final

from orchestrator.base.paths import PathNames
from orchestrator.models.hub import cache

_BEGINS: Final = re.compile(r"(?<![\w.~-])/")
_GOES_ON: Final = re.compile(r"[\w-]|\.\w")
_TEXTS: Final = frozenset(
    ("detail", "log_tail", "story", "argv", "running", "requested", "note", "lines")
)
"""Members that are read by people. Settings are not: they may be posted back."""


class Renamed:
    """Texts with every path that is known called by its name."""

    def __init__(self, names: Iterable[PathNames]) -> None:
        self._named: dict[str, str] = {path: name for some in names for path, name in some}

    @cached_property
    def _known(self) -> tuple[str, ...]:
        """Longest first, so that what is inside of a place goes before the place."""
        return tuple(sorted((path for path in self._named if len(path) > 1), key=len, reverse=True))

    def text(self, text: str) -> str:
        """Rename in one pass, so that a name is not renamed again. There is no pattern of all
        names: to compile one takes 10 ms and more.
        """
        said, done = [], 0
        for found in _BEGINS.finditer(text):
            at = found.start()
            if at < done or not text.startswith(self._known, at):
                continue
            for path in self._known:
                end = at + len(path)
                if text.startswith(path, at) and not _GOES_ON.match(text, end):
                    said += [text[done:at], self._named[path]]
                    done = end
                    break
        return "".join([*said, text[done:]])

    def members(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an answer says, its texts renamed."""

        def say(value: Any, is_text: bool) -> Any:
            match value:
                case str() if is_text:
                    return self.text(value)
                case Mapping():
                    return {
                        name: say(member, is_text or name in _TEXTS)
                        for name, member in value.items()
                    }
                case list() | tuple():
                    return [say(member, is_text) for member in value]
                case _:
                    return value

        return {name: say(member, name in _TEXTS) for name, member in answer.items()}


class Paths:
    """What one orchestrator's texts are shown as.

    Args:
        known: Returns the names it knows now; the same tuple as long as these are the same.
    """

    def __init__(self, known: Callable[[], tuple[PathNames, ...]]) -> None:
        self._known = known
        self._last: tuple[tuple[PathNames, ...], tuple[str, str], Renamed] | None = None

    def now(self, *more: PathNames) -> Renamed:
        """Return how texts are shown now.

        Args:
            more: Names that go with the answer itself.
        """
        known, places = self._known(), (os.path.expanduser("~"), str(cache.directory()))
        if more and any(more):
            return Renamed((*known, *more, *_places(*places)))
        if self._last is None or self._last[0] is not known or self._last[1] != places:
            self._last = known, places, Renamed((*known, *_places(*places)))
        return self._last[2]


def _places(home: str, hub: str) -> tuple[PathNames, ...]:
    return tuple(
        ((place.rstrip("/"), name), (os.path.realpath(place), name))
        for place, name in ((home, "~"), (hub, "<hub cache>"))
    )
