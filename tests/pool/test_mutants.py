"""Layer C: every change of the pool's table breaks a test, and an invariant, or is listed here.

`pytest -s` prints which invariants killed the mutants of each row.
"""

from __future__ import annotations

from collections import Counter

import pytest

from orchestrator.pool.table import TABLE
from tests.kit.pool.mutants import kill_by_checker, kill_by_scene, mutants_of, name_of
from tests.kit.scenarios import scenarios
from tests.pool import test_by_hand, test_eviction, test_memory, test_reports, test_requests

SCENES = (test_requests, test_eviction, test_memory, test_by_hand, test_reports)
_FORGOTTEN = "the entry is forgotten in this step, so it has no state"
_SAME = "both rows have the same actions"
SURVIVORS: dict[str, str] = {
    "wanted in ASRPX if is_unknown: behind [wanted in R if has_entered]": (
        "a removed entry is never Resident"
    ),
    "cancel in ASRPX if is_unknown: behind [cancel in S]": "a removed entry is never Starting",
    "preload in ASRPX if is_shutting_down: behind [preload in ASRPX if is_unknown]": _SAME,
    "adopted in ASRPX if is_unknown: behind [adopted in ASRPX if is_shutting_down]": _SAME,
    "removed in A: to Starting": _FORGOTTEN,
    "removed in A: to Resident": _FORGOTTEN,
    "removed in A: to Stopping": _FORGOTTEN,
    "removed in A: to Stuck": _FORGOTTEN,
    "emptied in RPX if is_current is_removed: to where it was": _FORGOTTEN,
    "emptied in RPX if is_current is_removed: to Starting": _FORGOTTEN,
    "emptied in RPX if is_current is_removed: to Resident": _FORGOTTEN,
    "emptied in RPX if is_current is_removed: to Stopping": _FORGOTTEN,
    "emptied in RPX if is_current is_removed: to Stuck": _FORGOTTEN,
}
"""Mutants that behave like the shipped table, each with the reason."""


def test_every_mutant_is_killed_by_a_scene_or_listed() -> None:
    """A row that may be changed unnoticed is a row whose purpose no test knows."""
    survivors = {
        mutant.name
        for index in range(len(TABLE))
        for mutant in mutants_of(index)
        if kill_by_scene(mutant, SCENES) is None
    }
    assert survivors - SURVIVORS.keys() == set(), "survived"
    assert SURVIVORS.keys() - survivors == set(), "listed as equivalent, but killed"


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("index", range(len(TABLE)), ids=lambda index: name_of(TABLE[index]))
def test_checker_kills_no_listed_survivor(index: int) -> None:
    """A survivor's reason is only a sentence; here every scenario is tried.

    What is printed as None is killed by a scene only: no invariant says what the scene asserts.
    """
    deaths = {mutant.name: kill_by_checker(mutant) for mutant in mutants_of(index)}
    print(f"\n{len(deaths)}:", *Counter(death and death.how for death in deaths.values()).items())
    killed = {name for name, death in deaths.items() if death is not None}
    assert killed & SURVIVORS.keys() == set(), "listed as equivalent, but killed"
    assert killed or deaths.keys() <= SURVIVORS.keys(), "the checker sees nothing of this row"


def test_every_listed_survivor_is_a_mutant() -> None:
    """The list must not outlive the table."""
    names = [mutant.name for index in range(len(TABLE)) for mutant in mutants_of(index)]
    assert len(set(names)) == len(names) > 400
    assert SURVIVORS.keys() <= set(names)


def test_scenes_pass_with_the_shipped_table() -> None:
    """A scene that always fails would kill every mutant."""
    assert len(scenarios(SCENES)) > 90
    for _, scene in scenarios(SCENES):
        scene()
