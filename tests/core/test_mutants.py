"""Layer C: every change of the table breaks a test or an invariant, or is listed as equivalent.

`pytest -s` prints what killed the mutants of each row.
"""

from __future__ import annotations

from collections import Counter

import pytest

from orchestrator.machine.table import TABLE
from tests.core import (
    test_adoption,
    test_answers,
    test_conclusions,
    test_ending,
    test_idle,
    test_look_ups,
    test_machine,
    test_prompts,
    test_recovery,
    test_servers,
    test_stays,
    test_waiting,
)
from tests.kit.machine.mutants import kill, mutants_of, name_of
from tests.kit.scenarios import scenarios

SCENARIOS = (
    test_machine,
    test_ending,
    test_servers,
    test_stays,
    test_recovery,
    test_idle,
    test_answers,
    test_waiting,
    test_look_ups,
    test_conclusions,
    test_adoption,
    test_prompts,
)
_JOB_OR_QUEUED = "a generation is in flight or in the queue, never both"
_LOAD_OR_PREFETCH = "a load and a prefetch never have the same generation"
_JOB_OR_QUEUED_FETCH = "a queued load or a prefetch is not the load in flight"
SURVIVORS: dict[str, str] = {
    "load in IKDSWH if prefetches_are_full: behind [load in IKDSWH if queue_is_full]": (
        "both rows have the same actions"
    ),
    "fetched in IKDSWH if is_awaited: behind [fetched in IKDSWH if is_prefetch]": (
        _LOAD_OR_PREFETCH
    ),
    "fetch_failed in IKDSWH if is_awaited: behind [fetch_failed in IKDSWH if is_prefetch]": (
        _LOAD_OR_PREFETCH
    ),
    "fetched in IKDSWH if is_prefetch: "
    "behind [fetched in D if is_current token_is_unset slot_is_empty]": _JOB_OR_QUEUED_FETCH,
    "fetch_failed in IKDSWH if is_prefetch: behind [fetch_failed in D if is_current next_is_due]": (
        _JOB_OR_QUEUED_FETCH
    ),
    "prefetch in IKDSWH if model_is_local: behind [prefetch in IKDSWH if matches_prefetch]": (
        "a local model is never downloaded, so only one of the two can fire"
    ),
    "idle_expired in H if is_idle: behind [idle_expired in H if is_used]": (
        "the idle time of a server is over, or it is not"
    ),
    "deadline_expired in K if is_job: behind [deadline_expired in IKDSWH if is_queued_job]": (
        _JOB_OR_QUEUED
    ),
    "deadline_expired in IKDSWH if is_queued_job: "
    "behind [deadline_expired in IKDSWH if is_prefetch]": _LOAD_OR_PREFETCH,
    "deadline_expired in DSW if is_job: behind [deadline_expired in IKDSWH if is_queued_job]": (
        _JOB_OR_QUEUED
    ),
    "lease in IKDSWH if load_is_wanted: behind [lease in IKDSWH if restart_is_planned]": (
        "both rows have the same actions"
    ),
    "lease in IKDSWH if restart_is_planned: behind [lease in IKDSWH if is_cooling_down]": (
        "a recovery has one phase, so only one of the two can fire"
    ),
    "fetch_failed in D if is_current next_is_due: "
    "behind [fetch_failed in D if is_current restores_previous]": (
        "the previous model is restored only if no load is due, so only one of the two can fire"
    ),
}
"""Mutants that behave like the shipped table, each with the reason."""


def check(index: int, *, is_thorough: bool) -> None:
    deaths = {
        mutant.name: kill(mutant, SCENARIOS, is_thorough=is_thorough)
        for mutant in mutants_of(index)
    }
    print(f"\n{len(deaths)}:", *Counter(death and death.by for death in deaths.values()).items())
    survivors = {name for name, death in deaths.items() if death is None}
    listed = {name for name in deaths if name in SURVIVORS}
    assert survivors - listed == set(), "survived"
    assert listed - survivors == set(), "listed as equivalent, but killed"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("index", range(len(TABLE)), ids=lambda index: name_of(TABLE[index]))
def test_every_mutant_of_a_row_is_killed_or_listed(index: int) -> None:
    """A row that may be changed unnoticed is a row whose purpose no test knows."""
    check(index, is_thorough=False)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("index", range(len(TABLE)), ids=lambda index: name_of(TABLE[index]))
def test_no_program_kills_a_listed_survivor(index: int) -> None:
    """A survivor's reason is only a sentence; here every interleaving is tried."""
    check(index, is_thorough=True)


def test_every_listed_survivor_is_a_mutant() -> None:
    """The list must not outlive the table."""
    names = [mutant.name for index in range(len(TABLE)) for mutant in mutants_of(index)]
    assert len(set(names)) == len(names) > 900
    assert set(SURVIVORS) <= set(names)


def test_scenarios_pass_with_the_shipped_table() -> None:
    """A scenario that always fails would kill every mutant."""
    assert len(scenarios(SCENARIOS)) > 150
    for _, scenario in scenarios(SCENARIOS):
        scenario()
