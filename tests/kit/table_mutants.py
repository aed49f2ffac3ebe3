"""The mutants of a transition table.

A mutant differs from the shipped table in one thing: a row, a guard or an action is missing, a
guard is negated, a destination is another, or two rows of one trigger are swapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

from orchestrator.machine.rows import Row

S = TypeVar("S", bound=StrEnum)
_NOT = "not "


@dataclass(frozen=True)
class Mutant(Generic[S]):
    """A table with one change.

    Attributes:
        name: Where and how it is changed; independent of the other rows.
        row: The index of the row.
        touches: The shipped rows whose steps may differ.
    """

    name: str
    row: int
    touches: frozenset[int]
    table: tuple[Row[S], ...]


class Death(NamedTuple):
    """What killed a mutant: `checker` or `scenario`, and which."""

    by: str
    how: str


def negated(table: Sequence[Row[S]], guards: ModuleType) -> dict[str, Callable[..., bool]]:
    """Return the negated guards of the mutants, by name."""

    def negation(name: str) -> Callable[..., bool]:
        guard = getattr(guards, name)
        return lambda ctx, fact: not guard(ctx, fact)

    return {_NOT + name: negation(name) for row in table for name in row.guards}


def name_of(row: Row[S], letters: Mapping[S, str]) -> str:
    """Return a unique name of a row that does not depend on the other rows."""
    sources = "".join(letters[source] for source in row.sources)
    return f"{row.trigger} in {sources}{' if ' if row.guards else ''}{' '.join(row.guards)}"


def mutants_of(
    table: Sequence[Row[S]], index: int, letters: Mapping[S, str]
) -> Iterator[Mutant[S]]:
    """Yield every mutant of one row; `letters` are those of all states that it may lead to."""
    row, name = table[index], name_of(table[index], letters)
    behind = frozenset(i for i in range(index, len(table)) if table[i].trigger == row.trigger)

    def mutant(what: str, *rows: Row[S], touches: frozenset[int] = frozenset({index})) -> Mutant[S]:
        changed = (*table[:index], *rows, *table[index + 1 :])
        return Mutant(f"{name}: {what}", index, touches, changed)

    yield mutant("deleted")
    for i, guard in enumerate(row.guards):
        before, after = row.guards[:i], row.guards[i + 1 :]
        without = replace(row, guards=(*before, *after))
        yield mutant(f"without {guard}", without, touches=behind)
        opposite = replace(row, guards=(*before, _NOT + guard, *after))
        yield mutant(f"not {guard}", opposite, touches=behind)
    for i, action in enumerate(row.actions):
        left = (*row.actions[:i], *row.actions[i + 1 :])
        yield mutant(f"without {action}", replace(row, actions=left))
    for dest in (None, *letters):
        if dest is not row.dest and row.sources != (dest,):  # from a state to itself is to stay
            yield mutant(f"to {dest or 'where it was'}", replace(row, dest=dest))
    if (below := _next_of_its_trigger(table, index)) is not None:
        swapped = list(table)
        swapped[index], swapped[below] = swapped[below], swapped[index]
        what = f"{name}: behind [{name_of(table[below], letters)}]"
        yield Mutant(what, index, behind, tuple(swapped))


def _next_of_its_trigger(table: Sequence[Row[S]], index: int) -> int | None:
    """Return the next row that may fire for the same fact in the same state."""
    row = table[index]
    for below in range(index + 1, len(table)):
        if table[below].trigger == row.trigger and set(table[below].sources) & set(row.sources):
            return below
    return None
