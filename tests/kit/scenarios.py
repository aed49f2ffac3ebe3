"""Tests that need nothing but a machine, as what kills the mutants of its table."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from tests.kit.table_mutants import Death, Mutant


class Scenario(NamedTuple):
    """A test that is ready to call, and the rows of the shipped table that fire in it."""

    name: str
    run: Callable[[], object]
    rows: frozenset[int]


class Traced(Protocol):
    """A machine that keeps the indexes of the rows that have fired."""

    have_fired: set[int]


def killed_by_scenario(
    mutant: Mutant[Any],
    machine: object,
    modules: tuple[ModuleType, ...],
    using: Callable[[Any], AbstractContextManager[object]],
    shipped: Callable[[], Traced],
) -> Death | None:
    """Return the first scenario that fails with a mutant.

    One in which no row fires that the mutant touches goes as with the shipped table.

    Args:
        machine: One with the table of the mutant.
        using: Has the scenarios run on a machine.
        shipped: Makes one with the shipped table.
    """
    known = _traced(modules, using, shipped)
    with using(machine):
        for name, run, rows in known:
            if rows & mutant.touches:
                try:
                    run()
                except Exception:  # noqa: BLE001 (a mutant may raise anything)
                    return Death("scenario", name)
    return None


@cache
def _traced(
    modules: tuple[ModuleType, ...],
    using: Callable[[Any], AbstractContextManager[object]],
    shipped: Callable[[], Traced],
) -> tuple[Scenario, ...]:
    """Run all scenarios once with the shipped table."""
    machine, found = shipped(), []
    with using(machine):
        for name, run in scenarios(modules):
            machine.have_fired.clear()
            run()
            found.append(Scenario(name, run, frozenset(machine.have_fired)))
    return tuple(found)


def scenarios(modules: tuple[ModuleType, ...]) -> tuple[tuple[str, Callable[[], object]], ...]:
    """Return every test of those modules without fixtures and random values, ready to call."""
    return tuple(
        (name, case)
        for module in modules
        for name, test in vars(module).items()
        if name.startswith("test_") and inspect.isfunction(test) and _is_of(module, test)
        for case in _cases(test)
    )


def _is_of(module: ModuleType, test: Callable[..., object]) -> bool:
    return test.__module__ == module.__name__ and not hasattr(test, "hypothesis")


def _cases(test: Callable[..., object]) -> Iterator[Callable[[], object]]:
    """Yield one call for each combination of parameters."""
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    choices: list[list[dict[str, Any]]] = []
    for mark in marks:
        names, values = mark.args
        names = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
        choices.append([dict(zip(names, _values(v, len(names)), strict=True)) for v in values])
    for combination in itertools.product(*choices):
        arguments = {name: value for some in combination for name, value in some.items()}
        assert set(arguments) == set(inspect.signature(test).parameters), test
        yield partial(test, **arguments)


def _values(given: Any, count: int) -> Sequence[Any]:
    given = getattr(given, "values", given) if not isinstance(given, dict) else given
    return [given] if count == 1 else given
