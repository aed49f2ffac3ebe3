"""The mutants of the table, and what kills them.

It is killed by a test of the machine (`test_machine.py` and others), called a scenario here, or by
a counterexample of the checker (a broken invariant, a fact without a row, an error in an action).

The checker explores only programs in which some step of the mutant differs from the shipped table.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from operator import itemgetter
from types import ModuleType
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
from tests.kit.scenarios import killed_by_scenario
from tests.kit.table_mutants import Death, Mutant, negated

_FEW = 8  # programs in which a mutant differs
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
        is_thorough: Explore every program in which it differs, not only the quick ones.
    """
    death = _killed_by_scenario(mutant, modules)
    if death is None and is_thorough:
        return _killed_by_checker(mutant, _by_size(), most=None)
    return death or _killed_by_checker(mutant, _quick(), most=_FEW)


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


def _calls(program: str) -> tuple[int, int]:
    clients = parse(program)
    return sum(map(len, clients)), len(clients)


@cache
def _by_size() -> list[str]:
    """Return the programs, those with few calls first."""
    return sorted(PROGRAMS, key=_calls)


@cache
def _quick() -> list[str]:
    """Return the programs that are explored in a second or two."""
    return [p for p in _by_size() if _calls(p)[0] <= 2 and "restore" not in p]


def _killed_by_scenario(mutant: Mutant[State], modules: tuple[ModuleType, ...]) -> Death | None:
    return killed_by_scenario(mutant, lifecycle_of(mutant), modules, _using, TracedLifecycle)


def _using(lifecycle: Lifecycle) -> AbstractContextManager[object]:
    return mock.patch.object(step, "lifecycle", return_value=lifecycle)
