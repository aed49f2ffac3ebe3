"""Loads that are ended: by an unload, a cancel, a withdrawal, a shutdown or a deadline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.machine.actions.working import MAX_REMEMBERED
from orchestrator.machine.commands import CancelAnswer, Done, Kill, SetTimer, SetToken, Unloaded
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Child
from orchestrator.machine.guards import EARLY_CANCEL_S
from orchestrator.machine.states import State
from tests.kit.machine.run import BUSY_STATES, A, B, C, D, H, I, K, Run, S, W, healthy, in_flight

CHILD = Child(Generation(1), 41)


# ------------------------------------------------------------------------------------------- unload


@pytest.mark.parametrize("state", BUSY_STATES)
def test_unload_cancels_the_load_and_is_answered_when_the_slot_is_empty(state: State) -> None:
    """B16, B20: it waits only for the end of the effect in flight."""
    run, ticket = in_flight(state)
    unload = run.unload()
    assert SetToken(Generation(1), CancelReason.USER) in run.commands
    assert (run.category(ticket), run.category(unload)) == (None, None)
    assert run.settle().state is I
    assert run.category(ticket) == "cancelled"
    assert run.answers[unload] == Unloaded()
    assert run.ctx.child is None


def test_unload_of_a_healthy_model_is_answered_when_the_slot_is_empty() -> None:
    run = healthy()
    unload = run.unload()
    assert (run.state, run.category(unload)) == (K, None)
    run.emptied()
    assert (run.state, run.answers[unload]) == (I, Unloaded())


def test_unload_with_nothing_loaded_verifies_the_slot() -> None:
    run = Run()
    unload = run.unload()
    assert (run.state, run.answers) == (K, {})
    assert run.emptied().answers[unload] == Unloaded()
    assert run.state is I


def test_unload_during_spawn_reaps_the_late_process() -> None:
    """B04, B16: the child arrives after the unload, and is killed, not forgotten."""
    run, ticket = in_flight(S)
    unload = run.unload()
    run.spawned()
    assert (run.state, run.ctx.child) == (K, CHILD)
    assert run.commands_of(Kill) == [Kill(Generation(1), CHILD)]
    assert run.answers == {}
    run.emptied()
    assert run.category(ticket) == "cancelled"
    assert run.answers[unload] == Unloaded()


def test_shutdown_during_a_kill_begins_no_second_kill() -> None:
    run = healthy()
    run.unload()
    assert len(run.commands_of(Kill)) == 1
    run.shutdown()
    assert run.commands_of(Kill) == []
    assert run.emptied().state is I


def test_failed_unload_keeps_the_pid_and_the_slot_occupied() -> None:
    """B06: the next load is refused for the process that will not die."""
    run = healthy()
    unload = run.unload()
    run.kill_failed()
    assert (run.state, run.category(unload)) == (I, "slot_occupied")
    assert run.ctx.child == CHILD
    ticket = run.load(B)
    assert run.state is K
    assert run.commands_of(Kill) == [Kill(Generation(2), CHILD)]
    assert run.kill_failed().category(ticket) == "slot_occupied"
    again = run.unload()
    assert run.state is K
    assert run.emptied().answers[again] == Unloaded()


def test_unload_of_an_absent_model_changes_nothing() -> None:
    run = healthy(A)
    before = run.ctx
    unload = run.unload(C)
    assert run.answers[unload] == Unloaded(changed=False)
    assert (run.state, replace(run.ctx, unloads=())) == (H, before)


def test_unload_by_name_leaves_the_load_of_another_model_alone() -> None:
    """B22: unloading A, which B replaces, does not cancel the load of B."""
    run = healthy(A)
    newer = run.load(B)
    unload = run.unload(A)
    assert run.state is K
    run.emptied()
    assert run.answers[unload] == Unloaded()
    assert run.settle().category(newer) == "loaded"


def test_unload_by_name_ends_only_the_queued_load_of_that_model() -> None:
    run, first = in_flight(D)
    second, third = run.load(B, on_busy="queue"), run.load(C, on_busy="queue")
    unload = run.unload(B)
    run.settle()
    assert [run.category(t) for t in (first, second, third)] == ["loaded", "cancelled", "loaded"]
    assert run.answers[unload] == Unloaded()


@pytest.mark.parametrize("state", [D, S, W, H])
def test_unload_of_a_queued_model_is_answered_at_once(state: State) -> None:
    """Another model loads or serves and stays: the slot may not be empty for years."""
    run, _ = in_flight(K)
    queued, other = run.load(B, on_busy="queue"), run.load(C, on_busy="queue")
    run.go(state)
    unload = run.unload(B)
    assert (run.category(queued), run.problem(queued).generation) == ("cancelled", 2)
    assert run.answers[unload] == Unloaded()
    assert [job.target.request.model_path for job in run.ctx.wanted][-1:] == [C]
    withdrawn = run.unload(C)
    assert (run.category(other), run.answers[withdrawn]) == ("cancelled", Unloaded())
    assert (run.state, run.ctx.queue, run.settle().state) == (state, (), H)
    assert run.running.target.is_called(A)


def test_unload_of_a_load_behind_a_cancelled_one_waits_for_the_empty_slot() -> None:
    run, _ = in_flight(S)
    queued = run.load(B)
    unload = run.unload(B)
    assert (run.category(queued), run.category(unload)) == (None, None)
    assert unload not in run.answers
    run.spawned().emptied()
    assert (run.state, run.category(queued), run.answers[unload]) == (I, "cancelled", Unloaded())


def test_load_called_before_an_unload_does_not_start_after_it() -> None:
    """B17: an unload also ends what was called before and arrives later."""
    run = Run()
    older = run.ticket()
    run.unload()
    run.emptied()
    run.load(A, ticket=older)
    assert (run.state, run.category(older)) == (I, "cancelled")
    newer = run.load(A)
    assert run.settle().category(newer) == "loaded"


def test_unload_by_name_ends_only_later_arrivals_of_that_model() -> None:
    run = Run()
    one, other = run.ticket(), run.ticket()
    assert run.answers[run.unload(A)] == Unloaded(changed=False)
    run.load(A, ticket=one)
    assert run.category(one) == "cancelled"
    run.load(B, ticket=other)
    assert run.settle().category(other) == "loaded"


# ------------------------------------------------------------------------------------------- cancel


@pytest.mark.parametrize("by", ["id", "generation"])
@pytest.mark.parametrize("state", BUSY_STATES)
def test_cancel_ends_its_load_in_any_phase(state: State, by: str) -> None:
    """It is answered when the effect has ended and no process of the load is left."""
    run, ticket = in_flight(state, load_request_id="x")
    cancel = run.cancel("x") if by == "id" else run.cancel(generation=1)
    assert SetToken(Generation(1), CancelReason.USER) in run.commands
    assert run.settle().state is I
    assert run.category(ticket) == "cancelled"
    assert run.answers[cancel] == CancelAnswer(cancelled=True)


def test_cancel_never_touches_a_resident_model() -> None:
    """B21: the load was committed, so the cancel is late."""
    run = healthy(load_request_id="x")
    before = run.ctx
    for cancel in (run.cancel("x"), run.cancel(generation=1), run.cancel(generation=7)):
        assert run.answers[cancel] == CancelAnswer(cancelled=False)
    assert (run.state, run.ctx) == (H, before)


def test_cancel_touches_only_its_load() -> None:
    """B22."""
    run, first = in_flight(D, load_request_id="a")
    second = run.load(B, on_busy="queue", load_request_id="b")
    cancel = run.cancel("b")
    assert run.category(second) == "cancelled"
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert run.settle().category(first) == "loaded"


def test_cancel_by_id_ends_one_caller_of_a_shared_load() -> None:
    """B23: one client's cancel must not end the load of those who joined it."""
    run, first = in_flight(D, load_request_id="a")
    second = run.load(A, load_request_id="b")
    cancel = run.cancel("a")
    assert run.category(first) == "cancelled"
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert run.tokens() == []
    assert run.settle().category(second) == "loaded"


def test_cancel_by_generation_ends_the_load_for_all_callers() -> None:
    run, first = in_flight(D)
    second = run.load(A)
    run.cancel(generation=1)
    run.settle()
    assert [run.category(t) for t in (first, second)] == ["cancelled", "cancelled"]


def test_cancel_by_id_ends_every_load_of_that_id() -> None:
    run, first = in_flight(D, load_request_id="x")
    second = run.load(B, on_busy="queue", load_request_id="x")
    cancel = run.cancel("x")
    assert run.settle().state is I
    assert [run.category(t) for t in (first, second)] == ["cancelled", "cancelled"]
    assert run.answers[cancel] == CancelAnswer(cancelled=True)


def test_cancel_that_overtakes_its_load_wins() -> None:
    run = Run()
    assert run.answers[run.cancel("x")] == CancelAnswer(cancelled=False)
    ticket = run.load(A, load_request_id="x")
    assert (run.state, run.category(ticket)) == (I, "cancelled")
    other = run.load(A, load_request_id="y")
    assert run.settle().category(other) == "loaded"


def test_early_cancel_is_remembered_for_sixty_seconds() -> None:
    """Longer, and a forgotten cancel would end a new load that reuses the id."""
    assert EARLY_CANCEL_S == 60
    for waited, category in ((60.0, "cancelled"), (60.1, None)):
        run = Run()
        run.cancel("x")
        run.now = waited
        assert run.category(run.load(A, load_request_id="x")) == category


def test_sixty_seconds_are_counted_from_the_cancel() -> None:
    """Monotonic clocks may start anywhere."""
    run = Run()
    run.now = 1e6
    run.cancel("x")
    run.now += 1.0
    assert run.category(run.load(A, load_request_id="x")) == "cancelled"


def test_cancelled_download_begins_no_kill() -> None:
    """The slot was verified empty before the download."""
    run, ticket = in_flight(D)
    run.cancel(generation=1)
    run.fetched()
    assert (run.state, run.commands_of(Kill)) == (I, [])
    assert run.category(ticket) == "cancelled"


def test_cancel_of_another_generation_touches_nothing() -> None:
    run = healthy()
    first, second = run.load(B), run.load(B)
    run.load(C, on_busy="queue")
    before = run.ctx
    for generation in (1, 7):
        cancel = run.cancel(generation=generation)
        assert run.answers[cancel] == CancelAnswer(cancelled=False)
        assert (run.state, run.ctx) == (K, before)
    run.settle()
    assert [run.category(ticket) for ticket in (first, second)] == ["loaded", "loaded"]


def test_cancel_by_generation_ends_a_queued_load_for_all_callers() -> None:
    run, first = in_flight(D)
    waiting = [run.load(B, on_busy="queue") for _ in range(2)]
    cancel = run.cancel(generation=2)
    assert [run.category(ticket) for ticket in waiting] == ["cancelled", "cancelled"]
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert run.ctx.queue == ()
    assert run.settle().category(first) == "loaded"


@pytest.mark.parametrize("began", [0.0, 1e6])
def test_early_cancels_are_forgotten_only_when_they_expire(began: float) -> None:
    run = Run()
    run.now = began
    run.cancel("x")
    run.now += EARLY_CANCEL_S
    run.cancel("y")
    assert run.category(run.load(A, load_request_id="x")) == "cancelled"
    run.now += 0.5
    run.cancel("z")
    assert [name for name, _ in run.ctx.cancelled_ids] == ["y", "z"]


@pytest.mark.parametrize("by", ["cancel", "unload", "shutdown", "deadline"])
@pytest.mark.parametrize("state", BUSY_STATES)
def test_last_error_is_the_answer_of_a_load_that_was_ended(state: State, by: str) -> None:
    """Other clients read in the status which load was ended, and how."""
    run, ticket = in_flight(state, deadline_s=5)
    if by == "cancel":
        run.cancel(generation=1)
    elif by == "deadline":
        run.fire("deadline", 1)
    else:
        run.shutdown() if by == "shutdown" else run.unload()
    problem = run.settle().problem(ticket)
    assert run.last_error == problem
    assert problem.generation == 1


def test_cancelled_callers_get_the_generation_of_their_own_load() -> None:
    run, first = in_flight(D, load_request_id="x")
    second = run.load(B, on_busy="queue", load_request_id="x")
    joined = run.load(B, on_busy="queue")
    run.cancel("x")
    run.settle()
    for ticket, generation in ((first, 1), (second, 2)):
        problem = run.problem(ticket)
        assert (problem.category, problem.generation) == ("cancelled", generation)
    assert run.category(joined) == "loaded"


def test_early_cancels_are_bounded() -> None:
    assert MAX_REMEMBERED == 256
    run = Run()
    for number in range(257):
        run.cancel(f"x{number}")
    assert len(run.ctx.cancelled_ids) == 256
    assert run.category(run.load(A, load_request_id="x1")) == "cancelled"
    assert run.category(run.load(A, load_request_id="x0")) is None


def test_cancel_of_a_seen_id_is_late_not_early() -> None:
    """B21: a delayed cancel must not end a newer load that reuses the id."""
    run = healthy(load_request_id="x")
    run.cancel("x")
    assert run.ctx.cancelled_ids == ()
    ticket = run.load(B, load_request_id="x")
    assert run.settle().category(ticket) == "loaded"


def test_cancel_before_the_commit_wins_and_after_it_is_late() -> None:
    """The step into Healthy is the linearization point."""
    run, ticket = in_flight(W)
    run.cancel(generation=1)
    assert run.ready().state is K
    assert run.settle().category(ticket) == "cancelled"

    run, ticket = in_flight(W)
    run.ready()
    cancel = run.cancel(generation=1)
    assert (run.category(ticket), run.state) == ("loaded", H)
    assert run.answers[cancel] == CancelAnswer(cancelled=False)


def test_second_cancel_finds_nothing_to_cancel() -> None:
    """A token is set at most once."""
    run, _ = in_flight(D)
    run.cancel(generation=1)
    second = run.cancel(generation=1)
    assert run.answers[second] == CancelAnswer(cancelled=False)
    assert run.tokens() == []


def test_cancel_during_a_drain_is_answered_at_once() -> None:
    """A cancel is as fast as the kill ladder; a drain may take half a minute."""
    run = healthy(A)
    run.lease()
    ticket = run.load(B)
    assert (run.state, run.ctx.effect) == (K, None)
    cancel = run.cancel(generation=2)
    assert run.category(ticket) == "cancelled"
    assert run.answers[cancel] == CancelAnswer(cancelled=True)


def test_cancel_of_an_old_id_is_late_after_any_number_of_loads() -> None:
    """B21."""
    run = Run()
    for model, name in ((A, "x"), (B, "y")):
        run.load(model, load_request_id=name)
        run.settle()
    run.cancel("x")
    again = run.load(A, load_request_id="x")
    assert run.settle().category(again) == "loaded"


# ----------------------------------------------------------------------------------------- withdraw


@pytest.mark.parametrize("state", BUSY_STATES)
def test_withdrawal_ends_only_the_callers_own_interest(state: State) -> None:
    """B23: the load goes on while anyone wants it."""
    run, first = in_flight(state)
    second = run.load(A)
    run.withdraw(first)
    assert run.commands == ()
    run.settle()
    assert (run.category(first), run.category(second)) == (None, "loaded")


@pytest.mark.parametrize("state", BUSY_STATES)
def test_withdrawal_of_the_last_caller_ends_the_load(state: State) -> None:
    run, ticket = in_flight(state)
    run.withdraw(ticket)
    assert SetToken(Generation(1), CancelReason.USER) in run.commands
    assert run.settle().state is I
    assert run.answers == {}


@pytest.mark.parametrize("state", BUSY_STATES)
def test_abandoned_load_goes_on_if_the_policy_says_so(state: State) -> None:
    run = Run(Policy(abandoned_load="continue"))
    ticket = run.load(A)
    run.go(state).withdraw(ticket)
    assert run.settle().state is H
    assert run.answers == {}
    assert run.answers.get(run.cancel(generation=1)) == CancelAnswer(cancelled=False)


def test_abandoned_queued_load_never_starts() -> None:
    run, first = in_flight(D)
    second = run.load(B, on_busy="queue")
    run.withdraw(second)
    assert run.settle().state is H
    assert run.category(first) == "loaded"
    assert run.ctx.queue == ()


def test_withdrawn_caller_is_not_answered_when_the_load_fails() -> None:
    run, ticket = in_flight(W)
    run.fail()
    run.withdraw(ticket)
    assert run.settle().answers == {}


def test_late_withdrawal_changes_nothing() -> None:
    run = healthy()
    before = run.ctx
    run.withdraw(Ticket(1))
    assert (run.state, run.ctx, run.commands) == (H, before, ())


# ---------------------------------------------------------------------------------------- shut down


@pytest.mark.parametrize("state", [*BUSY_STATES, H])
def test_shutdown_ends_every_load_and_starts_nothing_more(state: State) -> None:
    """B07: quitting during a load must not leave a server."""
    run = Run()
    ticket = run.load(A)
    run.go(state)
    queued = run.load(B, on_busy="queue") if state is not H else None
    shutdown = run.shutdown()
    assert run.settle().state is I
    assert run.answers[shutdown] == Done()
    assert run.ctx.child is None
    assert run.category(ticket) == ("loaded" if state is H else "shutting_down")
    assert queued is None or run.category(queued) == "shutting_down"
    assert run.category(run.load(A)) == "shutting_down"
    assert run.category(run.lease()) == "shutting_down"
    assert run.state is I


def test_shutdown_revokes_leases() -> None:
    """It does not wait for a stream to end."""
    run = healthy()
    run.lease()
    run.shutdown()
    assert run.commands_of(Kill) == [Kill(Generation(1), CHILD)]


# ---------------------------------------------------------------------------------------- deadline


@pytest.mark.parametrize("state", BUSY_STATES)
def test_deadline_ends_the_load_in_any_phase(state: State) -> None:
    """Its effect still has to end."""
    run, ticket = in_flight(state, deadline_s=5)
    run.fire("deadline", 1)
    assert SetToken(Generation(1), CancelReason.DEADLINE) in run.commands
    assert run.settle().state is I
    problem = run.problem(ticket)
    assert (problem.category, problem.field) == ("deadline", "deadline_s")


def test_deadline_includes_the_time_in_the_queue() -> None:
    run, first = in_flight(D)
    second = run.load(B, on_busy="queue", deadline_s=5)
    assert SetTimer(Generation(2), "deadline", 5.0) in run.commands
    run.fire("deadline", 2)
    assert run.category(second) == "deadline"
    assert run.settle().category(first) == "loaded"


def test_deadline_during_a_drain_is_answered_at_once() -> None:
    run = healthy(A)
    run.lease()
    late = run.load(B, deadline_s=5)
    assert (run.state, run.ctx.effect) == (K, None)
    run.fire("deadline", 2)
    assert run.category(late) == "deadline"


def test_deadline_after_the_commit_is_ignored() -> None:
    run = healthy(deadline_s=5)
    before = run.ctx
    run.fire("deadline", 1)
    assert (run.state, run.ctx) == (H, before)
