"""Answers that can be read by attribute or by name: `outcome.pid` and `outcome["pid"]` are equal.

The names are those of the HTTP bodies, so the same code reads both.
"""

from __future__ import annotations

from dataclasses import Field, fields
from enum import Enum
from typing import Any, ClassVar


class Record:
    """Read-only access to fields by name."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # for type checkers

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except (AttributeError, TypeError):
            raise KeyError(name) from None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, except those that `repr` hides."""
        return {f.name: _as_json(getattr(self, f.name)) for f in fields(self) if f.repr}


def _as_json(value: Any) -> Any:
    match value:
        case Record():
            return value.as_dict()
        case list() | tuple():
            return [_as_json(item) for item in value]
        case Enum():
            return value.value
        case _:
            return value
