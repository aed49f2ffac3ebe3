"""Checks of the transition table as data.

`transitions` finds a misspelt guard when it is first evaluated, a misspelt destination when it is
reached, and a row hidden by an earlier one never.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.machine import guards
from orchestrator.machine.actions import ACTIONS
from orchestrator.machine.actions.working import Step
from orchestrator.machine.commands import DropStale
from orchestrator.machine.context import Context
from orchestrator.machine.facts import Completion, Fact, ShutdownRequested, Timer, TimerFired
from orchestrator.machine.states import PHASES, TIMED, State
from orchestrator.machine.step import Lifecycle, step
from orchestrator.machine.table import TABLE, Row
from tests.kit.machine.checker import explore
from tests.kit.machine.world import Core

TRIGGERS = sorted({row.trigger for row in TABLE})
HELPERS = {
    "awaited_by",
    "cancels",
    "find",
    "is_looked_up_as",
    "is_meant",
    "is_named",
    "is_same",
    "look_up_of",
    "older_look_ups",
    "prefetch_of",
    "unloaded_look_ups",
    "wanted_by",
}
"""Functions of guards.py that guards and actions share."""

MACHINE = Path(guards.__file__).parent
GUARDS = {
    name: function
    for name, function in inspect.getmembers(guards, inspect.isfunction)
    if function.__module__ == guards.__name__ and not name.startswith("_")
}
TIMERS = [TimerFired(Generation(1), 0.0, kind).trigger for kind in get_args(Timer)]
FACTS = {
    trigger: cls
    for cls in get_args(Fact)
    for trigger in (TIMERS if cls is TimerFired else [cls.trigger])
}
"""The class of the facts with each trigger."""


def rows(trigger: str, state: State) -> list[Row]:
    return [row for row in TABLE if row.trigger == trigger and state in row.sources]


EVERY_CELL = [(trigger, state) for trigger in TRIGGERS for state in State]


# -------------------------------------------------------------------------------------------- names


def test_table_uses_every_guard_and_no_other() -> None:
    """`transitions` finds a misspelt guard only when it is first evaluated."""
    used = {name for row in TABLE for name in row.guards}
    assert used == set(GUARDS) - HELPERS


def test_table_uses_every_action_and_no_other() -> None:
    assert {name for row in TABLE for name in row.actions} == set(ACTIONS)


def test_shared_helpers_are_used_and_are_no_guards() -> None:
    assert set(GUARDS) >= HELPERS
    for name in HELPERS:
        parameters = list(inspect.signature(GUARDS[name]).parameters)
        assert parameters != ["ctx", "fact"]
        files = (MACHINE / "guards.py", *MACHINE.glob("actions/*.py"))
        sources = "".join(file.read_text() for file in files)
        assert sources.count(f"{name}(") >= 2, f"{name} is used by one function at most"


def test_guards_and_actions_have_the_signature_the_interpreter_expects() -> None:
    for name in GUARDS.keys() - HELPERS:
        assert list(inspect.signature(GUARDS[name]).parameters) == ["ctx", "fact"]
        assert get_type_hints(GUARDS[name])["return"] is bool
    for name, action in ACTIONS.items():
        hints = get_type_hints(action)
        assert list(hints) == ["s", "return"], name
        assert (get_origin(hints["s"]), hints["return"]) == (Step, type(None)), name


def test_triggers_of_facts_and_of_the_table_are_the_same() -> None:
    assert sorted(FACTS) == TRIGGERS


def test_rows_are_well_formed() -> None:
    """`transitions` accepts an unknown destination and fails when it gets there."""
    for row in TABLE:
        assert row.dest is None or isinstance(row.dest, State)
        assert row.sources
        assert all(isinstance(source, State) for source in row.sources)
        assert len(set(row.sources)) == len(row.sources)
        assert row.actions, f"a row that does nothing: {row}"


# -------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize(("trigger", "state"), EVERY_CELL)
def test_last_row_of_every_cell_has_no_guards(trigger: str, state: State) -> None:
    """The table is total: every fact has an answer in every state."""
    applicable = rows(trigger, state)
    assert applicable, f"no row for {trigger} in {state}"
    assert applicable[-1].guards == ()


@pytest.mark.parametrize(("trigger", "state"), EVERY_CELL)
def test_no_row_is_hidden_by_an_earlier_one(trigger: str, state: State) -> None:
    """A row behind one with fewer guards never fires."""
    for earlier, later in combinations(rows(trigger, state), 2):
        assert not set(earlier.guards) <= set(later.guards), f"{later} is hidden by {earlier}"


def test_no_row_is_written_twice() -> None:
    seen = [(row.trigger, row.guards, source) for row in TABLE for source in row.sources]
    assert len(seen) == len(set(seen))


def test_spawning_has_one_guarded_way_in() -> None:
    (way_in,) = [row for row in TABLE if row.dest is State.SPAWNING]
    assert set(way_in.guards) == {"is_current", "token_is_unset", "slot_is_empty"}
    assert way_in.sources == (State.DOWNLOADING,)
    assert way_in.trigger == "fetched"
    assert [row for row in TABLE if "begin_spawn" in row.actions] == [way_in]


def test_healthy_has_one_guarded_way_in() -> None:
    """The linearization point of a load is one row."""
    (way_in,) = [row for row in TABLE if row.dest is State.HEALTHY]
    assert set(way_in.guards) == {"is_current", "token_is_unset", "child_is_alive"}
    assert way_in.sources == (State.WAITING_HEALTH,)
    assert [row for row in TABLE if "commit" in row.actions] == [way_in]


def test_pid_is_cleared_only_when_the_slot_was_emptied() -> None:
    """B06: a failed kill keeps the pid."""
    forgetting = [row for row in TABLE if "forget_child" in row.actions]
    assert {row.trigger for row in forgetting} == {"emptied"}
    assert all("is_current" in row.guards for row in forgetting)
    writers = [
        name for name, action in ACTIONS.items() if "child=None" in inspect.getsource(action)
    ]
    assert writers == ["forget_child"]


@pytest.mark.parametrize("row", [row for row in TABLE if row.dest is not None])
def test_row_that_enters_a_state_begins_its_effect_last(row: Row) -> None:
    begins = {
        State.KILLING: "begin_kill",
        State.DOWNLOADING: "begin_download",
        State.SPAWNING: "begin_spawn",
        State.WAITING_HEALTH: "begin_probe",
    }
    begun = [name for name in row.actions if name.startswith("begin_")]
    assert begun == ([begins[row.dest]] if row.dest in begins else [])
    if begun:
        assert row.actions[-1] == begun[0], "the effect comes last"


def test_completions_are_dropped_outside_of_their_own_state() -> None:
    """A row that accepts a completion checks `is_current`, or that something awaits it."""
    completions = {cls.trigger for cls in get_args(Completion)}
    for row in (row for row in TABLE if row.trigger in completions):
        if "is_current" in row.guards:
            assert len(row.sources) == 1
        elif {"is_awaited", "is_prefetch"} & {*row.guards}:
            assert (row.dest, row.sources) == (None, tuple(State))
        else:
            assert (row.dest, row.actions) == (None, ("drop_stale",))


def test_every_state_is_reachable_and_can_be_left() -> None:
    edges = {(s, row.dest) for row in TABLE for s in row.sources if row.dest and row.dest != s}

    def reach(start: State, pairs: set[tuple[State, State]]) -> set[State]:
        found = {start}
        while more := {dest for source, dest in pairs if source in found} - found:
            found |= more
        return found

    assert reach(State.IDLE, edges) == set(State)
    assert reach(State.IDLE, {(dest, source) for source, dest in edges}) == set(State)


def test_states_with_a_phase_and_states_that_are_timed() -> None:
    assert set(PHASES) == set(State) - {State.IDLE}
    assert set(TIMED) == set(State) - {State.IDLE, State.HEALTHY}


@pytest.mark.parametrize("name", ["last_error", "last_exit"])
def test_no_decision_depends_on_last_error_or_last_exit(name: str) -> None:
    """The checker ignores these two fields, which is right only while this holds."""
    readers = [
        function.name
        for file in (MACHINE / "guards.py", *MACHINE.glob("actions/*.py"))
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr == name
    ]
    assert set(readers) <= {"forget_child"}


# --------------------------------------------------------------------------------------------- step


@cache
def every_step() -> list[tuple[Core, Fact]]:
    """Some thousand steps of all kinds, as one exploration takes them."""
    report = explore("lease; withdraw | load A | unload")
    assert report.counterexample is None
    return [(taken.core, taken.fact) for taken in report.steps]


def test_step_is_pure() -> None:
    """The same arguments give the same result, and are not changed."""
    taken = every_step()
    assert len(taken) > 1000
    before = [hash(core.ctx) for core, _ in taken]
    first = [step(core.state, core.ctx, fact) for core, fact in taken]
    again = [step(core.state, core.ctx, fact) for core, fact in reversed(taken)]
    assert first == again[::-1]
    assert before == [hash(core.ctx) for core, _ in taken]


def test_dropped_fact_changes_nothing() -> None:
    dropped = 0
    for core, fact in every_step():
        stepped = step(core.state, core.ctx, fact)
        if any(isinstance(command, DropStale) for command in stepped.commands):
            dropped += 1
            assert stepped == (core.state, core.ctx, stepped.commands)
            assert len(stepped.commands) == 1
    assert dropped > 100


def test_context_is_frozen_and_hashable() -> None:
    """Any thread may read a snapshot of it at any time."""
    for core, fact in every_step():
        ctx = step(core.state, core.ctx, fact).ctx
        hash(ctx)
        with pytest.raises(AttributeError):
            ctx.generation = Generation(7)  # type: ignore[misc]


def test_missing_row_raises_and_changes_nothing() -> None:
    ctx = Context()
    fact = ShutdownRequested(Ticket(1), 0.0)
    elsewhere = Row("shutdown", (State.HEALTHY,), (), None, ("latch_shutdown",))
    guarded = Row("shutdown", (State.IDLE,), ("is_shutting_down",), None, ("latch_shutdown",))
    for table in ([], [elsewhere], [guarded]):
        with pytest.raises(LookupError, match="shutdown in Idle"):
            Lifecycle(table).step(State.IDLE, ctx, fact)
    assert ctx == Context()


@pytest.mark.parametrize(
    ("guard_names", "actions"), [(("slot_is_emtpy",), ("commit",)), ((), ("comit",))]
)
def test_misspelt_name_fails_when_the_machine_is_built(
    guard_names: tuple[str, ...], actions: tuple[str, ...]
) -> None:
    with pytest.raises(KeyError, match=r"slot_is_emtpy|comit"):
        Lifecycle([Row("shutdown", (State.IDLE,), guard_names, None, actions)])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.trigger}-{'-'.join(row.guards)}")
def test_guards_and_actions_accept_the_facts_of_their_rows(row: Row) -> None:
    """A function that reads a field its fact lacks would raise in the middle of a step."""
    accepted = {name: get_type_hints(GUARDS[name])["fact"] for name in row.guards}
    accepted |= {name: get_args(get_type_hints(ACTIONS[name])["s"])[0] for name in row.actions}
    for name, kind in accepted.items():
        assert FACTS[row.trigger] in (get_args(kind) or [kind]), name
