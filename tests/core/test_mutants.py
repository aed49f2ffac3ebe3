"""Layer C: whatever is changed in the table, something objects; or the reason why nothing can.

`pytest -s` prints what killed the mutants of each row.
"""

from __future__ import annotations

from collections import Counter

import pytest

from orchestrator.machine.table import TABLE
from tests.core import test_idle, test_machine, test_recovery, test_told, test_waiting
from tests.kit.machine.mutants import kill, mutants_of, name_of, scenarios

SCENARIOS = (test_machine, test_recovery, test_idle, test_told, test_waiting)
_LEASE_OR_LOAD = "a ticket is that of a load or of a lease, never of both"
_JOB_OR_QUEUED = "a generation is in flight or in the queue, never both"
_LOOKS_FOR_ITSELF = (
    "kill_when_drained looks for itself: with leases left it does nothing, and without any the "
    "kill is in flight"
)
_LOAD_OR_PREFETCH = "a load and a prefetch never have the same generation"
_JOB_OR_BESIDE = "what is fetched beside the state is not what is in flight"
SURVIVORS: dict[str, str] = {
    "load in IKDSWH if too_many_prefetch: behind [load in IKDSWH if too_many_wait]": (
        "both rows say the same"
    ),
    "fetched in IKDSWH if is_awaited: behind [fetched in IKDSWH if is_prefetch]": (
        _LOAD_OR_PREFETCH
    ),
    "fetch_failed in IKDSWH if is_awaited: behind [fetch_failed in IKDSWH if is_prefetch]": (
        _LOAD_OR_PREFETCH
    ),
    "fetched in IKDSWH if is_prefetch: "
    "behind [fetched in D if is_current token_is_unset slot_is_empty]": _JOB_OR_BESIDE,
    "fetch_failed in IKDSWH if is_prefetch: behind [fetch_failed in D if is_current next_is_due]": (
        _JOB_OR_BESIDE
    ),
    "load in IKDSWH if was_cancelled_early: behind [load in IKDSWH if an_unload_came_after]": (
        "both rows say the same"
    ),
    "withdraw in K if abandons_job: behind [withdraw in K if gives_back_the_last_lease]": (
        _LEASE_OR_LOAD
    ),
    "withdraw in K if gives_back_the_last_lease: without gives_back_the_last_lease": (
        _LOOKS_FOR_ITSELF
    ),
    "release in K if gives_back_the_last_lease: without gives_back_the_last_lease": (
        _LOOKS_FOR_ITSELF
    ),
    "deadline_expired in K if is_job: behind [deadline_expired in IKDSWH if is_queued_job]": (
        _JOB_OR_QUEUED
    ),
    "deadline_expired in IKDSWH if is_queued_job: "
    "behind [deadline_expired in IKDSWH if is_prefetch]": _LOAD_OR_PREFETCH,
    "deadline_expired in DSW if is_job: behind [deadline_expired in IKDSWH if is_queued_job]": (
        _JOB_OR_QUEUED
    ),
    "lease in IKDSWH if is_shutting_down: behind [lease in H if child_is_alive]": (
        "after a shutdown nothing becomes Healthy: the second row cannot hold"
    ),
    "lease in IKDSWH if load_is_wanted: behind [lease in IKDSWH if restart_is_planned]": (
        "both rows say the same"
    ),
    "lease in IKDSWH if restart_is_planned: behind [lease in IKDSWH if is_cooling_down]": (
        "a recovery has one phase: only one of the two can hold"
    ),
    "fetch_failed in D if is_current next_is_due: "
    "behind [fetch_failed in D if is_current restores_previous]": (
        "what ran before comes back only where nothing waits: only one of the two can hold"
    ),
}
"""Mutants that do what the shipped table does, each with the reason."""


def check(index: int, *, is_thorough: bool) -> None:
    deaths = {
        mutant.name: kill(mutant, SCENARIOS, is_thorough=is_thorough)
        for mutant in mutants_of(index)
    }
    print(f"\n{len(deaths)}:", *Counter(death and death.by for death in deaths.values()).items())
    survivors = {name for name, death in deaths.items() if death is None}
    listed = {name for name in deaths if name in SURVIVORS}
    assert survivors - listed == set(), "not killed"
    assert listed - survivors == set(), "listed as equivalent, and killed"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("index", range(len(TABLE)), ids=lambda index: name_of(TABLE[index]))
def test_every_mutant_of_a_row_is_killed_or_is_no_mutant(index: int) -> None:
    """A row nobody would miss, or could be another, is a row whose reason no test knows."""
    check(index, is_thorough=False)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("index", range(len(TABLE)), ids=lambda index: name_of(TABLE[index]))
def test_what_is_listed_as_no_mutant_is_killed_by_no_program_at_all(index: int) -> None:
    """The reason of a survivor is a sentence; here every interleaving is asked."""
    check(index, is_thorough=True)


def test_every_survivor_that_is_listed_is_a_mutant() -> None:
    """A list that outlives the table it speaks of excuses what it was not made for."""
    names = [mutant.name for index in range(len(TABLE)) for mutant in mutants_of(index)]
    assert len(set(names)) == len(names) > 900
    assert set(SURVIVORS) <= set(names)


def test_the_scenarios_hold_for_the_shipped_table() -> None:
    """What fails anyway would kill every mutant."""
    assert len(scenarios(SCENARIOS)) > 150
    for _, scenario in scenarios(SCENARIOS):
        scenario()
