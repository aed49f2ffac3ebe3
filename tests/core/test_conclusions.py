"""What is reported of a load that ends: its answer, its times, and why its token was set."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.base.tokens import CancelReason, Generation
from orchestrator.errors import Problem
from orchestrator.machine.actions.working import require
from orchestrator.machine.commands import Concluded, Kill, Loaded, Timings
from orchestrator.machine.context import EffectInFlight, Policy
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.machine.states import State
from tests.kit.machine.run import A, B, C, D, H, I, K, Run, S, W, healthy, in_flight
from tests.kit.sentences import assert_sentence

HUB, OTHER_HUB = "o/B", "o/E"
RULES = RestartPolicy(backoff_s=4, backoff_max_s=60, limit=3, cool_down_s=100, stable_after_s=60)
USER, SUPERSEDED = CancelReason.USER, CancelReason.SUPERSEDED
SHUTDOWN, DEADLINE = CancelReason.SHUTDOWN, CancelReason.DEADLINE


def concluded(run: Run, generation: int) -> Concluded:
    """Return the conclusion of a load, which comes once."""
    (found,) = (c for c in run.history if c.generation == generation)
    return found


def problem_of(run: Run, generation: int) -> Problem:
    answer = concluded(run, generation).answer
    assert isinstance(answer, Problem)
    return answer


# -------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("state", "timings"),
    [
        (K, Timings(kill=4.0)),
        (D, Timings(kill=0.0, download=4.0)),
        (S, Timings(kill=0.0, download=0.0, spawn=4.0)),
        (W, Timings(kill=0.0, download=0.0, spawn=0.0, health=4.0)),
    ],
)
@pytest.mark.parametrize("end", ["fails", "cancelled", "superseded", "shut down", "unloaded"])
def test_load_is_concluded_with_the_time_of_the_phase_it_ended_in(
    state: State, timings: Timings, end: str
) -> None:
    run = Run()
    run.now = 10.0
    ticket = run.load(A)
    run.go(state)
    run.now = 14.0
    ends: dict[str, Callable[[], object]] = {
        "fails": run.fail,
        "cancelled": lambda: run.cancel(generation=1),
        "superseded": lambda: run.load(C),
        "shut down": run.shutdown,
        "unloaded": run.unload,
    }
    ends[end]()
    run.now = 20.0
    run.settle()
    end_of_load = concluded(run, 1)
    assert (end_of_load.timings, end_of_load.accepted_at) == (timings, 10.0)
    assert end_of_load.answer == run.problem(ticket)


def test_load_that_waits_for_leases_spends_that_time_in_kill() -> None:
    run = healthy()
    run.lease()
    run.now = 10.0
    run.load(B)
    run.now = 13.0
    run.cancel(generation=2)
    assert concluded(run, 2).timings == Timings(kill=3.0)


def cancel_queued(run: Run) -> None:
    run.cancel("x")


def unload_queued(run: Run) -> None:
    run.unload(HUB)


def time_out_queued(run: Run) -> None:
    run.fire("deadline", 2)


def supersede_queued(run: Run) -> None:
    run.load(C)


def leave_queued(run: Run) -> None:
    run.withdraw(run.ctx.queue[0].callers[0].ticket)


@pytest.mark.parametrize(
    ("end", "reason", "category", "sentence"),
    [
        (cancel_queued, USER, "cancelled", "machine.cancelled"),
        (unload_queued, USER, "cancelled", "machine.cancelled_by_unload"),
        (time_out_queued, DEADLINE, "deadline", "machine.deadline"),
        (supersede_queued, SUPERSEDED, "superseded", "machine.superseded"),
        (leave_queued, USER, "cancelled", "machine.abandoned"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_queued_load_is_concluded_with_its_answer_and_spent_no_phase(
    end: Callable[[Run], None], reason: CancelReason, category: str, sentence: str
) -> None:
    """Its history says who ended it, also if no caller is left to be answered."""
    run, _ = in_flight(W)
    ticket = run.load(HUB, on_busy="queue", load_request_id="x", deadline_s=3)
    run.now = 7.0
    end(run)
    assert (2, reason) in run.reasons()
    problem = problem_of(run, 2)
    assert (problem.category, problem.generation) == (category, 2)
    assert_sentence(sentence, problem.message, model=C, deadline_s="3.0")
    assert concluded(run, 2).timings == Timings()
    assert run.answers.get(ticket) == (None if end is leave_queued else problem)


def test_queued_load_that_finds_its_model_running_is_concluded_as_already_loaded() -> None:
    run, _ = in_flight(W)
    run.load(B, on_busy="queue")
    last = run.load(A, on_busy="queue")
    run.cancel(generation=2)
    run.settle()
    answer = concluded(run, 3).answer
    assert isinstance(answer, Loaded)
    assert (answer.already, answer.generation, answer) == (True, 1, run.loaded(last))


# ------------------------------------------------------------------------------------------- tokens


def busy() -> Run:
    """Return a machine with a load in flight, a load that awaits the Hub, and a prefetch."""
    run, _ = in_flight(D, deadline_s=5)
    run.load(HUB, on_busy="queue", load_request_id="queued", deadline_s=5)
    run.prefetch(OTHER_HUB, load_request_id="prefetch", deadline_s=5)
    return run


@pytest.mark.parametrize(
    ("end", "tokens"),
    [
        (lambda run: run.shutdown(), [(1, SHUTDOWN), (2, SHUTDOWN), (-1, SHUTDOWN)]),
        (lambda run: run.unload(), [(1, USER), (2, USER)]),
        (lambda run: run.unload(HUB), [(2, USER)]),
        (lambda run: run.load(C), [(2, SUPERSEDED), (1, SUPERSEDED)]),
        (lambda run: run.fire("deadline", 1), [(1, DEADLINE)]),
        (lambda run: run.fire("deadline", 2), [(2, DEADLINE)]),
        (lambda run: run.fire("deadline", -1), [(-1, DEADLINE)]),
        (lambda run: run.cancel(generation=1), [(1, USER)]),
        (lambda run: run.cancel("queued"), [(2, USER)]),
        (lambda run: run.cancel("prefetch"), [(-1, USER)]),
    ],
)
def test_token_says_why_its_load_was_ended(
    end: Callable[[Run], object], tokens: list[tuple[int, CancelReason]]
) -> None:
    run = busy()
    end(run)
    assert run.reasons() == tokens


def test_withdrawal_from_a_cancelled_load_sets_no_second_token() -> None:
    """Its callers wait for the empty slot, and the load is nobody's any more."""
    run, ticket = in_flight(W)
    run.unload()
    assert run.ctx.job is not None
    assert run.ctx.job.callers == ()
    run.withdraw(ticket)
    assert run.commands == ()
    assert run.settle().category(ticket) is None
    assert problem_of(run, 1).category == "cancelled"


def test_action_without_its_guard_is_an_error() -> None:
    """A row that lacks a guard must not act on a load that is not there."""
    with pytest.raises(LookupError) as raised:
        require(None)
    assert_sentence("machine.unguarded", str(raised.value))


# ------------------------------------------------------------------------------ restore and restart


def test_failed_restore_is_in_both_conclusions() -> None:
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.go(S).fail()
    assert run.history[1:] == [], "the restore is still open"
    run.go(S).fail()
    run.settle()
    failed, restore = problem_of(run, 2), problem_of(run, 3)
    assert failed == run.problem(ticket)
    assert failed.restored is not None
    assert failed.restored.problem == restore
    assert (restore.category, restore.generation) == ("server_start_failed", 3)


def test_older_call_is_superseded_by_a_load_whose_caller_left_during_the_restore() -> None:
    run = healthy()
    older = run.ticket()
    newest = run.load(B, restore_previous=True)
    run.go(S).fail()
    run.withdraw(newest)
    run.load(C, ticket=older)
    assert run.category(older) == "superseded"
    assert run.settle().model == A


def test_older_call_than_the_running_load_is_superseded_after_a_newer_one_was_withdrawn() -> None:
    run = Run()
    oldest = run.ticket()
    run.load(A)
    run.settle()
    run.withdraw(run.load(HUB))
    run.load(C, ticket=oldest)
    assert (run.category(oldest), run.model) == ("superseded", A)


def test_loads_are_concluded_once_when_the_slot_is_empty_or_cannot_be_emptied() -> None:
    """What was answered and concluded is not kept for the next time."""
    for fails in (False, True):
        run, ticket = in_flight(W)
        unload = run.unload()
        run.fail()
        if fails:
            run.kill_failed()
            assert run.problem(unload).category == "slot_occupied"
        else:
            run.emptied()
        assert (run.ctx.waiters, run.ctx.ending) == ((), ())
        assert run.category(ticket) == "cancelled"
        again = run.load(B)
        assert run.settle().category(again) == "loaded"
        assert [c.generation for c in run.history] == [1, 2]


def test_end_of_each_server_is_reported() -> None:
    """What is known of one server says nothing about the next."""
    run = healthy()
    run.crash()
    assert run.ended() == [(41, "signal")]
    run.emptied()
    run.load(B)
    run.settle().crash(3)
    assert run.ended() == [(42, "exit")]
    run.emptied()
    run.load(C)
    run.settle().unload()
    run.emptied()
    assert run.ended() == [(43, "stopped")]


def test_kill_is_that_of_the_load_in_flight_not_of_the_newest() -> None:
    """Its token ends the kill of that load only."""
    run, _ = in_flight(D)
    run.load(B, on_busy="queue")
    run.load(C, on_busy="queue")
    run.go(H).promote()
    assert run.commands_of(Kill) == [Kill(Generation(2), run.ctx.child)]
    assert run.ctx.effect == EffectInFlight("kill", Generation(2))


def test_restart_is_over_when_its_server_is_stopped_for_being_idle() -> None:
    run = Run(Policy(restart=RULES, idle_ttl_s=5))
    run.load(A)
    run.settle().crash_and_restart()
    assert run.recovery == ("trying", 1)
    run.now += 5.0
    run.fire("idle", 2)
    assert run.state is K
    run.emptied()
    assert (run.state, run.ctx.recovery) == (I, None)


def test_cancelled_restart_is_over_at_once() -> None:
    run = Run(Policy(restart=RULES))
    run.load(A)
    timer = run.settle().crash().timer("restart")
    run.emptied().expire(timer).go(W)
    run.cancel(generation=2)
    assert (run.state, run.ctx.recovery) == (W, None)


def test_failed_load_is_the_last_error_while_a_restart_is_planned() -> None:
    """The restart is of another model, and its plan stays."""
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.settle().crash()
    run.emptied()
    run.load(HUB)
    run.fetch_failed(2)
    assert (run.last_error.category, run.last_error.generation) == ("hub_unreachable", 2)
    assert (run.recovery, run.timers("restart")) == (("waiting", 1), [])


def test_failed_restart_is_not_repeated_if_a_load_is_due() -> None:
    run = Run(Policy(restart=RULES))
    run.load(A)
    timer = run.settle().crash().timer("restart")
    run.emptied().expire(timer)
    queued = run.load(B, on_busy="queue")
    run.go(S).fail()
    assert (run.last_error.message, run.timers("restart")) == ("it failed", [])
    assert run.last_error.generation == 2
    assert run.settle().category(queued) == "loaded"
