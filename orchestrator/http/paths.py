"""Hide local paths in text that leaves over HTTP.

A path is replaced by what the caller sent, or named by the folder that holds it, as far as the
orchestrator knows it. The Python API and the logs of this process keep the real paths.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from starlette.types import Scope

from orchestrator.base import paths
from orchestrator.base.paths import PathNames
from orchestrator.errors import CacheDirError
from orchestrator.models.hub import cache

_START: Final = re.compile(r"(?<![\w.~-])/")
_CONTINUES: Final = re.compile(r"[\w-]|\.\w")
_MOST_LINES: Final = 4000
_TEXTS: Final = frozenset(
    ("detail", "log_tail", "story", "argv", "running", "requested", "note", "lines")
)
"""Members that people read. Settings are left alone, because they may be posted back."""


class PathRenamer:
    """Replaces paths in texts by their names."""

    def __init__(self, names: Iterable[PathNames]) -> None:
        named = {path: name for some in names for path, name in some if len(path) > 1}
        # longest first: what is in a folder goes before the folder
        self._names = sorted(named.items(), key=lambda item: len(item[0]), reverse=True)
        self._paths = tuple(path for path, _ in self._names)
        self._lines: dict[str, str] = {}

    def text(self, text: str) -> str:
        """Replace every path in one pass, so that a name is not replaced again.

        One pattern of all paths would be simpler, but takes 10 ms and more to compile.
        """
        parts, done = [], 0
        for found in _START.finditer(text):
            start = found.start()
            if start < done or not text.startswith(self._paths, start):
                continue
            for path, name in self._names:
                end = start + len(path)
                if text.startswith(path, start) and not _CONTINUES.match(text, end):
                    parts += [text[done:start], name]
                    done = end
                    break
        return "".join([*parts, text[done:]])

    def line(self, line: str) -> str:
        """Return `text` of a line of output, made once for all who follow it."""
        found = self._lines.get(line)
        if found is None:
            if len(self._lines) >= _MOST_LINES:
                self._lines.clear()
            found = self._lines[line] = self.text(line)
        return found

    def members(self, answer: Any, is_text: bool = False) -> Any:
        """Return an answer with the paths in its texts replaced."""
        match answer:
            case str() if is_text:
                return self.text(answer)
            case Mapping():
                return {
                    name: self.members(member, is_text or name in _TEXTS)
                    for name, member in answer.items()
                }
            case list() | tuple():
                return [self.members(member, is_text) for member in answer]
            case _:
                return answer


def own_folders() -> tuple[tuple[str, str], ...]:
    """Return this user's home and Hub cache where there are any, and their names."""
    home = paths.home()
    named = () if home is None else ((home, "~"),)
    with contextlib.suppress(CacheDirError):
        return *named, (str(cache.directory()), "<hub cache>")
    return named


def names_of(folders: Iterable[tuple[str, str]]) -> Iterator[PathNames]:
    """Yield the names of folders, also where they are links."""
    for folder, name in folders:
        yield (folder.rstrip("/"), name), (paths.real(folder), name)


def own_path(scope: Scope) -> str:
    """Return the path of a request below the path that the app is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
