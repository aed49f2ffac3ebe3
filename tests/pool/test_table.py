"""Checks of the pool's table as data; see `tests/core/test_table.py` for the reasons."""

from __future__ import annotations

import inspect
from itertools import combinations
from typing import get_args, get_origin, get_type_hints

import pytest

from orchestrator.pool import guards
from orchestrator.pool.actions import ACTIONS, Step
from orchestrator.pool.commands import DropStale, SetTimer
from orchestrator.pool.context import Context
from orchestrator.pool.facts import Fact, OfEntry, OfStart
from orchestrator.pool.states import OF_ENTRIES, State
from orchestrator.pool.step import PoolMachine, step
from orchestrator.pool.table import TABLE, Row
from tests.kit.pool.explorations import SCENARIOS, explored
from tests.kit.pool.world import fact_of

HELPERS = {"resized", "grows_by", "restarts_in_a_row"}
"""Functions of guards.py that guards and actions share."""
GUARDS = {
    name: function
    for name, function in inspect.getmembers(guards, inspect.isfunction)
    if function.__module__ == guards.__name__ and name not in HELPERS
}
FACTS = {cls.trigger: cls for cls in get_args(Fact)}
OF_POOL = sorted(cls.trigger for cls in set(get_args(Fact)) - set(get_args(OfEntry)))
CELLS = [(trigger, State.POOL) for trigger in OF_POOL]
CELLS += [(cls.trigger, state) for cls in get_args(OfEntry) for state in OF_ENTRIES]


def rows(trigger: str, state: State) -> list[Row]:
    return [row for row in TABLE if row.trigger == trigger and state in row.sources]


def test_table_uses_every_guard_and_every_action_and_no_other() -> None:
    assert {name for row in TABLE for name in row.guards} == set(GUARDS)
    assert {name for row in TABLE for name in row.actions} == set(ACTIONS)


def test_guards_and_actions_have_the_signature_the_interpreter_expects() -> None:
    for guard in GUARDS.values():
        assert list(inspect.signature(guard).parameters) == ["ctx", "fact"]
        assert get_type_hints(guard)["return"] is bool
    for name, action in ACTIONS.items():
        hints = get_type_hints(action)
        assert list(hints) == ["s", "return"], name
        assert (get_origin(hints["s"]), hints["return"]) == (Step, type(None)), name


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.trigger}-{'-'.join(row.guards)}")
def test_guards_and_actions_accept_the_facts_of_their_rows(row: Row) -> None:
    """A function that reads a field its fact lacks would raise in the middle of a step."""
    accepted = {name: get_type_hints(GUARDS[name])["fact"] for name in row.guards}
    accepted |= {name: get_args(get_type_hints(ACTIONS[name])["s"])[0] for name in row.actions}
    for name, kind in accepted.items():
        assert FACTS[row.trigger] in (get_args(kind) or [kind]), name


def test_triggers_of_facts_and_of_the_table_are_the_same() -> None:
    assert set(FACTS) == {row.trigger for row in TABLE}


@pytest.mark.parametrize(("trigger", "state"), CELLS)
def test_last_row_of_every_cell_has_no_guards(trigger: str, state: State) -> None:
    """The table is total: every fact has an answer in every state."""
    assert rows(trigger, state), f"no row for {trigger} in {state}"
    assert rows(trigger, state)[-1].guards == ()


@pytest.mark.parametrize(("trigger", "state"), CELLS)
def test_no_row_is_hidden_by_an_earlier_one(trigger: str, state: State) -> None:
    for earlier, later in combinations(rows(trigger, state), 2):
        assert not set(earlier.guards) <= set(later.guards), f"{later} is hidden by {earlier}"


def test_facts_of_the_pool_and_of_entries_have_their_own_rows() -> None:
    for row in TABLE:
        assert (row.sources == (State.POOL,)) == (row.trigger in OF_POOL)
        assert State.POOL not in row.sources or row.dest is None
        assert len(set(row.sources)) == len(row.sources)


def test_starting_has_no_row_that_leads_to_it() -> None:
    """Only the policy starts, after every fact."""
    assert not [row for row in TABLE if row.dest is State.STARTING]


def test_resident_has_two_ways_in_and_both_have_entered_who_waited() -> None:
    ways_in = [row for row in TABLE if row.dest is State.RESIDENT]
    assert {row.trigger for row in ways_in} == {"healthy", "adopted"}
    assert all("has_entered" in row.guards and "grant_waiters" in row.actions for row in ways_in)


def test_only_emptied_releases_a_reservation() -> None:
    """B92: room is free when the slot is verified empty, and no moment earlier."""
    releasing = [row for row in TABLE if "release" in row.actions]
    assert {row.trigger for row in releasing} == {"emptied"}
    assert {row.trigger for row in TABLE if row.dest is State.ABSENT} == {"emptied"}
    writers = [name for name, f in ACTIONS.items() if "releasing(" in inspect.getsource(f)]
    assert writers == ["release"]


def test_reports_are_believed_only_about_the_last_start() -> None:
    for row in TABLE:
        if FACTS[row.trigger] in get_args(OfStart) and "is_current" not in row.guards:
            assert (row.dest, row.actions) == (None, ("drop_stale",))


def test_step_is_pure_and_its_result_is_hashable() -> None:
    """The same arguments give the same result: the owner may drop a step and take it again."""
    taken = list(explored("removed and added").steps)[:2000]
    facts = [fact_of(SCENARIOS["removed and added"], key) for _, key in taken]
    pairs = [(core.ctx, fact) for (core, _), fact in zip(taken, facts, strict=True)]
    assert len(pairs) > 1000
    before = [hash(pair) for pair in pairs]
    first = [step(*pair) for pair in pairs]
    again = [step(*pair) for pair in reversed(pairs)]
    assert first == again[::-1]
    assert before == [hash(pair) for pair in pairs]
    assert len({hash(stepped.ctx) for stepped in first}) > 10


def test_dropped_fact_changes_nothing_of_its_entry() -> None:
    dropped = 0
    for core, key in explored("late reports").steps:
        stepped = step(core.ctx, fact_of(SCENARIOS["late reports"], key))
        if stepped.commands and isinstance(stepped.commands[0], DropStale):
            dropped += 1
            assert all(isinstance(one, SetTimer) for one in stepped.commands[1:])
            assert stepped.ctx.entries == core.ctx.entries
    assert dropped > 100


def test_missing_row_raises() -> None:
    elsewhere = Row("look", (State.ABSENT,), (), None, ())
    look = fact_of(SCENARIOS["held"], next(iter(explored("held").steps))[1])
    for table in ([], [elsewhere]):
        with pytest.raises(LookupError, match="in "):
            PoolMachine(table).step(Context(), look)
