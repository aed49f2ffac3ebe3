"""Layer A: the shipped table survives every order of everything, and seeded faults do not.

Each program is explored to the end: arrivals, completions, failures, failed kills, crashes, timers
and late completions in every order. `pytest -s` shows the sizes and the stories.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.machine import actions, guards
from orchestrator.machine.actions.working import Step
from orchestrator.machine.commands import Post
from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE, Row
from tests.kit.machine.checker import Report, TracedLifecycle, explore
from tests.kit.machine.explorations import DEEP, PROGRAMS, RESTART, explored
from tests.kit.machine.invariants import INVARIANTS
from tests.kit.machine.world import Faults


@pytest.mark.timeout(120)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_shipped_table_keeps_every_invariant(program: str) -> None:
    """Every known bug of this class is an order of events nobody had tried: here all are tried."""
    report = explored(program)
    print(f"\n{report}")
    assert report.counterexample is None, report.counterexample
    assert report.worlds > 1
    assert report.edges > report.worlds / 2


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("program", DEEP)
def test_four_clients_break_no_invariant(program: str) -> None:
    """Some races need a third party to open the window and a fourth to fall through it."""
    report = explore(program, **DEEP[program])
    print(f"\n{report}")
    assert report.counterexample is None, report.counterexample
    assert report.worlds > 1000


@pytest.mark.timeout(240)
def test_every_row_of_the_table_fires_in_some_exploration() -> None:
    """A row that never fires is dead, or guards against something that was not explored."""
    fired = {f.row for program in PROGRAMS for f in explored(program).rows_fired}
    never = [row for i, row in enumerate(TABLE) if i not in fired]
    assert not never, "unreachable rows:\n" + "\n".join(map(str, never))


def test_the_explorer_refuses_to_stop_half_way() -> None:
    """A bound that cuts off in silence would call an unexplored table correct."""
    with pytest.raises(MemoryError, match="more than 100 worlds"):
        explore("load A | load B | unload", max_worlds=100)


def test_an_exploration_is_deterministic() -> None:
    """A counterexample that changes from run to run cannot be discussed."""
    broken = TracedLifecycle(guard_names={"token_is_unset": _always})
    first, second = (explore("load A | unload", lifecycle=broken) for _ in range(2))
    assert (first.worlds, first.edges) == (second.worlds, second.edges)
    assert first.counterexample == second.counterexample


# --------------------------------------------------------------------------------- seeded faults


def _always(*_: object) -> bool:
    return True


def _never(*_: object) -> bool:
    return False


def _table(trigger: str, guard_list: str, state: State, change: Callable[[Row], Row | None]) -> Any:
    """Return the table with exactly one row changed, or deleted where `change` returns None."""
    picked = [
        row
        for row in TABLE
        if row.trigger == trigger
        and row.guards == tuple(guard_list.split())
        and state in row.sources
    ]
    assert len(picked) == 1, f"no such row: {trigger} in {state} with {guard_list}"
    changed = [(change(row) if row is picked[0] else row) for row in TABLE]
    return [row for row in changed if row is not None]


def _caught(report: Report, invariants: AbstractSet[str], *, within: int) -> None:
    """The fault is found, as the right thing, and the story is short enough to be read."""
    print(f"\n{report}")
    found = report.counterexample
    assert found is not None, "the seeded fault was not found"
    assert found.invariant in invariants, found.story
    assert len(found.steps) <= within, found.story
    assert found.steps[-1].text in found.story
    assert found.mermaid().startswith("sequenceDiagram\n")
    assert found.message.replace(";", ",") in found.mermaid()


BELIEVES_ALL = {"is_current": _always}


def test_a_stale_completion_believed_is_found() -> None:
    """B05: a late completion of load N settles load N+1."""
    report = explore("load A | load B", lifecycle=TracedLifecycle(guard_names=BELIEVES_ALL))
    _caught(report, {"inv_stale_is_fenced"}, within=4)


def test_a_stale_completion_believed_leads_to_a_wrong_slot() -> None:
    """What the fence is for, seen without looking at the fence itself."""
    report = explore(
        "load A | load B",
        lifecycle=TracedLifecycle(guard_names=BELIEVES_ALL),
        without=frozenset({"inv_stale_is_fenced", "inv_one_effect"}),
    )
    _caught(report, INVARIANTS - {"inv_stale_is_fenced", "inv_one_effect"}, within=8)


def test_a_cancelled_spawn_presumed_dead_is_found() -> None:
    """B04: a stop during a start leaves a live child nobody takes."""
    table = _table(
        "spawned",
        "is_current",
        State.SPAWNING,
        lambda row: replace(
            row,
            dest=State.IDLE,
            actions=("end_effect", "take_next", "answer_waiters", "rest"),
        ),
    )
    report = explore("load A | unload", lifecycle=TracedLifecycle(table))
    _caught(
        report,
        {"inv_no_server_is_forgotten", "inv_idle_at_rest_is_empty", "inv_unloaded_is_empty"},
        within=5,
    )


def test_a_cancelled_spawn_that_is_killed_but_not_recorded_is_found() -> None:
    """Killing is not enough: a kill may fail, and then the pid must be on record."""
    table = _table(
        "spawned",
        "is_current",
        State.SPAWNING,
        lambda row: replace(row, actions=("end_effect", "take_next", "begin_kill")),
    )
    report = explore("load A | unload", lifecycle=TracedLifecycle(table))
    _caught(report, {"inv_no_server_is_forgotten"}, within=5)


def test_a_failed_kill_that_forgets_the_pid_is_found() -> None:
    """B06: the handle dropped before the exit is confirmed; the next spawn makes two."""

    def fail_all(s: Step[Any]) -> None:
        actions.fail_all(s)
        s.put(child=None)

    broken = TracedLifecycle(action_names={"fail_all": fail_all})
    report = explore("load A | unload", lifecycle=broken)
    _caught(report, {"inv_a_server_ends_once"}, within=7)
    without = frozenset({"inv_a_server_ends_once"})
    report = explore("load A | unload", lifecycle=broken, without=without)
    _caught(report, {"inv_no_server_is_forgotten"}, within=7)
    without |= {"inv_no_server_is_forgotten"}
    report = explore("unload", lifecycle=broken, warm="A", without=without)
    _caught(report, {"inv_idle_at_rest_is_empty"}, within=2)


def _skips_killing() -> list[Row]:
    def change(row: Row) -> Row:
        download = ("supersede_all", "enqueue", "take_next", "begin_download")
        return replace(row, dest=State.DOWNLOADING, actions=download)

    return list(_table("load", "", State.HEALTHY, change))


def test_a_second_server_spawned_beside_a_stray_is_found() -> None:
    """B01, B02: between the kill and the spawn the slot may fill again; only the kernel knows."""
    report = explore(
        "load A",
        lifecycle=TracedLifecycle(guard_names={"slot_is_empty": _always}),
        faults=Faults(strays=1),
    )
    _caught(report, {"inv_spawning_is_verified"}, within=4)


def test_a_second_server_spawned_while_one_dies_is_found() -> None:
    """B14: start-new-before-stop-old."""
    broken = TracedLifecycle(_skips_killing(), guard_names={"slot_is_empty": _always})
    left_out: set[str] = set()
    for invariant in (
        "inv_nothing_is_on_record_before_a_spawn",
        "inv_spawning_is_verified",
        "inv_one_server",
    ):
        report = explore("load B", lifecycle=broken, warm="A", without=frozenset(left_out))
        _caught(report, {invariant}, within=2)
        left_out.add(invariant)


def test_a_load_that_skips_killing_is_stopped_by_the_evidence_alone() -> None:
    """Why the slot is verified in the step that spawns: one broken row is not yet two servers."""
    report = explore(
        "load B",
        lifecycle=TracedLifecycle(_skips_killing()),
        warm="A",
        without=frozenset(
            {
                "inv_nothing_is_on_record_before_a_spawn",
                "inv_settled_holds_no_load",
                "inv_a_server_ends_once",
                "a_load_can_succeed",
            }
        ),
    )
    print(f"\n{report}")
    assert report.worlds > 50
    found = report.counterexample
    assert found is None or found.invariant not in {"inv_one_server", "inv_spawning_is_verified"}


def test_a_token_that_is_never_looked_at_is_found() -> None:
    """B16, B19: the server starts after the user said stop, or a cancelled load says 'loaded'."""
    broken = TracedLifecycle(guard_names={"token_is_unset": _always})
    left_out: set[str] = set()
    for invariant, steps in (
        ("inv_spawning_is_verified", 4),
        ("inv_nothing_begins_for_an_ended_load", 4),
        ("inv_healthy_is_earned", 6),
    ):
        report = explore("load A | unload", lifecycle=broken, without=frozenset(left_out))
        _caught(report, {invariant}, within=steps)
        left_out.add(invariant)


def test_a_pulse_that_is_never_felt_is_found() -> None:
    """B30: a crashed server is still 'loaded', and the same load succeeds against the corpse."""
    broken = TracedLifecycle(guard_names={"child_is_alive": _always})
    report = explore("load A", lifecycle=broken)
    _caught(report, {"inv_healthy_is_earned"}, within=6)
    report = explore("load A", lifecycle=broken, warm="A")
    _caught(report, {"inv_loaded_is_what_was_asked"}, within=2)


def test_a_lost_promotion_is_found() -> None:
    """B26, B27: a queued load whose turn never comes waits for ever."""

    def commit(s: Step[Any]) -> None:
        actions.commit(s)
        s.commands[:] = [c for c in s.commands if not isinstance(c, Post)]

    report = explore(
        "load A | load B queue", lifecycle=TracedLifecycle(action_names={"commit": commit})
    )
    _caught(report, {"inv_at_rest_all_are_answered"}, within=7)


@pytest.mark.parametrize(
    ("trigger", "guard_list", "state"),
    [
        ("emptied", "is_current", State.KILLING),
        ("emptied", "is_current job_is_wanted", State.KILLING),
        ("fetched", "is_current", State.DOWNLOADING),
        ("fetch_failed", "is_current", State.DOWNLOADING),
    ],
)
def test_a_waiter_that_is_never_answered_is_found(
    trigger: str, guard_list: str, state: State
) -> None:
    """B25: 'Stopping…' for ever."""
    table = _table(
        trigger,
        guard_list,
        state,
        lambda row: replace(row, actions=tuple(a for a in row.actions if a != "answer_waiters")),
    )
    report = explore("load A | unload | load B queue", lifecycle=TracedLifecycle(table))
    _caught(report, {"inv_at_rest_all_are_answered"}, within=7)


def test_a_failed_kill_that_leaves_its_waiters_alone_is_found() -> None:
    """The answer is owed also when the slot could not be emptied."""
    table = _table(
        "kill_failed",
        "is_current",
        State.KILLING,
        lambda row: replace(row, actions=("fail_all", "rest")),
    )
    report = explore("load A", lifecycle=TracedLifecycle(table))
    _caught(report, {"inv_at_rest_all_are_answered"}, within=2)


def test_a_lease_whose_holder_goes_away_in_a_drain_is_not_waited_for_in_vain() -> None:
    """A caller that leaves takes its lease with it; the drain it held up must go on."""
    table = _table("withdraw", "gives_back_the_last_lease", State.KILLING, lambda _: None)
    report = explore("lease; withdraw | load B", lifecycle=TracedLifecycle(table), warm="A")
    _caught(report, {"inv_one_effect"}, within=3)
    report = explore(
        "lease; withdraw | load B",
        lifecycle=TracedLifecycle(table),
        warm="A",
        without=frozenset({"inv_one_effect"}),
    )
    _caught(report, {"inv_at_rest_is_settled"}, within=4)


def test_a_kill_that_is_repeated_for_ever_is_found() -> None:
    """Quiescence is certain, not only possible: a retry without a bound goes round in circles."""
    table = _table(
        "kill_failed",
        "is_current",
        State.KILLING,
        lambda row: replace(row, dest=None, actions=("end_effect", "begin_kill")),
    )
    report = explore("unload", lifecycle=TracedLifecycle(table), warm="A")
    _caught(report, {"quiescence_is_certain"}, within=3)


def test_a_slot_that_is_never_empty_again_is_found() -> None:
    """From Idle and from Healthy a load can succeed: there is no dead end until restart (B49)."""
    broken = TracedLifecycle(guard_names={"slot_is_empty": _never})
    report = explore("unload", lifecycle=broken)
    _caught(report, {"a_load_can_succeed"}, within=2)


def test_a_fault_that_raises_is_told_as_a_story_too() -> None:
    """A mutant may break in any way; the explorer says where."""
    table = _table(
        "emptied",
        "is_current job_is_wanted",
        State.KILLING,
        lambda row: replace(row, guards=("is_current",)),
    )
    report = explore("load A | unload", lifecycle=TracedLifecycle(table))
    _caught(report, {"step_raised"}, within=3)


@pytest.mark.parametrize("name", ["an_unload_came_after", "a_newer_load_came_first"])
def test_a_slow_look_up_that_lets_an_older_call_win_is_found(name: str) -> None:
    """B16, B17: what the user said last holds, whatever arrives last."""
    broken = TracedLifecycle(guard_names={name: _never})
    report = explore("load B slow | load A; unload", lifecycle=broken)
    _caught(
        report, {"inv_an_older_call_never_wins", "inv_an_end_before_the_commit_wins"}, within=11
    )


def test_a_failed_replacement_that_leaves_nothing_running_is_found() -> None:
    """`restore_previous` that does nothing is a setting that silently never arrived."""
    broken = TracedLifecycle(guard_names={"restores_previous": _never})
    report = explore("load B restore", lifecycle=broken, warm="A", faults=Faults(health=False))
    _caught(report, {"inv_at_rest_all_are_answered"}, within=5)

    def fail_job(s: Step[Any]) -> None:
        ended = s.ctx.previous
        s.put(previous=None)
        actions.fail_job(s)
        s.put(previous=ended)

    broken = TracedLifecycle(action_names={"fail_job": fail_job})
    report = explore("load B restore", lifecycle=broken, warm="A", faults=Faults(download=False))
    _caught(report, {"inv_what_ran_comes_back"}, within=7)


def test_a_previous_model_that_comes_back_after_an_unload_is_found() -> None:
    """The user said stop: what ran before must stay away."""

    def wait_for_empty(s: Step[Any]) -> None:
        kept = s.ctx.previous
        actions.wait_for_empty(s)
        s.put(previous=kept)

    broken = TracedLifecycle(action_names={"wait_for_empty": wait_for_empty})
    report = explore("load B restore | unload", lifecycle=broken, warm="A")
    _caught(report, {"inv_nothing_comes_back_after_an_end"}, within=2)


def test_a_restart_that_an_unload_does_not_end_is_found() -> None:
    """B16 once more: the server starts after the user said stop."""

    def wait_for_empty(s: Step[Any]) -> None:
        kept = s.ctx.recovery
        actions.wait_for_empty(s)
        s.put(recovery=kept)

    broken = TracedLifecycle(action_names={"wait_for_empty": wait_for_empty})
    report = explore("unload", lifecycle=broken, warm="A", policy=RESTART)
    _caught(report, {"inv_nothing_comes_back_after_an_end"}, within=5)


def test_restarts_without_an_end_are_found() -> None:
    """B55: a crash answered by endless restarts."""

    def enqueue_restart(s: Step[Any]) -> None:
        actions.enqueue_restart(s)
        assert s.ctx.recovery is not None
        s.put(recovery=replace(s.ctx.recovery, failures=0))

    broken = TracedLifecycle(action_names={"enqueue_restart": enqueue_restart})
    with pytest.raises(MemoryError, match="more than 500 worlds"):
        explore("load A", lifecycle=broken, policy=RESTART, max_worlds=500)
    assert explored("load A").worlds < 500, "the shipped one ends"


def test_a_timer_of_another_restart_that_is_believed_is_found() -> None:
    """A restart is due by its own timer: one of an earlier failure means nothing."""
    broken = TracedLifecycle(guard_names={"is_due_restart": _always})
    report = explore("load A | unload", lifecycle=broken, policy=RESTART)
    _caught(report, {"inv_a_timer_means_its_own", "step_raised"}, within=12)


def test_a_planned_restart_nobody_carries_out_is_found() -> None:
    """Leases wait for it: without it they would wait for ever."""
    broken = TracedLifecycle(guard_names={"is_due_restart": _never})
    report = explore("lease", lifecycle=broken, warm="A", policy=RESTART)
    _caught(report, {"inv_restarts_are_bounded", "inv_at_rest_all_are_answered"}, within=12)


def test_the_guards_that_matter_are_the_shipped_ones() -> None:
    """The mutants above replace guards by name; a renamed guard would make them harmless."""
    for name in ("is_current", "token_is_unset", "slot_is_empty", "child_is_alive"):
        assert callable(getattr(guards, name))
