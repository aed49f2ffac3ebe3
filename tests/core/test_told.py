"""What people are told when a load, a lease or a server ends: the sentence, and what goes with it.

A sentence of an error is part of the interface: it says what to do, and it is all that a log shows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import DropStale, Kill, LeaseGranted, SetTimer
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Exit, Exited, Promoted, TimerFired, UnloadRequested
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.machine.states import State
from tests.core.test_machine import HELD, A, B, C, D, H, I, K, Run, S, W, healthy, in_flight

RULES = RestartPolicy(backoff_s=4, backoff_max_s=60, limit=1, cool_down_s=100, stable_after_s=60)


def told(run: Run, ticket: int) -> Problem:
    answer = run.answers[ticket]
    assert isinstance(answer, Problem)
    return answer


def phase(run: Run) -> str | None:
    return run.ctx.recovery.phase if run.ctx.recovery else None


def crash(run: Run, returncode: int | None = -11) -> None:
    assert run.ctx.running is not None
    generation, pid = run.ctx.running.generation, run.ctx.running.child.pid
    run.do(Exited(generation, run.now, Exit(pid, returncode, ("it crashed",))))


def test_a_load_after_the_shutdown() -> None:
    run = Run()
    run.shutdown()
    assert told(run, run.load(A)).message == "the orchestrator is shutting down"
    assert told(run, run.lease()).message == "the orchestrator is shutting down"


def test_a_load_that_was_cancelled_before_it_came() -> None:
    run = Run()
    run.cancel("x")
    ticket = run.load(A, load_request_id="x")
    assert told(run, ticket).message == "this load was cancelled before it arrived"


def test_a_load_that_came_after_a_newer_one() -> None:
    run = Run()
    older = run.ticket()
    run.load(B)
    run.load(A, ticket=older)
    assert told(run, older).message == "superseded by a load that was asked for later"


def test_a_load_that_is_superseded_hears_by_what() -> None:
    run, ticket = in_flight(D)
    run.load(B)
    assert told(run, ticket).message == "superseded by a newer load of B"
    assert told(run, ticket).generation == 1


def test_a_load_that_may_not_disturb_hears_what_it_could_do() -> None:
    run, _ = in_flight(D)
    busy = told(run, run.load(B, on_busy="reject"))
    assert (busy.field, busy.generation) == ("on_busy", 1)
    assert busy.message == (
        "load 1 of A is in flight: wait for it, cancel it, or use on_busy supersede or queue"
    )


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ("cancel", "cancelled by the caller"),
        ("unload", "ended by an unload"),
        ("shutdown", "ended by the shutdown"),
        ("deadline", "not healthy within deadline_s = 3.0"),
    ],
)
def test_a_load_that_is_ended_hears_by_whom(end: str, sentence: str) -> None:
    run, ticket = in_flight(D, deadline_s=3)
    match end:
        case "cancel":
            run.cancel(generation=1)
        case "unload":
            run.unload()
        case "shutdown":
            run.shutdown()
        case _:
            run.do(TimerFired(Generation(1), 3.0, "deadline"))
    run.settle()
    problem = told(run, ticket)
    assert (problem.message, problem.generation) == (sentence, 1)
    assert problem.field == ("deadline_s" if end == "deadline" else None)


def test_a_queued_load_that_is_too_late() -> None:
    run, _ = in_flight(D)
    ticket = run.load(B, on_busy="queue", deadline_s=3)
    run.do(TimerFired(Generation(2), 3.0, "deadline"))
    assert (told(run, ticket).field, told(run, ticket).generation) == ("deadline_s", 2)


def test_a_queued_load_that_is_cancelled_by_id_and_by_generation() -> None:
    for cancel in ({"name": "x"}, {"generation": 2}):
        run, _ = in_flight(D)
        ticket = run.load(B, on_busy="queue", load_request_id="x")
        run.cancel(**cancel)
        problem = told(run, ticket)
        assert (problem.message, problem.generation) == ("cancelled by the caller", 2)


def test_a_server_that_ended_in_the_moment_it_became_ready() -> None:
    run, ticket = in_flight(W)
    run.ready(alive=False)
    run.settle()
    problem = told(run, ticket)
    assert (problem.category, problem.reason) == ("server_start_failed", "exited")
    assert problem.message == "the server ended in the moment it became ready; see its output"


def test_a_slot_that_does_not_stay_empty() -> None:
    run, ticket = in_flight(D)
    for _ in range(3):
        run.fetched(HELD)
        run.emptied()
    run.fetched(HELD)
    run.settle()
    sentence = "the slot is not empty: the slot's lock is held; unload to try again"
    assert (told(run, ticket).message, told(run, ticket).generation) == (sentence, 1)


def test_who_waits_behind_a_load_whose_slot_is_occupied_is_next() -> None:
    """The third look is the last for this load, and not for those behind it."""
    run, ticket = in_flight(D)
    waiting = run.load(B, on_busy="queue")
    for _ in range(3):
        run.fetched(HELD)
        run.emptied()
    run.fetched(HELD)
    assert run.settle().category(waiting) == "loaded"
    assert told(run, ticket).category == "slot_occupied"


def test_a_slot_that_fills_again_costs_time_that_is_booked_once() -> None:
    """Each phase is what it took, and together they are no more than the whole."""
    run = Run()
    ticket = run.load(A)
    for end in (run.emptied, lambda: run.fetched(HELD), run.emptied, run.fetched, run.spawned):
        run.now += 1.0
        end()
    run.now += 1.0
    run.ready()
    timings = run.answers[ticket].timings  # type: ignore[union-attr]
    assert (timings.kill, timings.download, timings.spawn, timings.health) == (2, 1, 1, 1)
    assert timings.total == 6


def test_no_model() -> None:
    run = Run()
    assert told(run, run.lease()).message == "no model is loaded: load one first"


def test_a_lease_is_told_whose_it_is() -> None:
    run = healthy()
    ticket = run.lease()
    granted = run.answers[ticket]
    assert isinstance(granted, LeaseGranted)
    assert granted.ticket == ticket


@pytest.mark.parametrize(
    ("returncode", "how"),
    [
        (None, "with an unknown status"),
        (-9, "by signal 9"),
        (0, "with exit status 0"),
        (1, "with exit status 1"),
    ],
)
def test_a_server_that_ends_by_itself_is_told_how(returncode: int | None, how: str) -> None:
    run = healthy()
    crash(run, returncode)
    shown = run.ctx.last_error
    assert shown is not None
    assert shown.message == f"the server ended by itself {how}: load the model again"
    assert (shown.generation, shown.log_tail) == (1, ("it crashed",))
    assert run.ctx.last_exit == Exit(41, returncode, ("it crashed",))


def test_a_server_that_ends_while_something_else_is_wanted() -> None:
    """Nothing is restarted, whatever was planned before: what is wanted comes next."""
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.go(H)
    run.load(B, on_busy="queue")
    run.load(C, on_busy="queue")
    run.go(H)
    assert run.ctx.queue
    crash(run)
    shown = run.ctx.last_error
    assert shown is not None
    assert shown.message == "the server ended by itself by signal 11: something else is loaded"
    assert run.ctx.recovery is None
    assert run.settle().state is H


def test_nobody_waits_for_the_leases_of_a_server_that_has_ended() -> None:
    """Its users have noticed; the slot is verified at once, and not after the drain time."""
    for is_draining in (False, True):
        run = healthy()
        run.lease()
        if is_draining:
            run.load(B)
            assert run.state is K
            assert not run.began(Kill)
        crash(run)
        assert run.began(Kill)
        assert run.ctx.leases == frozenset()
        assert run.ctx.last_exit is not None
        assert run.ctx.last_exit.returncode == -11


def test_a_late_exit_of_an_earlier_server_cuts_nobody_off() -> None:
    """Its exit is noticed after another has taken its place, and is being drained."""
    run = healthy()
    run.load(B)
    run.go(H)
    lease = run.lease()
    run.load(C)
    before = run.ctx
    run.do(Exited(Generation(1), run.now, Exit(41, -15)))
    assert (run.state, run.ctx) == (K, before)
    assert run.ctx.leases == {lease}


def test_a_lease_that_waits_hears_when_the_slot_cannot_be_emptied() -> None:
    """There is nothing to wait for any more."""
    run, _ = in_flight(K)
    lease = run.lease()
    run.kill_failed()
    assert (run.state, run.category(lease)) == (I, "not_loaded")


def test_a_planned_restart_and_the_end_of_them() -> None:
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.go(H)
    crash(run)
    first = run.ctx.last_error
    assert first is not None
    sentence = "the server ended by itself by signal 11; restart 1 of 1 follows within 4 s"
    assert (first.message, first.generation) == (sentence, 1)
    assert run.ctx.recovery is not None
    assert run.ctx.recovery.generation == 1
    run.emptied()
    waiting = run.lease()
    run.do(TimerFired(Generation(1), run.now, "restart"))
    assert (run.state, run.ctx.generation) == (K, 2)
    run.go(S)
    run.fail()
    run.settle()
    last = run.ctx.last_error
    assert last is not None
    assert last.message == "it failed; that was restart 1 of 1: nothing is started for 100 s"
    run.now += 99.5
    for refused in (told(run, waiting), told(run, run.load(A))):
        assert refused.message.startswith("A failed 2 times in a row and is not started for anoth")
        assert refused.message.endswith(" s: change what fails, or set force_reload")
        assert (refused.reason, refused.generation) == ("cooling_down", 2)
    assert told(run, run.lease()).retry_after_s == 0.5


def test_a_restart_that_holds_and_is_unloaded_leaves_no_plan() -> None:
    """`trying` is over when nothing runs any more: the next crash counts from one."""
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.go(H)
    crash(run)
    run.emptied()
    run.do(TimerFired(Generation(1), run.now, "restart"))
    run.go(D)
    run.cancel(generation=2)
    run.settle()
    assert (run.state, run.ctx.recovery, run.ctx.previous) == (I, None, None)


@pytest.mark.parametrize("end", ["held", "unloaded", "shut down", "failed"])
def test_what_ran_before_is_forgotten_with_every_end(end: str) -> None:
    """A failure much later must not bring back what nobody remembers."""
    run = healthy()
    run.load(B)
    assert run.ctx.previous is not None
    match end:
        case "unloaded":
            run.unload()
        case "shut down":
            run.shutdown()
            assert run.ctx.previous is None
        case "failed":
            run.go(S)
            run.fail()
        case _:
            pass
    run.settle()
    assert run.state is (H if end == "held" else I)
    assert run.ctx.previous is None


def test_an_unload_of_another_model_leaves_what_ran_before_to_come_back() -> None:
    """It names what is neither running nor wanted: nothing changes."""
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.unload(C)
    run.go(S)
    run.fail()
    run.settle()
    restored = told(run, ticket).restored
    assert restored is not None
    assert (restored.model_path, restored.gguf_variant, run.state) == (A, None, H)


def test_the_variant_that_comes_back_is_named() -> None:
    """Two variants of one model: the caller hears which of them serves again."""
    run = Run()
    run.load(A)
    run.go(D)
    assert run.ctx.job is not None
    found = replace(run.ctx.job.target.model, variant="Q4_0")
    run.ctx = replace(
        run.ctx, job=replace(run.ctx.job, target=replace(run.ctx.job.target, model=found))
    )
    run.go(H)
    ticket = run.load(B, restore_previous=True)
    run.go(S)
    run.fail()
    run.settle()
    restored = told(run, ticket).restored
    assert restored is not None
    assert (restored.generation, restored.gguf_variant) == (3, "Q4_0")
    assert run.ctx.generation == 3


def test_every_unload_is_remembered_by_its_name_and_once() -> None:
    """A load on its way is ended by the unload that came after it, not by one of another model."""
    run = Run()
    older = run.ticket()
    for model in (A, B, A):
        run.do(UnloadRequested(run.ticket(), model, run.now))
        run.settle()
    assert [name for name, _ in run.ctx.unloads] == [B, A]
    run.load(A, ticket=older)
    assert told(run, older).message == "this load was cancelled before it arrived"


def test_a_failure_of_the_kill_ends_every_load_and_leaves_nothing_running() -> None:
    """What is still alive is on record; what was wanted is over."""
    run = healthy()
    loads = [run.load(B), run.load(C, on_busy="queue")]
    run.kill_failed()
    assert (run.state, run.ctx.queue, run.ctx.running) == (I, (), None)
    assert [told(run, ticket).generation for ticket in loads] == [2, 3]
    assert run.ctx.child is not None


def test_one_of_two_callers_of_a_queued_load_cancels() -> None:
    """The other is still served, and the first is not told twice."""
    run, _ = in_flight(D)
    first = run.load(B, on_busy="queue", load_request_id="x")
    second = run.load(B, on_busy="queue", load_request_id="y")
    run.cancel("x")
    assert told(run, first).category == "cancelled"
    run.settle()
    assert run.category(second) == "loaded"


def test_a_queued_load_that_finds_its_model_running_decides_how_long_it_stays() -> None:
    """The newest request for a model says how long it is kept; and the queue goes on as ever."""
    run, first = in_flight(D)
    between = run.load(B, on_busy="queue")
    waiting = run.load(A, on_busy="queue", idle_ttl_s=5.0)
    run.cancel(generation=2)
    run.settle()
    assert [run.category(t) for t in (first, between, waiting)] == [
        "loaded",
        "cancelled",
        "already",
    ]
    assert run.ctx.running is not None
    assert run.ctx.running.target.request.idle_ttl_s == 5.0
    assert run.category(run.load(A, on_busy="queue")) == "already"


def test_a_queued_load_that_finds_its_model_running_gives_it_its_whole_time() -> None:
    """It counts as a use, as any load does that finds its model loaded."""
    run, _ = in_flight(D)
    between = run.load(B, on_busy="queue")
    run.load(A, on_busy="queue", idle_ttl_s=5.0)
    run.cancel(generation=2)
    assert run.category(between) == "cancelled"
    run.go(H)
    run.now += 10.0
    run.do(Promoted(Generation(3), run.now))
    assert SetTimer(Generation(1), "idle", 5.0) in run.commands
    assert run.ctx.running is not None
    assert run.ctx.running.idle_at == 15.0


def test_a_queued_load_whose_model_has_just_died_is_loaded() -> None:
    """B30: what ran is asked for its pulse in the step that answers."""
    run, _ = in_flight(D)
    run.load(B, on_busy="queue")
    waiting = run.load(A, on_busy="queue")
    run.cancel(generation=2)
    run.go(H)
    run.do(Promoted(Generation(3), run.now, child_is_alive=False))
    assert (run.state, run.category(waiting)) == (K, None)
    assert run.settle().category(waiting) == "loaded"


def test_a_promotion_of_nothing_is_fenced() -> None:
    """What waited was cancelled while its turn was on the way."""
    for run in (Run(), healthy()):
        before = run.state, run.ctx
        run.do(Promoted(Generation(7), run.now))
        assert (run.state, run.ctx) == before
        assert run.commands == (DropStale(Generation(7), "promote"),)


@pytest.mark.parametrize("state", [I, W])
def test_the_exit_of_a_server_is_noted_wherever_it_is_noticed(state: State) -> None:
    """How it ended is shown in the status; an exit of something else is nobody's."""
    if state is W:
        run, _ = in_flight(W)
    else:
        run = healthy()
        run.unload()
        run.kill_failed()
    assert run.state is state
    before = run.ctx
    run.do(Exited(Generation(9), run.now, Exit(99, -9)))
    assert (run.state, run.ctx, len(run.commands)) == (state, before, 1)
    run.do(Exited(Generation(1), run.now, Exit(41, -9)))
    assert run.ctx.last_exit == Exit(41, -9)
    assert run.state is (W if state is W else K), "an occupied slot is looked at again"
    assert not any(isinstance(command, DropStale) for command in run.commands)


@pytest.mark.parametrize("policy", [Policy(), Policy(abandoned_load="continue")])
def test_a_queued_load_whose_callers_have_gone_ends_unless_the_policy_wants_it(
    policy: Policy,
) -> None:
    """Nobody waits for it; one of two callers is somebody."""
    run = Run(policy)
    run.load(A)
    run.go(D)
    gone, shared = run.load(B, on_busy="queue"), run.load(C, on_busy="queue")
    run.load(C, on_busy="queue")
    run.withdraw(gone)
    run.withdraw(shared)
    kept = [job.target.request.model_path for job in run.ctx.queue]
    assert kept == ([C] if policy.abandoned_load == "cancel" else [B, C])


def test_a_restart_under_way_is_not_planned_any_more() -> None:
    """A plan that is carried out twice would be two loads."""
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.go(H)
    crash(run)
    run.emptied()
    run.unload(C)
    assert phase(run) == "waiting", "an unload of something else changes no plan"
    run.do(TimerFired(Generation(1), run.now, "restart"))
    assert phase(run) == "trying"


def test_while_what_ran_before_comes_back_the_failure_is_shown() -> None:
    """Whoever looks at the status meanwhile sees why a model nobody asked for is loading."""
    run = healthy()
    run.load(B, restore_previous=True)
    run.go(S)
    run.fail()
    shown = run.ctx.last_error
    assert shown is not None
    assert (shown.category, shown.generation) == ("server_start_failed", 2)
    assert shown.restored is not None
    assert shown.restored.generation == 3
