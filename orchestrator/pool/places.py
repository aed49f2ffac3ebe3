"""Where a key stands in a TOML file: `tomllib` reports lines of syntax errors only.

The text is valid TOML, so only what separates keys from values is recognised here: headers, keys,
quotes, brackets, comments and the ends of lines. A key inside of a value, which an inline table is,
has the line of that value.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from orchestrator.base.paths import PathNames
from orchestrator.errors import InvalidCatalogue, Problem
from orchestrator.settings.checks import printable

KeyPath = tuple[str, ...]
"""The keys that lead to a value, from the outermost table."""

_STRINGS: Final = (
    r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}',
    r"'''(?:[^']|'{1,2}(?!'))*'{3,5}",
    r'"(?:[^"\\\n]|\\.)*"',
    r"'[^'\n]*+'",
)
_PART: Final = re.compile(rf"[ \t]*+([A-Za-z0-9_-]++|{_STRINGS[2]}|{_STRINGS[3]})[ \t]*+(\.?)")
_VALUE: Final = re.compile(
    rf"{'|'.join(_STRINGS)}|#[^\n]*+|(?P<opens>[\[{{])|(?P<closes>[\]}}])|(?P<ends>\n)|[^\"'#\[\]{{}}\n]++",
    re.DOTALL,
)
_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*+)*")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

_MAX_DEPTH: Final = 8


def lines_of(text: str) -> dict[KeyPath, int]:
    """Return the line of every key and table of a valid TOML text, from 1.

    A table that is only named on the way to another one has the line of the first that names it.
    What is deeper than any key of a catalogue is left out.
    """
    written: dict[KeyPath, int] = {}
    implied: dict[KeyPath, int] = {}
    line, counted = 1, 0
    for position, path in _keys(text):
        line, counted = line + text.count("\n", counted, position), position
        written.setdefault(path, line)
        for length in range(1, len(path)):
            implied.setdefault(path[:length], line)
    return implied | written


def dotted(path: KeyPath) -> str:
    """Return a path as TOML writes it, on one line and of bounded length."""
    parts = (key if _BARE.fullmatch(key) else json.dumps(printable(key)) for key in path)
    return ".".join(parts)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the values of a catalogue stand.

    Attributes:
        file: The file as it is shown; None for a mapping.
        lines: Lines by path; empty for a mapping.
        names: Public names of the file's path.
    """

    file: str | None = None
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False)
    names: PathNames = field(default=(), repr=False)

    def line(self, path: KeyPath) -> int | None:
        """Return the line of a value, or of the nearest table around it that has one."""
        lengths = range(len(path), 0, -1)
        return next((self.lines[path[:n]] for n in lengths if path[:n] in self.lines), None)

    def error(
        self, message: str, table: KeyPath = (), key: str | None = None, line: int | None = None
    ) -> InvalidCatalogue:
        """Return the error for a mistake in a table, at one of its keys if that is given."""
        path = table if key is None else (*table, key)
        line = line or self.line(path)
        parts = [] if self.file is None else [self.file if line is None else f"{self.file}:{line}"]
        text = ": ".join([*parts, *filter(None, [dotted(table)]), message])
        problem = Problem(InvalidCatalogue.category, text, dotted(path) or None, names=self.names)
        return InvalidCatalogue(problem)


def _keys(text: str) -> Iterator[tuple[int, KeyPath]]:
    """Yield the position and the path of every header and key."""
    table: KeyPath = ()
    position = _after_blank(text, 0)
    while position < len(text):
        start = position
        if text[position] == "[":
            opening = 2 if text.startswith("[[", position) else 1
            table, position = _path(text, position + opening)
            yield start, table
            position += opening  # the closing brackets
        else:
            path, position = _path(text, position)
            yield start, (*table, *path)[:_MAX_DEPTH]
            position = _after_value(text, position + 1)  # the equals sign
        position = _after_blank(text, position)


def _path(text: str, position: int) -> tuple[KeyPath, int]:
    """Return the dotted key at a position, and where it ends."""
    parts: list[str] = []
    while (found := _PART.match(text, position)) is not None:
        parts.append(_unquoted(found[1]))
        position = found.end()
        if not found[2]:
            break
    return tuple(parts[:_MAX_DEPTH]), position


def _unquoted(key: str) -> str:
    return str(tomllib.loads(f"key = {key}")["key"]) if key[0] in "\"'" else key


def _after_value(text: str, position: int) -> int:
    depth = 0
    while (found := _VALUE.match(text, position)) is not None:
        position = found.end()
        depth += (found["opens"] is not None) - (found["closes"] is not None)
        if found["ends"] is not None and depth == 0:
            break
    return position


def _after_blank(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return position if found is None else found.end()
