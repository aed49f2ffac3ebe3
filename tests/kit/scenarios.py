"""Tests that need nothing but a machine, as what kills the mutants of its table."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from tests.kit.table_mutants import Death, Mutant


class Scenario(NamedTuple):
    """A test that is ready to call, and the rows of the shipped table that fire in it."""

    name: str
    run: Callable[[], object]
    rows: frozenset[int]


def traced_scenarios(modules: tuple[ModuleType, ...], fired: set[int]) -> tuple[Scenario, ...]:
    """Run all scenarios once with the shipped table, which adds the rows that fire to `fired`."""
    found = []
    for name, run in scenarios(modules):
        fired.clear()
        run()
        found.append(Scenario(name, run, frozenset(fired)))
    return tuple(found)


def killed_by_scenario(mutant: Mutant[Any], known: Iterable[Scenario]) -> Death | None:
    """Return the first scenario that fails with a mutant, whose table is in use.

    One in which no row fires that the mutant touches goes as with the shipped table.
    """
    for name, run, rows in known:
        if rows & mutant.touches:
            try:
                run()
            except Exception:  # noqa: BLE001 (a mutant may raise anything)
                return Death("scenario", name)
    return None


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
