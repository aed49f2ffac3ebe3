"""Repairs: the previous model is restored, and a server that ended by itself is restarted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.tokens import Generation
from orchestrator.errors import Busy, Problem, ServerStartFailed
from orchestrator.machine.commands import CancelAnswer, DropStale, Post, SetTimer, Unloaded
from orchestrator.machine.context import Policy
from orchestrator.machine.plan import plan_load
from orchestrator.machine.recovery import Recovery, RestartPolicy, after_failure, backoff_s
from orchestrator.machine.states import State
from orchestrator.settings.request import LoadRequest
from tests.kit.machine.run import A, B, C, D, H, I, K, Run, S, W, healthy
from tests.kit.machine.world import target

RULES = RestartPolicy(backoff_s=1, backoff_max_s=5, limit=3, cool_down_s=100, stable_after_s=60)


def restarting(rules: RestartPolicy = RULES, **options: Any) -> Run:
    return healthy(policy=Policy(restart=rules), **options)


# --------------------------------------------------------------------------------- restore_previous


@pytest.mark.parametrize("phase", [D, S, W])
def test_failed_replacement_restores_the_previous_model_and_reports_both(
    phase: State,
) -> None:
    """Unloading 86 GB for a model that does not start must not end the service."""
    run = healthy(llama_extra_args=["--seed", "7"])
    ticket = run.load(B, restore_previous=True)
    run.go(phase)
    run.fail()
    assert run.category(ticket) is None, "the outcome of the restore is still open"
    assert run.state is K
    run.settle()
    assert (run.state, run.model) == (H, A)
    answer = run.problem(ticket)
    assert (answer.category, answer.generation) == ("server_start_failed", 2)
    assert answer.restored is not None
    assert (answer.restored.generation, answer.restored.model_path) == (3, A)
    assert answer.restored.problem is None
    assert answer.as_dict()["restored"] == {
        "status": "loaded",
        "generation": 3,
        "model_path": A,
        "gguf_variant": None,
    }
    assert run.running.target.extra_args == ("--seed", "7"), "with the args it had"
    assert run.ctx.last_error == answer, "the failure stays in the status"


def test_failed_restore_is_reported_too() -> None:
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(S).fail()
    run.go(S).fail()
    run.settle()
    answer = run.problem(ticket)
    assert run.state is I
    assert answer.restored is not None
    assert answer.restored.problem is not None
    assert answer.restored.problem.generation == 3
    assert answer.as_dict()["restored"]["status"] == "failed"
    assert run.ctx.last_error == answer
    again = run.load(B)
    assert run.settle().category(again) == "loaded"


def test_restoring_load_keeps_its_own_deadline() -> None:
    """Callers wait for it, so it must not take for ever."""
    run = healthy(deadline_s=7.0)
    ticket = run.load(B, restore_previous=True)
    run.go(W).fail()
    (timer,) = run.commands_of(SetTimer)
    assert (timer.generation, timer.kind, timer.after_s) == (3, "deadline", 7.0)
    run.go(W)
    run.expire(timer)
    assert run.category(ticket) is None, "its server still has to end"
    run.fail().emptied()
    answer = run.problem(ticket)
    assert (run.state, answer.category) == (I, "server_start_failed")
    assert answer.restored is not None
    assert answer.restored.problem is not None
    assert answer.restored.problem.category == "deadline"
    assert run.ctx.last_error == answer


def test_nothing_is_restored_without_restore_previous() -> None:
    run = healthy()
    ticket = run.load(B)
    run.go(S).fail()
    run.settle()
    assert (run.state, run.category(ticket)) == (I, "server_start_failed")
    assert run.problem(ticket).restored is None


def test_nothing_is_restored_if_nothing_ran() -> None:
    run = healthy()
    run.unload()
    run.settle()
    ticket = run.load(B, restore_previous=True)
    run.go(S).fail()
    run.settle()
    assert (run.state, run.category(ticket)) == (I, "server_start_failed")


def test_deadline_of_a_replacement_restores_too() -> None:
    run = healthy()
    ticket = run.load(B, restore_previous=True, deadline_s=1)
    run.go(D)
    run.fire("deadline", 2)
    assert run.state is D
    run.settle()
    assert (run.model, run.category(ticket)) == (A, "deadline")


@pytest.mark.parametrize("end", ["cancel", "unload", "withdraw"])
def test_cancelled_replacement_restores_nothing(end: str) -> None:
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(D)
    if end == "cancel":
        run.cancel(generation=2)
    elif end == "unload":
        run.unload()
    else:
        run.withdraw(ticket)
    run.settle()
    assert (run.state, run.ctx.running) == (I, None)


def test_queued_load_precedes_the_restore() -> None:
    run = healthy()
    first = run.load(B, restore_previous=True)
    run.go(D)
    second = run.load(C, on_busy="queue", restore_previous=True)
    run.fail()
    run.emptied()
    assert run.problem(first).restored is None
    run.go(S).fail()
    run.settle()
    assert (run.model, run.category(second)) == (A, "server_start_failed")


def test_newer_load_supersedes_the_restoring_load() -> None:
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(S).fail()
    newer = run.load(C)
    answer = run.problem(ticket)
    assert answer.category == "server_start_failed"
    assert answer.restored is not None
    assert answer.restored.problem is not None
    assert answer.restored.problem.category == "superseded"
    assert run.settle().category(newer) == "loaded"


def test_load_of_the_previous_model_joins_the_restoring_load() -> None:
    run = healthy()
    failed = run.load(B, restore_previous=True)
    run.go(S).fail()
    joined = run.load(A)
    run.settle()
    answer = run.loaded(joined)
    assert (answer.joined, answer.generation) == (True, 3)
    assert run.category(failed) == "server_start_failed"


def test_cancel_of_the_failed_load_does_not_touch_the_restoring_load() -> None:
    """B21, B22."""
    run = healthy()
    run.load(B, restore_previous=True, load_request_id="x")
    run.go(S).fail()
    late = run.cancel("x")
    assert run.answers[late] == CancelAnswer(cancelled=False)
    assert run.settle().model == A


def test_restoring_load_goes_on_without_callers() -> None:
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(S).fail()
    run.withdraw(ticket)
    assert run.settle().model == A


def test_unload_of_the_previous_model_prevents_the_restore() -> None:
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(D)
    unload = run.unload(A)
    assert run.answers[unload] == Unloaded(changed=False)
    run.fail()
    run.settle()
    assert (run.state, run.category(ticket)) == (I, "server_start_failed")


# --------------------------------------------------------------------------------- restart on-crash


def test_crashed_server_is_restarted_with_the_same_settings() -> None:
    """B55."""
    run = restarting(max_seq_length=512)
    before = run.running
    timer = run.crash().timer("restart")
    assert (run.state, timer.after_s) == (K, 1.0)
    run.emptied()
    assert (run.state, run.ctx.wanted) == (I, ())
    run.expire(timer)
    assert run.state is K
    run.settle()
    assert (run.state, run.running.generation) == (H, 2)
    assert run.running.target == before.target
    assert run.last_error.category == "server_exited"


def test_crash_without_a_policy_restarts_nothing() -> None:
    run = healthy()
    run.crash()
    assert run.commands_of(SetTimer) == []
    assert (run.settle().state, run.ctx.recovery) == (I, None)
    assert run.last_error.category == "server_exited"


def test_restarts_back_off_to_a_ceiling_and_end_in_a_cool_down() -> None:
    """A server that cannot run must not be restarted for ever."""
    run = restarting(replace(RULES, limit=4))
    waits = []
    for _ in range(4):
        timer = run.crash().timer("restart")
        waits.append(timer.after_s)
        run.emptied().expire(timer).settle()
        assert run.state is H
    assert waits == [1, 2, 4, 5]
    run.crash()
    assert run.commands_of(SetTimer) == []
    early = run.problem(run.load(A))
    assert (early.reason, run.state) == ("cooling_down", K)
    run.emptied()
    run.now += 30
    refused = run.problem(run.load(A))
    assert (refused.category, refused.reason) == ("server_start_failed", "cooling_down")
    assert refused.retry_after_s == 70
    assert refused.log_tail == ("it crashed",)
    assert run.problem(run.lease()).retry_after_s == 70
    run.now += 70
    again = run.load(A)
    assert run.settle().category(again) == "loaded"


def test_older_call_during_a_cool_down_is_superseded() -> None:
    run = restarting(replace(RULES, limit=1))
    run.crash_and_restart()
    older = run.ticket()
    assert run.category(run.load(A)) == "already"
    run.crash()
    run.emptied()
    run.load(A, ticket=older)
    assert run.category(older) == "superseded"


@pytest.mark.parametrize("options", [{"max_seq_length": 512}, {"force_reload": True}])
def test_cool_down_refuses_only_the_target_that_failed(options: dict[str, Any]) -> None:
    """B49: other settings, and a forced reload, may be tried."""
    run = restarting(replace(RULES, limit=1))
    run.crash_and_restart()
    run.crash()
    run.emptied()
    assert run.category(run.load(A)) == "server_start_failed"
    other = run.load(A, **options)
    assert run.settle().category(other) == "loaded"
    assert run.ctx.recovery is None


def test_failed_restart_counts_like_a_crash() -> None:
    run = restarting()
    timer = run.crash().timer("restart")
    run.emptied().expire(timer)
    run.go(S).fail()
    assert run.timer("restart").after_s == 2
    assert run.recovery == ("waiting", 2)
    assert run.last_error.category == "server_start_failed"


@pytest.mark.parametrize("state", [K, D, S, W])
def test_restart_past_its_deadline_counts_as_a_failure(state: State) -> None:
    """The next restart is planned at once, even if its time comes before the end of this one."""
    run = restarting(deadline_s=7.0)
    timer = run.crash().timer("restart")
    run.emptied().expire(timer)
    deadline = run.timer("deadline")
    run.go(state)
    run.expire(deadline)
    assert run.recovery == ("waiting", 2)
    assert run.last_error.category == "deadline"
    assert "2 of 3" in run.last_error.message
    again = run.timer("restart")
    assert run.state is state
    run.expire(again)
    assert len(run.ctx.wanted) == 1
    run.settle()
    assert (run.state, run.model) == (H, A)


def test_queued_restart_past_its_deadline_counts_as_a_failure() -> None:
    run = restarting(deadline_s=7.0)
    timer = run.crash().timer("restart")
    run.emptied().expire(timer)
    first = run.timer("deadline")
    run.go(W)
    run.expire(first)
    run.expire(run.timer("restart"))
    second = run.timer("deadline")
    run.expire(second)
    assert run.state is W
    assert run.ctx.queue == ()
    assert run.recovery == ("waiting", 3)
    assert run.timer("restart").generation == second.generation


@pytest.mark.parametrize("state", [D, S, W])
def test_load_that_is_due_when_the_restart_is_takes_its_place(state: State) -> None:
    """The restart must not replace the model that was loaded after the crash."""
    run = restarting(deadline_s=7.0)
    timer = run.crash().timer("restart")
    run.emptied().expire(timer)
    deadline = run.timer("deadline")
    run.go(state)
    run.expire(deadline)
    again = run.timer("restart")
    newer = run.load(C)
    run.expire(again)
    assert (run.state, run.recovery, run.commands) == (state, None, ())
    assert [job.target.request.model_path for job in run.ctx.queue] == [C]
    run.settle()
    assert (run.category(newer), run.model, run.ctx.generation) == ("loaded", C, 3)


def test_stale_restart_timer_changes_nothing_while_a_load_is_due() -> None:
    run = restarting()
    timer = run.crash().timer("restart")
    run.emptied().expire(timer)
    run.load(B, on_busy="queue")
    before = run.ctx
    run.fire("restart", timer.generation)
    assert (run.kinds, run.ctx) == ([DropStale], before)
    assert run.recovery == ("trying", 1)


def test_promoted_load_takes_the_place_of_a_restart_in_idle() -> None:
    run = restarting()
    timer = run.crash().timer("restart")
    run.emptied()
    newer = run.load("o/B")
    run.resolved(2, "o/B")
    (promotion,) = run.commands_of(Post)
    run.expire(timer)
    assert (run.state, run.recovery) == (I, None)
    run.do(promotion.fact).settle()
    assert (run.category(newer), run.model, run.ctx.generation) == ("loaded", "o/B", 2)


def test_stable_server_resets_the_count() -> None:
    run = restarting()
    for held_s, failures in ((1, 1), (1, 2), (60, 1), (1, 2)):
        run.now += held_s
        timer = run.crash().timer("restart")
        assert run.recovery == ("waiting", failures)
        run.emptied().expire(timer).settle()


@pytest.mark.parametrize("end", ["unload", "unload A", "shutdown", "load B"])
def test_unload_shutdown_and_another_load_end_the_planned_restart(end: str) -> None:
    """B16: the server must not start after an unload."""
    run = restarting()
    timer = run.crash().timer("restart")
    run.emptied()
    if end == "shutdown":
        run.shutdown()
    elif end == "load B":
        run.load(B)
    else:
        run.unload(A if end.endswith("A") else None)
    run.settle()
    before = (run.state, run.ctx)
    run.expire(timer)
    assert (run.state, run.ctx) == before
    assert run.model == (B if end == "load B" else None)


def test_lease_waits_for_a_planned_restart() -> None:
    run = restarting()
    timer = run.crash().timer("restart")
    during = run.lease()
    run.emptied()
    after = run.lease()
    assert not run.answers.keys() & {during, after}
    run.expire(timer)
    run.settle()
    assert run.answers.keys() >= {during, after}


def test_restart_can_be_cancelled_by_its_generation() -> None:
    run = restarting()
    timer = run.crash().timer("restart")
    run.emptied().expire(timer)
    run.go(D)
    cancel = run.cancel(generation=2)
    run.settle()
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert (run.state, run.ctx.recovery) == (I, None)


def test_no_restart_into_a_slot_that_cannot_be_emptied() -> None:
    """B06."""
    run = restarting()
    timer = run.crash().timer("restart")
    run.kill_failed()
    run.expire(timer)
    assert (run.state, run.ctx.recovery) == (I, None)


def test_plan_raises_the_error_of_the_load() -> None:
    run = restarting(replace(RULES, limit=1))
    run.crash_and_restart()
    run.crash()
    run.emptied()
    wanted = target(LoadRequest(model_path=A))
    with pytest.raises(ServerStartFailed) as caught:
        plan_load(run.state, run.ctx, wanted, at=run.now)
    assert caught.value.problem == run.problem(run.load(A))
    over = plan_load(run.state, run.ctx, wanted, at=run.now + 200).plan
    assert over.action == "load"
    busy = target(LoadRequest(model_path=C, on_busy="reject"))
    run.load(B)
    with pytest.raises(Busy):
        plan_load(run.state, run.ctx, busy, at=run.now)


# ------------------------------------------------------------------------------------------ numbers


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 10_000), st.integers(1, 10_000))
def test_backoff_grows_and_never_exceeds_its_ceiling(
    base: float, ceiling: float, failures: int, more: int
) -> None:
    rules = RestartPolicy(backoff_s=base, backoff_max_s=ceiling)
    first, later = backoff_s(rules, failures), backoff_s(rules, failures + more)
    assert 0 <= first <= later <= ceiling
    assert backoff_s(rules, 1) == min(base, ceiling)


@given(st.lists(st.floats(0, 120), max_size=30))
def test_failures_are_counted_in_a_row_and_bounded(held: list[float]) -> None:
    wanted = target(LoadRequest(model_path=A))
    last: Recovery | None = None
    in_a_row = 0
    for ran_s in held:
        ended = Problem("server_exited", "x")
        last = after_failure(RULES, last, wanted, Generation(1), ended, at=0.0, ran_s=ran_s)
        in_a_row = 1 if ran_s >= RULES.stable_after_s else in_a_row + 1
        assert last.failures == in_a_row
        assert (last.phase == "cooling_down") == (in_a_row > RULES.limit)


def test_another_model_starts_its_own_count() -> None:
    run = restarting()
    run.crash_and_restart()
    run.load(C)
    run.settle()
    run.crash()
    assert run.ctx.recovery is not None
    assert (run.ctx.recovery.failures, run.ctx.recovery.target.request.model_path) == (1, C)
