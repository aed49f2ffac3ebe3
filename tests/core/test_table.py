"""Lint of the transition table, and of the arrows between the modules of the core.

`transitions` finds a misspelt guard when it first fires, a misspelt action or destination never;
a row that an earlier one hides is found by nobody. So the table is checked as the data it is.
"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.machine import actions, guards
from orchestrator.machine.actions.working import Step
from orchestrator.machine.commands import DropStale
from orchestrator.machine.context import Context
from orchestrator.machine.facts import Completion, Fact, ShutdownRequested, Timer, TimerFired
from orchestrator.machine.states import BUSY, MAY_OWN_PROCESS, PHASES, SETTLED, State
from orchestrator.machine.step import Lifecycle, step
from orchestrator.machine.table import TABLE, Row
from tests.kit.machine.checker import explore
from tests.kit.machine.world import Core

TRIGGERS = sorted({row.trigger for row in TABLE})
HELPERS = {
    *("is_same", "is_named", "cancels", "is_meant"),
    *("awaited_by", "fetches_the_same", "find"),
}
"""Functions of guards.py that guards and actions share; no row names them."""

ROOM = Path(guards.__file__).parent


def public_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__.startswith(module.__name__)
        and not name.startswith("_")
    }


def facts() -> dict[str, set[type]]:
    """Every trigger a fact can have, with the classes that have it."""
    found: dict[str, set[type]] = {}
    for cls in typing.get_args(Fact):
        if cls is TimerFired:
            for kind in typing.get_args(typing.get_type_hints(cls)["kind"]):
                fired = TimerFired(Generation(1), 0.0, kind)
                found.setdefault(fired.trigger, set()).add(cls)
        else:
            found.setdefault(cls.trigger, set()).add(cls)
    return found


def rows(trigger: str, state: State) -> list[Row]:
    return [row for row in TABLE if row.trigger == trigger and state in row.sources]


EVERY_CELL = [(trigger, state) for trigger in TRIGGERS for state in State]


# -------------------------------------------------------------------------------------- names


def test_every_guard_of_the_table_exists_and_every_guard_is_used() -> None:
    """A misspelt guard fails in production, at its first use; an unused one is a lost check."""
    used = {name for row in TABLE for name in row.guards}
    assert used == set(public_functions(guards)) - HELPERS


def test_every_action_of_the_table_exists_and_every_action_is_used() -> None:
    """A misspelt action is never found by `transitions`: the step would silently do less."""
    assert {name for row in TABLE for name in row.actions} == set(public_functions(actions))


def test_the_shared_helpers_are_helpers() -> None:
    """The list above excuses only what cannot be a guard, and what somebody uses."""
    assert set(public_functions(guards)) >= HELPERS
    for name in HELPERS:
        parameters = list(inspect.signature(getattr(guards, name)).parameters)
        assert parameters != ["ctx", "fact"]
        files = (*ROOM.glob("guards.py"), *ROOM.glob("actions/*.py"))
        sources = "".join(file.read_text() for file in files)
        assert sources.count(f"{name}(") >= 2, f"{name} is used by nobody"


def test_guards_and_actions_have_one_shape() -> None:
    """`(ctx, fact) -> bool`, and `(s) -> None`: the interpreter relies on it."""
    for name in {name for row in TABLE for name in row.guards}:
        assert list(inspect.signature(getattr(guards, name)).parameters) == ["ctx", "fact"]
        assert typing.get_type_hints(getattr(guards, name))["return"] is bool
    for name, action in public_functions(actions).items():
        hints = typing.get_type_hints(action)
        assert list(hints) == ["s", "return"], name
        assert (typing.get_origin(hints["s"]), hints["return"]) == (Step, type(None)), name


def test_every_fact_has_a_trigger_of_the_table_and_the_other_way_round() -> None:
    """A fact without rows raises in the owner; a trigger without a fact is dead."""
    assert sorted(facts()) == TRIGGERS


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.trigger}-{'-'.join(row.guards)}")
def test_a_guard_is_used_only_with_facts_its_annotation_admits(row: Row) -> None:
    """A guard that reads a field its fact lacks raises in the middle of a step."""
    for name in row.guards:
        annotation = typing.get_type_hints(getattr(guards, name))["fact"]
        admitted = set(typing.get_args(annotation)) or {annotation}
        for cls in facts()[row.trigger]:
            assert object in admitted or cls in admitted, f"{name} does not take a {cls.__name__}"


def test_every_state_and_every_source_is_a_state() -> None:
    """`transitions` accepts an unknown destination and fails when it gets there."""
    for row in TABLE:
        assert row.dest is None or isinstance(row.dest, State)
        assert row.sources
        assert all(isinstance(source, State) for source in row.sources)
        assert len(set(row.sources)) == len(row.sources)
        assert row.actions, f"a row that does nothing: {row}"


# -------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize(("trigger", "state"), EVERY_CELL)
def test_the_last_row_of_every_cell_has_no_guards(trigger: str, state: State) -> None:
    """Total: no fact is ever without an answer, in any state."""
    applicable = rows(trigger, state)
    assert applicable, f"no row for {trigger} in {state}"
    assert applicable[-1].guards == ()


@pytest.mark.parametrize(("trigger", "state"), EVERY_CELL)
def test_no_row_is_hidden_by_an_earlier_one(trigger: str, state: State) -> None:
    """A row behind one with fewer guards never fires: what it says is not what happens."""
    for earlier, later in combinations(rows(trigger, state), 2):
        assert not set(earlier.guards) <= set(later.guards), f"{later} is hidden by {earlier}"


def test_no_row_is_written_twice() -> None:
    """The same trigger, guards and source in two rows: one of them is a mistake."""
    seen = [(row.trigger, row.guards, source) for row in TABLE for source in row.sources]
    assert len(seen) == len(set(seen))


def test_there_is_one_way_into_spawning_and_it_is_guarded() -> None:
    """Rule of the house: the slot verified empty, the load still wanted, the download its own."""
    (way_in,) = [row for row in TABLE if row.dest is State.SPAWNING]
    assert set(way_in.guards) == {"is_current", "token_is_unset", "slot_is_empty"}
    assert way_in.sources == (State.DOWNLOADING,)
    assert way_in.trigger == "fetched"
    assert [row for row in TABLE if "begin_spawn" in row.actions] == [way_in]


def test_there_is_one_way_into_healthy_and_it_is_guarded() -> None:
    """The linearization point of a load is one row."""
    (way_in,) = [row for row in TABLE if row.dest is State.HEALTHY]
    assert set(way_in.guards) == {"is_current", "token_is_unset", "child_is_alive"}
    assert way_in.sources == (State.WAITING_HEALTH,)
    assert [row for row in TABLE if "commit" in row.actions] == [way_in]


def test_a_pid_is_forgotten_only_when_the_slot_was_emptied() -> None:
    """B06: a failed kill keeps the pid. One action forgets, and only confirmed exit carries it."""
    forgetting = [row for row in TABLE if "forget_child" in row.actions]
    assert {row.trigger for row in forgetting} == {"emptied"}
    assert all("is_current" in row.guards for row in forgetting)
    writers = [
        name
        for name, action in public_functions(actions).items()
        if "child=None" in inspect.getsource(action)
    ]
    assert writers == ["forget_child"]


@pytest.mark.parametrize("row", [row for row in TABLE if row.dest is not None])
def test_a_row_that_enters_a_state_begins_its_effect(row: Row) -> None:
    """At most one effect is in flight, and it is the state's own."""
    begins = {
        State.KILLING: "begin_kill",
        State.DOWNLOADING: "begin_download",
        State.SPAWNING: "begin_spawn",
        State.WAITING_HEALTH: "begin_probe",
    }
    begun = [name for name in row.actions if name.startswith("begin_")]
    assert begun == ([begins[row.dest]] if row.dest in begins else [])
    if begun:
        assert row.actions[-1] == begun[0], "what ends and what follows come before the effect"


def test_every_completion_is_fenced_everywhere_but_in_its_own_state() -> None:
    """Rows of a completion that believe it name `is_current`, or what waits for it, which keeps the
    state; all others only fence it.
    """
    completions = {cls.trigger for cls in typing.get_args(Completion)}
    for row in (row for row in TABLE if row.trigger in completions):
        if "is_current" in row.guards:
            assert len(row.sources) == 1
        elif {"is_awaited", "is_prefetch"} & {*row.guards}:
            assert (row.dest, row.sources) == (None, tuple(State))
        else:
            assert (row.dest, row.actions) == (None, ("fence",))


def test_every_state_is_reached_and_can_be_left() -> None:
    """No trap in the drawing; the checker says the same of every world."""
    edges = {(s, row.dest) for row in TABLE for s in row.sources if row.dest and row.dest != s}

    def reach(start: State, pairs: set[tuple[State, State]]) -> set[State]:
        found = {start}
        while more := {dest for source, dest in pairs if source in found} - found:
            found |= more
        return found

    assert reach(State.IDLE, edges) == set(State)
    assert reach(State.IDLE, {(dest, source) for source, dest in edges}) == set(State)


def test_the_named_sets_of_states_agree() -> None:
    """Busy and settled are two halves; whatever has a phase is not Idle."""
    assert set(State) == BUSY | SETTLED
    assert not BUSY & SETTLED
    assert set(PHASES) == set(State) - {State.IDLE}
    assert State.DOWNLOADING not in MAY_OWN_PROCESS


@pytest.mark.parametrize("name", ["last_error", "last_exit"])
def test_no_decision_depends_on_what_is_kept_for_display(name: str) -> None:
    """The checker leaves these two out of its worlds, which is right only while this holds."""
    readers = [
        function.name
        for file in (*ROOM.glob("guards.py"), *ROOM.glob("actions/*.py"))
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr == name
    ]
    assert set(readers) <= {"forget_child"}


# --------------------------------------------------------------------------------------- step


@cache
def every_step() -> list[tuple[Core, Fact]]:
    """Some thousand steps of all kinds, as one exploration takes them."""
    report = explore("lease; withdraw | load A; cancel | load B queue")
    assert report.counterexample is None
    return [(taken.core, taken.fact) for taken in report.steps]


def test_step_is_pure() -> None:
    """The same arguments give the same answer, whatever was stepped in between; nothing in the
    arguments changes.
    """
    taken = every_step()
    assert len(taken) > 1000
    before = [hash(core.ctx) for core, _ in taken]
    first = [step(core.state, core.ctx, fact) for core, fact in taken]
    again = [step(core.state, core.ctx, fact) for core, fact in reversed(taken)]
    assert first == again[::-1]
    assert before == [hash(core.ctx) for core, _ in taken]


def test_a_fenced_fact_changes_nothing_at_all() -> None:
    """Not even what is kept for display."""
    fenced = 0
    for core, fact in every_step():
        stepped = step(core.state, core.ctx, fact)
        if any(isinstance(command, DropStale) for command in stepped.commands):
            fenced += 1
            assert stepped == (core.state, core.ctx, stepped.commands)
            assert len(stepped.commands) == 1
    assert fenced > 100


def test_a_context_is_frozen_and_hashable_whatever_happens() -> None:
    """An immutable snapshot may be read by any thread at any time."""
    for core, fact in every_step():
        ctx = step(core.state, core.ctx, fact).ctx
        hash(ctx)
        with pytest.raises(AttributeError):
            ctx.generation = Generation(7)  # type: ignore[misc]


def test_a_missing_row_raises_and_changes_nothing() -> None:
    """A broken table is an error, never a silent 'nothing happened'."""
    ctx = Context()
    fact = ShutdownRequested(Ticket(1), 0.0)
    elsewhere = Row("shutdown", (State.HEALTHY,), (), None, ("latch_shutdown",))
    guarded = Row("shutdown", (State.IDLE,), ("is_shutting_down",), None, ("latch_shutdown",))
    for table in ([], [elsewhere], [guarded]):
        with pytest.raises(LookupError, match="shutdown in Idle"):
            Lifecycle(table).step(State.IDLE, ctx, fact)
    assert ctx == Context()


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"guards": ("slot_is_emtpy",)}, AttributeError), ({"actions": ("comit",)}, AttributeError)],
)
def test_a_misspelt_name_fails_when_the_machine_is_built(
    changes: dict[str, tuple[str, ...]], error: type[Exception]
) -> None:
    """Not at the first use, in the middle of the night."""
    good = Row("shutdown", (State.IDLE,), (), None, ("latch_shutdown",))
    values = {"guards": good.guards, "actions": good.actions, **changes}
    with pytest.raises(error):
        Lifecycle([Row(good.trigger, good.sources, values["guards"], None, values["actions"])])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.trigger}-{'-'.join(row.guards)}")
def test_an_action_is_for_the_facts_of_its_rows(row: Row) -> None:
    """What the type of its step says is what the table gives it, and so is what a guard takes."""
    (fact,) = {kind for kind in get_args(Fact) if row.trigger in _triggers(kind)}
    for name in row.actions:
        (taken,) = get_args(get_type_hints(getattr(actions, name))["s"])
        assert fact in _members(taken), name
    for name in row.guards:
        taken = get_type_hints(getattr(guards, name))["fact"]
        assert fact in _members(taken), name


def _members(kind: Any) -> set[Any]:
    return set(get_args(kind)) or {kind}


def _triggers(kind: Any) -> set[str]:
    timers = {f"{timer}_expired" for timer in get_args(Timer)} | {"restart_due"}
    return timers if kind is TimerFired else {kind.trigger}
