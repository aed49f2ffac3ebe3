"""The flags of a llama-server, read from its own `--help`.

Text that does not look like help gives None, which disables nothing. A flag that is only listed as
removed is known, and not supported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

_COLUMN: Final = 40
_FLAG: Final = re.compile(r"\s*(--?[A-Za-z0-9][\w.-]*)(,?)")
_ALLOWED: Final = re.compile(r"allowed values: ([^()]*)")
_CHOICE: Final = re.compile(r"[a-z][a-z0-9_+-]*|[0-9]")  # no `dev1,dev2,..`, no `N0,N1`
_REMOVED: Final = "the argument has been removed"


@dataclass(frozen=True, slots=True)
class FlagHelp:
    """One entry of the help.

    Attributes:
        names: Every spelling, as listed.
        placeholder: What stands for its values, such as `N`, `START END` or `[on|off|auto]`; empty
            where it takes none.
        choices: The values it lists, if any.
        is_removed: Listed as removed; using it aborts the start.
    """

    names: tuple[str, ...]
    placeholder: str = ""
    choices: tuple[str, ...] = ()
    is_removed: bool = False

    @property
    def value_count(self) -> int:
        """How many values follow it."""
        words = self.placeholder.split()
        return len(words) if all(map(str.isupper, words)) else 1


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every flag of one binary.

    Attributes:
        accepted: The entries by spelling, without flags that are listed as removed anywhere.
    """

    flags: tuple[FlagHelp, ...]
    accepted: dict[str, FlagHelp] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        removed = {name for flag in self.flags if flag.is_removed for name in flag.names}
        entries = {name: flag for flag in reversed(self.flags) for name in flag.names}
        accepted = {name: flag for name, flag in entries.items() if name not in removed}
        object.__setattr__(self, "accepted", accepted)

    def get(self, name: str) -> FlagHelp | None:
        """Return the entry of a flag in any of its spellings."""
        return next((flag for flag in self.flags if name in flag.names), None)

    def has(self, *names: str) -> bool:
        """Return whether all of these are listed, and none of them as removed."""
        return self.accepted.keys() >= set(names)


def parse_help(text: str) -> Catalogue | None:
    """Return the flags of a `--help`, or None where the text does not look like one."""
    entries: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("-"):
            entries.append((line, []))
        elif entries and line.startswith(" "):
            entries[-1][1].append(line.strip())
    flags = tuple(flag for line, about in entries if (flag := _entry(line, about)))
    return Catalogue(flags) if any("--model" in flag.names for flag in flags) else None


def _entry(line: str, more_lines: list[str]) -> FlagHelp | None:
    """Parse one entry; its description begins in a fixed column, or on the next line."""
    names: list[str] = []
    at, more = 0, True
    while more and (found := _FLAG.match(line, at)):
        names.append(found.group(1))
        at, more = found.end(), bool(found.group(2))
    if not names:
        return None
    is_on_this_line = at < _COLUMN and line[_COLUMN - 1 : _COLUMN] == " "
    end = _COLUMN if is_on_this_line else len(line)
    hint = line[at:end].strip()
    about = " ".join(" ".join([line[end:], *more_lines]).split())
    return FlagHelp(tuple(names), hint, _choices(hint, about), _REMOVED in about)


def _choices(hint: str, about: str) -> tuple[str, ...]:
    if allowed := _ALLOWED.search(about):
        return tuple(value.strip() for value in allowed.group(1).split(",") if value.strip())
    bare = hint.strip("[]{}<>")
    separator = "|" if "|" in bare else ","
    found = bare.split(separator)
    return tuple(found) if len(found) > 1 and all(map(_CHOICE.fullmatch, found)) else ()
