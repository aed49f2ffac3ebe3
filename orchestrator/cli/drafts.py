"""A catalogue that is written for somebody to edit: commented TOML, with names that can be used."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from orchestrator.base.log import escaped
from orchestrator.cli.output import Failure
from orchestrator.pool.places import KeyPath, dotted

_UNUSABLE: Final = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST: Final = 64
_POOL: Final = {
    "memory": '"12 GiB"    # what models may take in all; default: what is free at the start',
    "default": '"NAME"     # the model for requests that name none',
    "preload": '["NAME"]   # loaded at the start',
}


@dataclass(frozen=True, slots=True)
class Draft:
    """One table of `[models]`.

    Attributes:
        members: Its keys; a value that is a mapping becomes a table of its own.
        comments: Lines above its keys.
    """

    name: str
    members: dict[str, Any]
    comments: list[str] = field(default_factory=list)


def unique_name(wanted: str, taken: Collection[str]) -> str:
    """Return the nearest name that an entry may have and that is not taken."""
    name = _UNUSABLE.sub("-", wanted).lstrip("._-")[:_LONGEST].rstrip("._-") or "model"
    made, number = name, 1
    while made in taken:
        number += 1
        made = f"{name[: _LONGEST - len(str(number)) - 1]}-{number}"
    return made


def toml_text(
    drafts: Collection[Draft],
    remarks: Collection[str] = (),
    pool: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Return the text of a catalogue.

    Args:
        remarks: Lines above everything.
        pool: The keys of `[pool]`.
    """
    lines = [
        "# The models of a pool; docs/catalogue.md lists every key.",
        "# `llama-orchestrator models check` checks this file, `serve --models` serves it.",
        *map(_comment, remarks),
        "",
        *_table(("pool",), pool, ()),
        *(f"# {key} = {hint}" for key, hint in _POOL.items() if key not in pool),
    ]
    for draft in drafts:
        lines += ["", *_table(("models", draft.name), draft.members, draft.comments)]
    return "\n".join(lines) + "\n"


def write_draft(file: Path, text: str, *, is_forced: bool) -> None:
    """Write a file that must not exist, unless it is forced.

    Raises:
        Failure: it exists, or cannot be written.
    """
    try:
        with file.open("w" if is_forced else "x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise exists(file) from error
    except OSError as error:
        detail = f"{file} cannot be written ({error.strerror}): give another file"
        title = "File cannot be written"
        raise Failure({"category": "unwritable", "title": title, "detail": detail}) from error


def exists(file: Path) -> Failure:
    detail = f"{file} exists: give another file, or --force to overwrite it"
    return Failure({"category": "file_exists", "title": "File exists", "detail": detail})


def _table(path: KeyPath, members: Mapping[str, Any], comments: Collection[str]) -> Iterator[str]:
    yield f"[{dotted(path)}]"
    yield from map(_comment, comments)
    for key, value in members.items():
        if not isinstance(value, Mapping):
            yield f"{dotted((key,))} = {_value(value)}"
    for key, value in members.items():
        if isinstance(value, Mapping) and key == "presets":
            for name, preset in value.items():
                yield from _table((*path, key, name), preset, ())
        elif isinstance(value, Mapping):
            yield from _table((*path, key), value, ())


def _comment(text: str) -> str:
    return f"# {escaped(text)}"


def _value(value: Any) -> str:
    """Return a value of JSON as TOML: a string differs by one character, a table by its keys."""
    if isinstance(value, Mapping):
        pairs = (f"{dotted((key,))} = {_value(one)}" for key, one in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
