"""Answers can be read by attribute or by name: `outcome.pid` and `outcome["pid"]` are the same.

The names are those of the HTTP bodies, so code moves between both without a second vocabulary.
"""

from __future__ import annotations

from typing import Any


class Record:
    """Read-only access to a record's fields by name."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except (AttributeError, TypeError):
            raise KeyError(name) from None
