"""A failure made good: what ran before comes back, and a server that ended is started again.

The checker proves that no order of events breaks an invariant; these tests say what callers hear.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.tokens import Generation
from orchestrator.errors import Busy, Problem, ServerStartFailed
from orchestrator.machine.commands import CancelAnswer, Loaded, SetTimer, Unloaded
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Exit, Exited, TimerFired
from orchestrator.machine.plan import plan_load
from orchestrator.machine.recovery import Recovery, RestartPolicy, after_exit, backoff_s
from orchestrator.machine.states import State
from orchestrator.settings.request import LoadRequest
from tests.core.test_machine import A, B, C, D, H, I, K, Run, S, W
from tests.kit.machine.world import target

RULES = RestartPolicy(backoff_s=1, backoff_max_s=5, limit=3, cool_down_s=100, stable_after_s=60)


class Crashing(Run):
    """A run whose healthy server may end by itself."""

    def crash(self) -> None:
        assert self.ctx.running is not None
        generation, pid = self.ctx.running.generation, self.ctx.running.child.pid
        self.do(Exited(generation, self.now, Exit(pid, -11, ("it crashed",))))

    def timer(self) -> SetTimer:
        return next(c for c in self.commands if isinstance(c, SetTimer) and c.kind == "restart")

    def pass_time(self, timer: SetTimer) -> None:
        self.now += timer.after_s
        self.do(TimerFired(timer.generation, self.now, timer.kind))

    def crash_and_come_back(self) -> None:
        self.crash()
        timer = self.timer()
        self.emptied()
        self.pass_time(timer)
        self.settle()

    def model(self) -> str | None:
        return self.ctx.running.target.request.model_path if self.ctx.running else None


def healthy(rules: RestartPolicy | None = None, **options: Any) -> Crashing:
    run = Crashing(Policy(restart=rules))
    run.load(A, **options)
    run.go(H)
    return run


def problem(run: Run, ticket: int) -> Problem:
    answer = run.answers[ticket]
    assert isinstance(answer, Problem)
    return answer


# ---------------------------------------------------------------------------- restore_previous


@pytest.mark.parametrize("phase", [D, S, W])
def test_a_failed_replacement_brings_the_previous_model_back_and_reports_both(
    phase: State,
) -> None:
    """86 GB were unloaded for a model that does not start: what served before serves again."""
    run = healthy(llama_extra_args=["--seed", "7"])
    ticket = run.load(B, restore_previous=True)
    run.go(phase)
    run.fail()
    assert run.category(ticket) is None, "the other half of the answer is still to come"
    assert run.state is K
    run.settle()
    assert (run.state, run.model()) == (H, A)
    answer = problem(run, ticket)
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
    assert run.ctx.running is not None
    assert run.ctx.running.target.extra_args == ("--seed", "7"), "as it ran, to the flag"
    assert run.ctx.last_error == answer, "the failure is still to be seen in the status"


def test_a_previous_model_that_does_not_come_back_either_is_reported_too() -> None:
    """Both outcomes, also when both are bad; and the way on is open."""
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(S)
    run.fail()
    run.go(S)
    run.fail()
    run.settle()
    answer = problem(run, ticket)
    assert run.state is I
    assert answer.restored is not None
    assert answer.restored.problem is not None
    assert answer.restored.problem.generation == 3
    assert answer.as_dict()["restored"]["status"] == "failed"
    assert run.ctx.last_error == answer
    again = run.load(B)
    assert run.settle().category(again) == "loaded"


def test_what_comes_back_has_the_time_it_was_loaded_with() -> None:
    """It may warm up for ever, and somebody waits to hear of it: a bound once given holds."""
    run = healthy(deadline_s=7.0)
    ticket = run.load(B, restore_previous=True)
    run.go(W)
    run.fail()
    (timer,) = (c for c in run.commands if isinstance(c, SetTimer))
    assert (timer.generation, timer.kind, timer.after_s) == (3, "deadline", 7.0)
    run.go(W)
    run.pass_time(timer)
    assert run.category(ticket) is None, "its server still has to end"
    run.fail().emptied()
    answer = problem(run, ticket)
    assert (run.state, answer.category) == (I, "server_start_failed")
    assert answer.restored is not None
    assert answer.restored.problem is not None
    assert answer.restored.problem.category == "deadline"
    assert run.ctx.last_error == answer


def test_without_restore_previous_nothing_comes_back() -> None:
    run = healthy()
    ticket = run.load(B)
    run.go(S)
    run.fail()
    run.settle()
    assert (run.state, run.category(ticket)) == (I, "server_start_failed")
    assert problem(run, ticket).restored is None


def test_there_is_nothing_to_restore_where_nothing_ran() -> None:
    """From Idle, and after an unload: a failure is just a failure."""
    run = healthy()
    run.unload()
    run.settle()
    ticket = run.load(B, restore_previous=True)
    run.go(S)
    run.fail()
    run.settle()
    assert (run.state, run.category(ticket)) == (I, "server_start_failed")


def test_the_deadline_of_a_replacement_is_a_failure_too() -> None:
    """The effect in flight ends first; then what ran before is on its way."""
    run = healthy()
    ticket = run.load(B, restore_previous=True, deadline_s=1)
    run.go(D)
    run.do(TimerFired(Generation(2), 1.0, "deadline"))
    assert run.state is D
    run.settle()
    assert (run.model(), run.category(ticket)) == (A, "deadline")


@pytest.mark.parametrize("end", ["cancel", "unload", "withdraw"])
def test_who_ends_a_replacement_does_not_want_the_previous_model_back(end: str) -> None:
    """Stop means stop; only a failure brings something back."""
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


def test_a_load_asked_for_meanwhile_comes_first() -> None:
    """The queue is what the user wants next; and that one may still go back to what ran."""
    run = healthy()
    first = run.load(B, restore_previous=True)
    run.go(D)
    second = run.load(C, on_busy="queue", restore_previous=True)
    run.fail()
    run.emptied()
    assert problem(run, first).restored is None
    run.go(S)
    run.fail()
    run.settle()
    assert (run.model(), run.category(second)) == (A, "server_start_failed")


def test_a_newer_load_supersedes_what_comes_back() -> None:
    """Its caller hears how its own load failed, and that nothing came back."""
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(S)
    run.fail()
    newer = run.load(C)
    answer = problem(run, ticket)
    assert answer.category == "server_start_failed"
    assert answer.restored is not None
    assert answer.restored.problem is not None
    assert answer.restored.problem.category == "superseded"
    assert run.settle().category(newer) == "loaded"


def test_who_asks_for_what_comes_back_joins_it() -> None:
    """And hears `loaded`, while the other hears of its failure."""
    run = healthy()
    failed = run.load(B, restore_previous=True)
    run.go(S)
    run.fail()
    joined = run.load(A)
    run.settle()
    answer = run.answers[joined]
    assert isinstance(answer, Loaded)
    assert (answer.joined, answer.generation) == (True, 3)
    assert run.category(failed) == "server_start_failed"


def test_a_cancel_of_the_failed_load_does_not_touch_what_comes_back() -> None:
    """B21, B22: a late cancel is late."""
    run = healthy()
    run.load(B, restore_previous=True, load_request_id="x")
    run.go(S)
    run.fail()
    late = run.cancel("x")
    assert run.answers[late] == CancelAnswer(cancelled=False)
    assert run.settle().model() == A


def test_nobody_has_to_wait_for_what_comes_back() -> None:
    """The previous model served everybody: it comes back though the caller has gone."""
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(S)
    run.fail()
    run.withdraw(ticket)
    assert run.settle().model() == A


def test_an_unload_of_the_previous_model_keeps_it_away() -> None:
    """It was asked for while the replacement was on its way."""
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(D)
    unload = run.unload(A)
    assert run.answers[unload] == Unloaded(changed=False)
    run.fail()
    run.settle()
    assert (run.state, run.category(ticket)) == (I, "server_start_failed")


# ---------------------------------------------------------------------------- restart on-crash


def test_a_crashed_server_is_started_again_with_what_it_had() -> None:
    """B55: a crash is answered; nobody asked, and the settings are the same."""
    run = healthy(RULES, max_seq_length=512)
    before = run.ctx.running
    run.crash()
    timer = run.timer()
    assert (run.state, timer.after_s) == (K, 1.0)
    run.emptied()
    assert (run.state, run.ctx.wanted) == (I, ())
    run.pass_time(timer)
    assert run.state is K
    run.settle()
    assert run.ctx.running is not None
    assert before is not None
    assert (run.state, run.ctx.running.generation) == (H, 2)
    assert run.ctx.running.target == before.target
    assert run.ctx.last_error is not None
    assert run.ctx.last_error.category == "server_exited"


def test_by_default_a_crash_is_answered_with_nothing() -> None:
    run = healthy()
    run.crash()
    assert not [c for c in run.commands if isinstance(c, SetTimer)]
    assert (run.settle().state, run.ctx.recovery) == (I, None)
    assert run.ctx.last_error is not None
    assert "load the model again" in run.ctx.last_error.message


def test_restarts_back_off_up_to_a_ceiling_and_end_in_a_cool_down() -> None:
    """A server that cannot live must not be started for ever; and whoever asks hears when."""
    run = healthy(replace(RULES, limit=4))
    waits = []
    for _ in range(4):
        run.crash()
        waits.append(run.timer().after_s)
        timer = run.timer()
        run.emptied()
        run.pass_time(timer)
        run.settle()
        assert run.state is H
    assert waits == [1, 2, 4, 5]
    run.crash()
    assert not [c for c in run.commands if isinstance(c, SetTimer)]
    run.emptied()
    run.now += 30
    refused = problem(run, run.load(A))
    assert (refused.category, refused.reason) == ("server_start_failed", "cooling_down")
    assert refused.retry_after_s == 70
    assert refused.log_tail == ("it crashed",)
    assert problem(run, run.lease()).retry_after_s == 70
    run.now += 70
    again = run.load(A)
    assert run.settle().category(again) == "loaded"


def test_in_a_cool_down_too_an_older_call_is_superseded() -> None:
    """It would be told to change what fails, though a newer call has decided already."""
    run = healthy(replace(RULES, limit=1))
    run.crash_and_come_back()
    older = run.ticket()
    assert run.category(run.load(A)) == "already"
    run.crash()
    run.emptied()
    run.load(A, ticket=older)
    assert run.category(older) == "superseded"


@pytest.mark.parametrize("options", [{"max_seq_length": 512}, {"force_reload": True}])
def test_a_cool_down_refuses_only_what_failed(options: dict[str, Any]) -> None:
    """B49: no dead end. Other settings may do better, and force is force."""
    run = healthy(replace(RULES, limit=1))
    run.crash_and_come_back()
    run.crash()
    run.emptied()
    assert run.category(run.load(A)) == "server_start_failed"
    other = run.load(A, **options)
    assert run.settle().category(other) == "loaded"
    assert run.ctx.recovery is None


def test_a_restart_that_fails_counts_like_a_crash() -> None:
    run = healthy(RULES)
    run.crash()
    timer = run.timer()
    run.emptied()
    run.pass_time(timer)
    run.go(S)
    run.fail()
    assert run.timer().after_s == 2
    assert run.ctx.recovery is not None
    assert run.ctx.recovery.failures == 2
    assert run.ctx.last_error is not None
    assert run.ctx.last_error.category == "server_start_failed"


@pytest.mark.parametrize("state", [K, D, S, W])
def test_a_restart_that_takes_longer_than_was_granted_counts_as_failed(state: State) -> None:
    """The next one is planned at once, and not lost when its time comes before the end of this."""
    run = healthy(RULES, deadline_s=7.0)
    run.crash()
    timer = run.timer()
    run.emptied()
    run.pass_time(timer)
    deadline = next(c for c in run.commands if isinstance(c, SetTimer) and c.kind == "deadline")
    run.go(state)
    run.pass_time(deadline)
    assert run.ctx.recovery is not None
    assert (run.ctx.recovery.phase, run.ctx.recovery.failures) == ("waiting", 2)
    assert run.ctx.last_error is not None
    assert run.ctx.last_error.category == "deadline"
    assert "restart 2 of 3 follows" in run.ctx.last_error.message
    again = run.timer()
    assert run.state is state
    run.pass_time(again)
    assert len(run.ctx.wanted) == 1
    run.settle()
    assert (run.state, run.model()) == (H, A)


def test_a_restart_that_never_had_its_turn_within_its_time_counts_too() -> None:
    """The end of the one before it took longer than all the time this one was granted."""
    run = healthy(RULES, deadline_s=7.0)
    run.crash()
    timer = run.timer()
    run.emptied()
    run.pass_time(timer)
    first = next(c for c in run.commands if isinstance(c, SetTimer))
    run.go(W)
    run.pass_time(first)
    run.pass_time(run.timer())
    second = next(c for c in run.commands if isinstance(c, SetTimer))
    run.pass_time(second)
    assert run.state is W
    assert run.ctx.queue == ()
    assert run.ctx.recovery is not None
    assert (run.ctx.recovery.phase, run.ctx.recovery.failures) == ("waiting", 3)
    assert run.timer().generation == second.generation


def test_a_server_that_held_for_a_while_starts_the_count_again() -> None:
    run = healthy(RULES)
    for held_s, failures in ((1, 1), (1, 2), (60, 1), (1, 2)):
        run.now += held_s
        run.crash()
        assert run.ctx.recovery is not None
        assert run.ctx.recovery.failures == failures
        timer = run.timer()
        run.emptied()
        run.pass_time(timer)
        run.settle()


@pytest.mark.parametrize("end", ["unload", "unload A", "shutdown", "load B"])
def test_whoever_says_something_else_ends_the_planned_restart(end: str) -> None:
    """B16: the server must not start after the user said stop."""
    run = healthy(RULES)
    run.crash()
    timer = run.timer()
    run.emptied()
    if end == "shutdown":
        run.shutdown()
    elif end == "load B":
        run.load(B)
    else:
        run.unload(A if end.endswith("A") else None)
    run.settle()
    before = (run.state, run.ctx)
    run.pass_time(timer)
    assert (run.state, run.ctx) == before
    assert run.model() == (B if end == "load B" else None)


def test_a_lease_waits_for_a_planned_restart() -> None:
    """A request in the gap is held, not refused; it gets the new server."""
    run = healthy(RULES)
    run.crash()
    timer = run.timer()
    during = run.lease()
    run.emptied()
    after = run.lease()
    assert not run.answers.keys() & {during, after}
    run.pass_time(timer)
    run.settle()
    assert run.answers.keys() >= {during, after}


def test_a_restart_can_be_cancelled_by_its_generation() -> None:
    run = healthy(RULES)
    run.crash()
    timer = run.timer()
    run.emptied()
    run.pass_time(timer)
    run.go(D)
    cancel = run.cancel(generation=2)
    run.settle()
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert (run.state, run.ctx.recovery) == (I, None)


def test_a_slot_that_cannot_be_emptied_is_not_restarted_into() -> None:
    """B06: what will not die keeps the slot; nothing starts beside it by itself."""
    run = healthy(RULES)
    run.crash()
    timer = run.timer()
    run.kill_failed()
    run.pass_time(timer)
    assert (run.state, run.ctx.recovery) == (I, None)


def test_a_plan_says_what_a_load_would_hear() -> None:
    """What would be refused at once is refused in the plan too, in the same words."""
    run = healthy(replace(RULES, limit=1))
    run.crash_and_come_back()
    run.crash()
    run.emptied()
    wanted = target(LoadRequest(model_path=A))
    with pytest.raises(ServerStartFailed) as caught:
        plan_load(run.state, run.ctx, wanted, at=run.now)
    assert caught.value.problem == problem(run, run.load(A))
    over = plan_load(run.state, run.ctx, wanted, at=run.now + 200)
    assert over.action == "load"
    busy = target(LoadRequest(model_path=C, on_busy="reject"))
    run.load(B)
    with pytest.raises(Busy):
        plan_load(run.state, run.ctx, busy, at=run.now)


# ------------------------------------------------------------------------------------- numbers


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_wait_grows_and_never_passes_its_ceiling(
    base: float, ceiling: float, failures: int, more: int
) -> None:
    rules = RestartPolicy(backoff_s=base, backoff_max_s=ceiling)
    first, later = backoff_s(rules, failures), backoff_s(rules, failures + more)
    assert 0 <= first <= later <= ceiling
    assert backoff_s(rules, 1) == min(base, ceiling)


@given(st.lists(st.floats(0, 120), max_size=30))
def test_failures_in_a_row_are_bounded_and_a_stable_server_forgives(held: list[float]) -> None:
    """Whatever the history: a plan or a cool-down follows, and the count is that of one row."""
    wanted = target(LoadRequest(model_path=A))
    last: Recovery | None = None
    in_a_row = 0
    for ran_s in held:
        last = after_exit(
            RULES,
            last,
            target=wanted,
            generation=Generation(1),
            ran_s=ran_s,
            at=0.0,
            problem=Problem("server_exited", "x"),
        )
        in_a_row = 1 if ran_s >= RULES.stable_after_s else in_a_row + 1
        assert last.failures == in_a_row
        assert (last.phase == "cooling_down") == (in_a_row > RULES.limit)


def test_another_model_starts_its_own_count() -> None:
    run = healthy(RULES)
    run.crash_and_come_back()
    run.load(C)
    run.settle()
    run.crash()
    assert run.ctx.recovery is not None
    assert (run.ctx.recovery.failures, run.ctx.recovery.target.request.model_path) == (1, C)
