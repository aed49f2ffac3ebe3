"""Layer A: the shipped table keeps every invariant in every order of events; faulty tables do not.

Each program is explored to the end: arrivals, completions, failures, failed kills, crashes, timers
and late completions in every order. `pytest -s` prints the sizes and the counterexamples.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.machine.actions import effects, ending
from orchestrator.machine.actions.working import Step
from orchestrator.machine.commands import Post
from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE, Row
from tests.kit.machine.checker import Report, TracedLifecycle, explore
from tests.kit.machine.explorations import DEEP, FIRST, KEEP, PROGRAMS, RESTART, explored
from tests.kit.machine.invariants import INVARIANTS
from tests.kit.machine.world import NO_FAULTS, Faults


@pytest.mark.timeout(120)
@pytest.mark.parametrize("program", PROGRAMS)
def test_shipped_table_keeps_every_invariant(program: str) -> None:
    """Every known bug of this kind was an order of events that no test had tried."""
    report = explored(program)
    print(f"\n{report}")
    assert report.counterexample is None, report.counterexample
    assert report.worlds > 1
    assert report.edges > report.worlds / 2


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("program", DEEP)
def test_four_clients_break_no_invariant(program: str) -> None:
    """Some races need a third client to open the window and a fourth to fall through it."""
    report = explore(program, **DEEP[program])
    print(f"\n{report}")
    assert report.counterexample is None, report.counterexample
    assert report.worlds > 1000


@pytest.mark.timeout(240)
def test_every_row_fires_in_some_exploration() -> None:
    """A row that never fires is dead, or guards against something that was not explored."""
    never = set(range(len(TABLE)))
    for program in (*FIRST, *PROGRAMS):
        if never:
            never -= {fired.row for fired in explored(program).rows_fired}
    rows = [TABLE[index] for index in sorted(never)]
    assert not rows, "unreachable rows:\n" + "\n".join(map(str, rows))


def test_exploration_raises_at_its_bound() -> None:
    """A silent cut-off would call an unexplored table correct."""
    with pytest.raises(MemoryError, match="more than 100 worlds"):
        explore("load A | load B | unload", max_worlds=100)


def test_exploration_is_deterministic() -> None:
    broken = TracedLifecycle(token_is_unset=_always)
    first, second = (explore("load A | unload", lifecycle=broken) for _ in range(2))
    assert (first.worlds, first.edges) == (second.worlds, second.edges)
    assert first.counterexample == second.counterexample


# --------------------------------------------------------------------------------- seeded faults


def _always(*_: object) -> bool:
    return True


def _never(*_: object) -> bool:
    return False


def _table(trigger: str, guard_list: str, state: State, change: Callable[[Row], Row | None]) -> Any:
    """Return the table with one row changed, or deleted if `change` returns None."""
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
    """Assert that the fault breaks one of these invariants, in few enough steps to read."""
    print(f"\n{report}")
    found = report.counterexample
    assert found is not None, "the fault was not found"
    assert found.invariant in invariants, found.story
    assert len(found.steps) <= within, found.story
    assert found.steps[-1].text in found.story
    assert found.mermaid().startswith("sequenceDiagram\n")
    assert found.message.replace(";", ",") in found.mermaid()


ACCEPTS_ALL = {"is_current": _always}


def test_checker_finds_an_accepted_stale_completion() -> None:
    """B05: a late completion of load N settles load N+1."""
    report = explore("load A | load B", lifecycle=TracedLifecycle(**ACCEPTS_ALL))
    _caught(report, {"inv_stale_is_dropped"}, within=4)


def test_checker_finds_what_a_stale_completion_leads_to() -> None:
    """The consequences are found even without the invariant about stale completions."""
    report = explore(
        "load A | load B",
        lifecycle=TracedLifecycle(**ACCEPTS_ALL),
        without=frozenset({"inv_stale_is_dropped", "inv_one_effect"}),
    )
    _caught(report, INVARIANTS - {"inv_stale_is_dropped", "inv_one_effect"}, within=8)


def test_checker_finds_a_forgotten_child_of_a_cancelled_spawn() -> None:
    """B04: a cancelled start leaves a live child."""
    table = _table(
        "spawned",
        "is_current",
        State.SPAWNING,
        lambda row: replace(
            row,
            dest=State.IDLE,
            actions=("end_effect", "take_next", "answer_waiters", "enter_idle"),
        ),
    )
    report = explore("load A | unload", lifecycle=TracedLifecycle(table))
    _caught(
        report,
        {"inv_no_server_is_forgotten", "inv_idle_at_rest_is_empty", "inv_unloaded_is_empty"},
        within=5,
    )


def test_checker_finds_a_killed_child_that_was_not_recorded() -> None:
    """The kill may fail, and then the pid must be known."""
    table = _table(
        "spawned",
        "is_current",
        State.SPAWNING,
        lambda row: replace(row, actions=("end_effect", "take_next", "begin_kill")),
    )
    report = explore("load A | unload", lifecycle=TracedLifecycle(table))
    _caught(report, {"inv_no_server_is_forgotten"}, within=5)


def test_checker_finds_a_pid_forgotten_after_a_failed_kill() -> None:
    """B06: the next spawn would make two servers."""

    def fail_all(s: Step[Any]) -> None:
        ending.fail_all(s)
        s.put(child=None)

    broken = TracedLifecycle(fail_all=fail_all)
    report = explore("load A | unload", lifecycle=broken)
    _caught(report, {"inv_a_server_ends_once"}, within=7)
    without = frozenset({"inv_a_server_ends_once"})
    report = explore("load A | unload", lifecycle=broken, without=without)
    _caught(report, {"inv_no_server_is_forgotten"}, within=7)
    without |= {"inv_no_server_is_forgotten"}
    report = explore("unload", lifecycle=broken, warm="A", without=without)
    _caught(report, {"inv_idle_at_rest_is_empty"}, within=3)


def _skips_killing() -> list[Row]:
    def change(row: Row) -> Row:
        download = ("supersede_all", "enqueue", "take_next", "revoke_leases", "begin_download")
        return replace(row, dest=State.DOWNLOADING, actions=download)

    return list(_table("load", "", State.HEALTHY, change))


def test_checker_finds_a_spawn_beside_a_stray_process() -> None:
    """B01, B02: only the kernel knows whether the slot has filled again since the kill."""
    report = explore(
        "load A",
        lifecycle=TracedLifecycle(slot_is_empty=_always),
        faults=Faults(strays=1),
    )
    _caught(report, {"inv_spawning_is_verified"}, within=4)


def test_checker_finds_a_spawn_before_the_old_server_is_dead() -> None:
    """B14."""
    broken = TracedLifecycle(_skips_killing(), slot_is_empty=_always)
    left_out: set[str] = set()
    for invariant in (
        "inv_nothing_is_on_record_before_a_spawn",
        "inv_spawning_is_verified",
        "inv_one_server",
    ):
        report = explore("load B", lifecycle=broken, warm="A", without=frozenset(left_out))
        _caught(report, {invariant}, within=2)
        left_out.add(invariant)


def test_slot_evidence_alone_prevents_a_second_server() -> None:
    """One wrong row is not enough for two servers, because the spawning step verifies the slot."""
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


def test_checker_finds_an_ignored_token() -> None:
    """B16, B19: the server starts after an unload, or a cancelled load is answered `loaded`."""
    broken = TracedLifecycle(token_is_unset=_always)
    left_out: set[str] = set()
    for invariant, steps in (
        ("inv_spawning_is_verified", 4),
        ("inv_nothing_begins_for_an_ended_load", 4),
        ("inv_healthy_is_proven", 6),
    ):
        report = explore("load A | unload", lifecycle=broken, without=frozenset(left_out))
        _caught(report, {invariant}, within=steps)
        left_out.add(invariant)


def test_checker_finds_a_missing_liveness_check() -> None:
    """B30: a crashed server still counts as loaded."""
    broken = TracedLifecycle(child_is_alive=_always)
    report = explore("load A", lifecycle=broken)
    _caught(report, {"inv_healthy_is_proven"}, within=6)
    report = explore("load A", lifecycle=broken, warm="A")
    _caught(report, {"inv_loaded_is_what_was_requested"}, within=2)


def test_checker_finds_a_lost_promotion() -> None:
    """B26, B27: a queued load waits for ever."""

    def commit(s: Step[Any]) -> None:
        effects.commit(s)
        s.emitted[:] = [c for c in s.emitted if not isinstance(c, Post)]

    report = explore("load A | load B queue", lifecycle=TracedLifecycle(commit=commit))
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
def test_checker_finds_an_unanswered_waiter(trigger: str, guard_list: str, state: State) -> None:
    """B25."""
    table = _table(
        trigger,
        guard_list,
        state,
        lambda row: replace(row, actions=tuple(a for a in row.actions if a != "answer_waiters")),
    )
    report = explore("load A | unload | load B queue", lifecycle=TracedLifecycle(table))
    _caught(report, {"inv_at_rest_all_are_answered"}, within=7)


def test_checker_finds_waiters_unanswered_after_a_failed_kill() -> None:
    table = _table(
        "kill_failed",
        "is_current",
        State.KILLING,
        lambda row: replace(row, actions=("fail_all", "enter_idle")),
    )
    report = explore("load A", lifecycle=TracedLifecycle(table))
    _caught(report, {"inv_at_rest_all_are_answered"}, within=2)


def test_checker_finds_a_drain_that_does_not_end() -> None:
    table = _table("drained", "is_current_drain", State.KILLING, lambda _: None)
    report = explore("lease; withdraw | load B", lifecycle=TracedLifecycle(table), warm="A")
    _caught(report, {"inv_a_drain_ends_with_the_last"}, within=2)


def test_checker_finds_a_gate_that_lets_somebody_in_after_it_was_closed() -> None:
    report = explore("load B | lease", warm="A", faults=replace(NO_FAULTS, lets_in_late=True))
    _caught(report, {"inv_nobody_is_let_in_late"}, within=3)


def test_checker_finds_a_gate_that_loses_the_last_one_to_leave() -> None:
    faults = replace(NO_FAULTS, loses_the_last=True)
    report = explore("load B | lease; release", warm="A", faults=faults)
    _caught(report, {"inv_a_drain_ends_with_the_last"}, within=3)


def test_checker_finds_a_shutdown_that_leaves_the_gate_open() -> None:
    def without(row: Row) -> Row:
        return replace(row, actions=tuple(a for a in row.actions if a != "revoke_leases"))

    lifecycle = TracedLifecycle(_table("shutdown", "keeps_server", State.HEALTHY, without))
    report = explore("shutdown", lifecycle=lifecycle, warm="A", policy=KEEP)
    _caught(report, {"inv_the_gate_is_as_the_machine_says"}, within=2)


@pytest.mark.parametrize(("instead", "verb"), [("", "unload cut"), ("revoke_leases", "unload")])
def test_checker_finds_an_unload_that_cuts_too_little_or_too_much(instead: str, verb: str) -> None:
    def changed(row: Row) -> Row:
        names = " ".join(row.actions).replace("cut_leases", instead)
        return replace(row, actions=tuple(names.split()))

    table = _table("unload", "", State.HEALTHY, changed)
    report = explore(f"lease; release | {verb}", lifecycle=TracedLifecycle(table), warm="A")
    _caught(report, {"inv_only_a_cut_ends_leases"}, within=2)


def test_checker_finds_a_keeper_that_says_too_early_that_nothing_is_left() -> None:
    faults = Faults(is_empty_too_early=True, kill=False)
    report = explore("unload", warm="A", faults=faults)
    _caught(report, {"inv_unloaded_is_empty"}, within=3)
    without = frozenset({"inv_unloaded_is_empty", "inv_a_server_ends_once"})
    report = explore("unload", warm="A", faults=faults, without=without)
    _caught(report, {"inv_no_server_is_forgotten"}, within=3)


def test_checker_finds_a_keeper_that_loses_an_exit() -> None:
    report = explore("unload B", warm="A", faults=Faults(loses_exits=True, kill=False))
    _caught(report, {"inv_healthy_at_rest_is_alive"}, within=2)


def test_checker_finds_an_adoption_without_comparison() -> None:
    faults = Faults(host=1, adopts_without_comparing=True, kill=False)
    report = explore("unload B", warm="A", policy=KEEP, faults=faults)
    _caught(report, {"inv_healthy_is_proven"}, within=3)


def test_checker_finds_a_hang_that_is_told_of_a_worker() -> None:
    faults = Faults(calls_a_worker_hung=True, kill=False)
    report = explore("unload B", warm="A", faults=faults)
    _caught(report, {"inv_a_server_is_stopped_for_a_reason"}, within=2)


def test_checker_finds_the_memory_of_another_server() -> None:
    lifecycle = TracedLifecycle(is_job=lambda ctx, fact: ctx.job is not None)
    faults = Faults(figures=True, kill=False)
    report = explore("load A; cancel; load B", lifecycle=lifecycle, faults=faults)
    _caught(report, {"inv_memory_is_of_this_server", "inv_a_figure_is_recorded"}, within=20)


def test_checker_finds_a_figure_that_is_lost() -> None:
    lifecycle = TracedLifecycle([row for row in TABLE if "record_memory" not in row.actions])
    report = explore("load A", lifecycle=lifecycle, faults=Faults(figures=True, kill=False))
    _caught(report, {"inv_a_figure_is_recorded"}, within=20)


def test_checker_finds_a_hang_that_nobody_ends() -> None:
    lifecycle = TracedLifecycle([row for row in TABLE if "record_hang" not in row.actions])
    report = explore("unload B", lifecycle=lifecycle, warm="A", faults=Faults(hang=1, kill=False))
    _caught(report, {"quiescence_is_certain"}, within=3)


def test_checker_finds_what_a_killed_keeper_leaves_behind() -> None:
    """A start that fails must be followed by a kill, which looks for it."""
    table = _table(
        "spawn_failed",
        "is_current",
        State.SPAWNING,
        lambda row: replace(
            row,
            dest=State.IDLE,
            actions=("fail_job", "end_effect", "take_next", "answer_waiters", "enter_idle"),
        ),
    )
    faults = Faults(keeper=1, kill=False)
    report = explore("load A", lifecycle=TracedLifecycle(table), faults=faults)
    _caught(report, {"inv_no_server_is_forgotten"}, within=5)


def test_checker_finds_an_endless_kill() -> None:
    """Quiescence is certain, not only possible."""
    table = _table(
        "kill_failed",
        "is_current",
        State.KILLING,
        lambda row: replace(row, dest=None, actions=("end_effect", "begin_kill")),
    )
    report = explore("unload", lifecycle=TracedLifecycle(table), warm="A")
    _caught(report, {"quiescence_is_certain"}, within=3)


def test_checker_finds_a_slot_that_is_never_empty() -> None:
    """B49: from Idle and from Healthy a load can succeed."""
    broken = TracedLifecycle(slot_is_empty=_never)
    report = explore("unload", lifecycle=broken)
    _caught(report, {"a_load_can_succeed"}, within=2)


def test_checker_reports_an_exception_in_a_step() -> None:
    table = _table(
        "emptied",
        "is_current job_is_wanted",
        State.KILLING,
        lambda row: replace(row, guards=("is_current",)),
    )
    report = explore("load A | unload", lifecycle=TracedLifecycle(table))
    _caught(report, {"step_raised"}, within=3)


@pytest.mark.parametrize("name", ["was_unloaded_since", "newer_load_was_accepted"])
def test_checker_finds_an_older_call_that_wins(name: str) -> None:
    """B16, B17: the last call wins, whatever arrives last."""
    broken = TracedLifecycle(**{name: _never})
    report = explore("load B late | load A; unload", lifecycle=broken)
    _caught(
        report, {"inv_an_older_call_never_wins", "inv_cancel_before_the_commit_wins"}, within=11
    )


def test_checker_finds_a_missing_restore() -> None:
    broken = TracedLifecycle(restores_previous=_never)
    report = explore("load B restore", lifecycle=broken, warm="A", faults=Faults(health=False))
    _caught(report, {"inv_at_rest_all_are_answered"}, within=6)

    def fail_job(s: Step[Any]) -> None:
        ended = s.ctx.previous
        s.put(previous=None)
        ending.fail_job(s)
        s.put(previous=ended)

    broken = TracedLifecycle(fail_job=fail_job)
    report = explore("load B restore", lifecycle=broken, warm="A", faults=Faults(download=False))
    _caught(report, {"inv_previous_is_restored"}, within=7)


def test_checker_finds_a_restore_after_an_unload() -> None:

    def wait_for_empty(s: Step[Any]) -> None:
        kept = s.ctx.previous
        ending.wait_for_empty(s)
        s.put(previous=kept)

    broken = TracedLifecycle(wait_for_empty=wait_for_empty)
    report = explore("load B restore | unload", lifecycle=broken, warm="A")
    _caught(report, {"inv_nothing_starts_after_an_unload"}, within=3)


def test_checker_finds_a_restart_after_an_unload() -> None:
    """B16."""

    def wait_for_empty(s: Step[Any]) -> None:
        kept = s.ctx.recovery
        ending.wait_for_empty(s)
        s.put(recovery=kept)

    broken = TracedLifecycle(wait_for_empty=wait_for_empty)
    report = explore("unload", lifecycle=broken, warm="A", policy=RESTART)
    _caught(report, {"inv_nothing_starts_after_an_unload"}, within=5)


def test_checker_finds_endless_restarts() -> None:
    """B55."""

    def enqueue_restart(s: Step[Any]) -> None:
        effects.enqueue_restart(s)
        assert s.ctx.recovery is not None
        s.put(recovery=replace(s.ctx.recovery, failures=0))

    broken = TracedLifecycle(enqueue_restart=enqueue_restart)
    with pytest.raises(MemoryError, match="more than 500 worlds"):
        explore("load A", lifecycle=broken, policy=RESTART, max_worlds=500)
    assert explored("load A").worlds < 500, "the shipped table ends"


def test_checker_finds_an_accepted_stale_restart_timer() -> None:
    broken = TracedLifecycle(is_due_restart=_always)
    report = explore("load A | unload", lifecycle=broken, policy=RESTART)
    _caught(report, {"inv_stale_timer_is_dropped", "step_raised"}, within=12)


def test_checker_finds_a_restart_that_never_happens() -> None:
    """Leases would wait for it for ever."""
    broken = TracedLifecycle(is_due_restart=_never)
    report = explore("lease", lifecycle=broken, warm="A", policy=RESTART)
    _caught(report, {"inv_restarts_are_bounded", "inv_at_rest_all_are_answered"}, within=12)
