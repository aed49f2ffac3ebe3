"""The shape of a transition table: rows over the states of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

S = TypeVar("S", bound=StrEnum)


@dataclass(frozen=True)  # with slots `Row[State](...)` raises TypeError
class Row(Generic[S]):
    """One line of a table; guards and actions are names. Without `dest` the state stays."""

    trigger: str
    sources: tuple[S, ...]
    guards: tuple[str, ...]
    dest: S | None
    actions: tuple[str, ...]


def row(
    trigger: str, sources: S | tuple[S, ...], guards: str, dest: S | None, actions: str
) -> Row[S]:
    """Return a row whose guards and actions are written as one text each."""
    sources = sources if isinstance(sources, tuple) else (sources,)
    return Row(trigger, sources, tuple(guards.split()), dest, tuple(actions.split()))
