"""Answers that can be read by attribute or by name: `outcome.pid` and `outcome["pid"]` are equal.

The names are those of the HTTP bodies, so the same code reads both, and an answer can be made from
such a body again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from enum import Enum
from functools import cache, partial
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

_T = TypeVar("_T")


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

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        """Return the record that `as_dict` made these members of; unknown ones are left out.

        Raises:
            TypeError, ValueError, LookupError: they are not of such a record.
        """
        return parsed(cls, members)


def parsed(kind: Callable[..., _T], members: Mapping[str, Any]) -> _T:
    """Return a record of `kind` with these members; see `Record.from_dict`."""
    wanted = _fields(kind)
    return kind(**{name: wanted[name](members[name]) for name in wanted if name in members})


@cache
def _fields(kind: Any) -> dict[str, Callable[[Any], Any]]:
    hints = get_type_hints(kind)
    return {f.name: _reader(hints[f.name]) for f in fields(kind) if f.repr}


def _reader(hint: Any) -> Callable[[Any], Any]:
    """Return what makes a value of this type from JSON, or raises."""
    hint = getattr(hint, "__supertype__", hint)
    origin, args = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return lambda value: value
    if origin in (Union, types.UnionType):
        return _one_of([_reader(arg) for arg in args])
    if origin is Literal:
        return _checked(lambda value: value in args)
    if origin in (list, tuple):
        item = _reader(args[0])
        return lambda value: origin(item(one) for one in _checked_list(value))
    if origin is dict:
        return _checked(lambda value: isinstance(value, dict))
    if issubclass(hint, Record):
        return lambda value: hint.from_dict(_checked_members(value))
    if issubclass(hint, Enum):
        return partial(hint)
    if hint is float:
        return lambda value: float(_checked_number(value))
    return _checked(lambda value: type(value) is hint)


def _one_of(readers: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        for reader in readers:
            try:
                return reader(value)
            except (TypeError, ValueError, LookupError):
                continue
        raise ValueError

    return read


def _checked(is_right: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not is_right(value):
            raise TypeError
        return value

    return read


_checked_list = _checked(lambda value: isinstance(value, list))
_checked_members = _checked(lambda value: isinstance(value, dict))
_checked_number = _checked(lambda value: type(value) in (int, float))


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
