"""The mutants of the pool's table, and what kills them.

A mutant is killed by a test of the pool (`test_requests.py` and others), called a scene here, or by
a counterexample of the checker, in a scenario in which some step of the mutant differs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Final
from unittest import mock

from orchestrator.pool import guards
from orchestrator.pool import step as pool_step
from orchestrator.pool.states import OF_ENTRIES, State
from orchestrator.pool.table import TABLE, Row
from tests.kit import table_mutants
from tests.kit.pool.checker import AnySet, Taken, TracedPool, explore
from tests.kit.pool.explorations import SCENARIOS, explored
from tests.kit.pool.world import Core, Key, canonical, fact_of
from tests.kit.scenarios import killed_by_scenario
from tests.kit.table_mutants import Death, Mutant, negated

_LETTERS: Final[dict[State, str]] = dict(zip(OF_ENTRIES, "ASRPX", strict=True))
_NEGATED: Final = negated(TABLE, guards)


def name_of(row: Row) -> str:
    """Return a unique name of a row that does not depend on the other rows."""
    return table_mutants.name_of(row, {**_LETTERS, State.POOL: "pool"})


def mutants_of(index: int) -> Iterator[Mutant[State]]:
    """Yield every mutant of one row."""
    letters: dict[State, str] = (
        {State.POOL: "pool"} if TABLE[index].sources == (State.POOL,) else _LETTERS
    )
    return table_mutants.mutants_of(TABLE, index, letters)


def kill_by_scene(mutant: Mutant[State], modules: tuple[ModuleType, ...]) -> Death | None:
    """Return the first test of these modules that kills a mutant, or None."""
    return killed_by_scenario(mutant, _machine(mutant), modules, _using, TracedPool)


def _using(machine: TracedPool) -> AbstractContextManager[object]:
    return mock.patch.object(pool_step, "pool_machine", return_value=machine)


def kill_by_checker(mutant: Mutant[State], most: int | None = None) -> Death | None:
    """Return the invariant that kills a mutant, or None.

    Args:
        most: How many scenarios in which it differs are explored, smallest first; None: all.
    """
    return _killed_by_checker(mutant, _machine(mutant), most)


def _machine(mutant: Mutant[State]) -> TracedPool:
    return TracedPool(mutant.table, pool_step, **_NEGATED)


def _killed_by_checker(
    mutant: Mutant[State], machine: TracedPool, most: int | None
) -> Death | None:
    tried = 0
    for name in _by_size():
        if tried == most:
            break
        if not _differs(mutant, machine, name):
            continue
        tried += 1
        bound = 3 * explored(name).worlds + 1000
        try:
            report = explore(SCENARIOS[name], name=name, machine=machine, max_worlds=bound)
        except MemoryError:
            return Death("checker", f"too many worlds in {name}")
        if report.violation is not None:
            return Death("checker", report.violation.invariant)
    return None


def _differs(mutant: Mutant[State], machine: TracedPool, name: str) -> bool:
    """Whether some step of a scenario is another one for the mutant."""
    any_set, by_row = AnySet(), _steps(name)
    with mock.patch.object(pool_step, "cheapest", any_set):
        for row in mutant.touches:
            for core, key, any_set.pick, taken in by_row.get(row, ()):
                try:
                    stepped = machine.step(core.ctx, fact_of(SCENARIOS[name], key))
                except Exception:  # noqa: BLE001 (a mutant may raise anything)
                    return True
                if (canonical(stepped.ctx), stepped.commands) != (taken.core.ctx, taken.commands):
                    return True
    return False


@cache
def _steps(name: str) -> dict[int, list[tuple[Core, Key, int, Taken]]]:
    """Return the steps of a scenario by the row that fires."""
    found: dict[int, list[tuple[Core, Key, int, Taken]]] = defaultdict(list)
    for (core, key), steps in explored(name).steps.items():
        for pick, taken in enumerate(steps):
            found[taken.row].append((core, key, pick, taken))
    return found


@cache
def _by_size() -> Sequence[str]:
    return sorted(SCENARIOS, key=lambda name: explored(name).worlds)
