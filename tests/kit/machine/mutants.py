"""The mutants of the table, and what kills them.

It is killed by a counterexample of the checker (a broken invariant, a fact without a row, an error
in an action) or by a test of the machine (`test_machine.py` and others), called a scenario here.

The checker explores only programs in which some step of the mutant differs from the shipped table.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from operator import itemgetter
from types import ModuleType
from typing import Any
from unittest import mock

from orchestrator.machine import guards, step
from orchestrator.machine.states import State
from orchestrator.machine.step import Lifecycle
from orchestrator.machine.table import TABLE, Row
from tests.kit import table_mutants
from tests.kit.machine.checker import Taken, TracedLifecycle, explore
from tests.kit.machine.explorations import PROGRAMS, explored
from tests.kit.machine.programs import parse
from tests.kit.machine.world import World
from tests.kit.table_mutants import Death, Mutant, negated

_FEW = 8
_LETTERS = {
    State.IDLE: "I",
    State.KILLING: "K",
    State.DOWNLOADING: "D",
    State.SPAWNING: "S",
    State.WAITING_HEALTH: "W",
    State.HEALTHY: "H",
}


_NEGATED = negated(TABLE, guards)


def lifecycle_of(mutant: Mutant[State]) -> Lifecycle:
    return TracedLifecycle(mutant.table, **_NEGATED)


def name_of(row: Row) -> str:
    """Return a unique name of a row that does not depend on the other rows."""
    return table_mutants.name_of(row, _LETTERS)


def mutants_of(index: int) -> Iterator[Mutant[State]]:
    """Yield every mutant of one row."""
    return table_mutants.mutants_of(TABLE, index, _LETTERS)


# -------------------------------------------------------------------------------------- killing


def kill(
    mutant: Mutant[State], modules: tuple[ModuleType, ...], *, is_thorough: bool
) -> Death | None:
    """Return what kills a mutant, or None.

    Args:
        modules: Test modules whose plain tests are run as scenarios.
        is_thorough: Explore every program in which it differs, not only a few small ones.
    """
    small, large = _size_order()
    death = _killed_by_checker(mutant, small, most=None if is_thorough else _FEW)
    death = death or _killed_by_scenario(mutant, modules)
    if death is None and is_thorough:
        death = _killed_by_checker(mutant, large, most=None)
    return death


def _killed_by_checker(
    mutant: Mutant[State], programs: Sequence[str], most: int | None
) -> Death | None:
    """Explore from the first step that differs; what leads to it is as in the shipped table."""
    lifecycle, tried = lifecycle_of(mutant), 0
    for program in programs:
        start = _first_difference(lifecycle, mutant, program)
        if start is None:
            continue
        bound = 3 * explored(program).worlds + 1000
        try:
            report = explore(
                program, lifecycle=lifecycle, start=start, max_worlds=bound, **PROGRAMS[program]
            )
        except MemoryError:
            return Death("checker", f"too many worlds in {program}")
        if report.counterexample is not None:
            return Death("checker", report.counterexample.invariant)
        tried += 1
        if tried == most:
            break
    return None


def _first_difference(lifecycle: Lifecycle, mutant: Mutant[State], program: str) -> World | None:
    """Return the world in which the first step of a program differs."""
    by_row = _steps(program)
    steps = heapq.merge(*(by_row.get(row, ()) for row in mutant.touches), key=itemgetter(0))
    for _, taken in steps:
        try:
            state, ctx, commands = lifecycle.step(taken.core.state, taken.core.ctx, taken.fact)
        except Exception:  # noqa: BLE001 (a mutant may raise anything)
            return taken.world
        ctx = replace(ctx, last_error=None, last_exit=None)
        if (state, ctx, commands) != (taken.after.state, taken.after.ctx, taken.commands):
            return taken.world
    return None


@cache
def _steps(program: str) -> dict[int, list[tuple[int, Taken]]]:
    """Return the numbered steps of a program by the row that fires."""
    found: dict[int, list[tuple[int, Taken]]] = defaultdict(list)
    for at, taken in enumerate(explored(program).steps):
        found[taken.row].append((at, taken))
    return found


@cache
def _size_order() -> tuple[list[str], list[str]]:
    """Return the programs with few calls and the others, each smallest first."""

    def size(program: str) -> tuple[int, int]:
        clients = parse(program)
        return sum(map(len, clients)), len(clients)

    ordered = sorted(PROGRAMS, key=size)
    return [p for p in ordered if size(p)[0] <= 3], [p for p in ordered if size(p)[0] > 3]


# ------------------------------------------------------------------------------------ scenarios


def _killed_by_scenario(mutant: Mutant[State], modules: tuple[ModuleType, ...]) -> Death | None:
    lifecycle = lifecycle_of(mutant)
    with mock.patch.object(step, "lifecycle", return_value=lifecycle):
        for name, scenario in scenarios(modules):
            try:
                scenario()
            except Exception:  # noqa: BLE001 (a mutant may raise anything)
                return Death("scenario", name)
    return None


@cache
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
