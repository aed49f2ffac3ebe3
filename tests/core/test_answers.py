"""The sentences of answers and of `last_error`, and the fields beside them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from orchestrator.base.tokens import Generation
from orchestrator.machine.commands import DropStale, Kill, LeaseGranted
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Exit, Promoted
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.machine.states import State
from tests.kit.machine.run import (
    OCCUPIED,
    SERVER,
    A,
    B,
    C,
    D,
    H,
    I,
    K,
    Run,
    S,
    W,
    healthy,
    in_flight,
)
from tests.kit.sentences import assert_sentence

RULES = RestartPolicy(backoff_s=4, backoff_max_s=60, limit=1, cool_down_s=100, stable_after_s=60)


def test_load_and_lease_after_the_shutdown() -> None:
    run = Run()
    run.shutdown()
    for ticket in (run.load(A), run.lease()):
        assert_sentence("machine.shutting_down", run.problem(ticket).message)


def test_load_cancelled_before_it_arrived() -> None:
    run = Run()
    run.cancel("x")
    ticket = run.load(A, load_request_id="x")
    assert_sentence("machine.cancelled_early", run.problem(ticket).message)


def test_load_that_arrives_after_a_newer_one() -> None:
    run = Run()
    older = run.ticket()
    run.load(B)
    run.load(A, ticket=older)
    assert_sentence("machine.superseded_before", run.problem(older).message)


def test_superseded_load_names_the_newer_model() -> None:
    run, ticket = in_flight(D)
    run.load(B)
    problem = run.problem(ticket)
    assert problem.generation == 1
    assert_sentence("machine.superseded", problem.message, model="B")


def test_rejected_load_names_the_load_in_flight() -> None:
    run, _ = in_flight(D)
    busy = run.problem(run.load(B, on_busy="reject"))
    assert (busy.field, busy.generation) == ("on_busy", 1)
    assert_sentence("machine.busy", busy.message, generation="1", model="A")


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ("cancel", "machine.cancelled"),
        ("unload", "machine.cancelled_by_unload"),
        ("shutdown", "machine.cancelled_by_shutdown"),
        ("deadline", "machine.deadline"),
    ],
)
def test_cancelled_load_says_by_what(end: str, sentence: str) -> None:
    run, ticket = in_flight(D, deadline_s=3)
    match end:
        case "cancel":
            run.cancel(generation=1)
        case "unload":
            run.unload()
        case "shutdown":
            run.shutdown()
        case _:
            run.fire("deadline", 1)
    run.settle()
    problem = run.problem(ticket)
    assert problem.generation == 1
    assert_sentence(sentence, problem.message, deadline_s="3.0")
    assert problem.field == ("deadline_s" if end == "deadline" else None)


def test_deadline_of_a_queued_load() -> None:
    run, _ = in_flight(D)
    ticket = run.load(B, on_busy="queue", deadline_s=3)
    run.fire("deadline", 2)
    assert (run.problem(ticket).field, run.problem(ticket).generation) == ("deadline_s", 2)


def test_queued_load_cancelled_by_id_and_by_generation() -> None:
    for cancel in ({"name": "x"}, {"generation": 2}):
        run, _ = in_flight(D)
        ticket = run.load(B, on_busy="queue", load_request_id="x")
        run.cancel(**cancel)
        problem = run.problem(ticket)
        assert problem.generation == 2
        assert_sentence("machine.cancelled", problem.message)


def test_server_that_exits_as_it_becomes_ready() -> None:
    run, ticket = in_flight(W)
    run.ready(alive=False)
    run.settle()
    problem = run.problem(ticket)
    assert (problem.category, problem.reason) == ("server_start_failed", "exited")
    assert_sentence("machine.exited_as_ready", problem.message)


def test_slot_that_does_not_stay_empty() -> None:
    run, ticket = in_flight(D)
    for _ in range(3):
        run.fetched(OCCUPIED)
        run.emptied()
    run.fetched(OCCUPIED)
    run.settle()
    problem = run.problem(ticket)
    assert problem.generation == 1
    assert_sentence("machine.slot_occupied", problem.message, reason=OCCUPIED.reason)


def test_load_behind_a_load_with_an_occupied_slot_is_next() -> None:
    """The bound on verifications is for each load."""
    run, ticket = in_flight(D)
    waiting = run.load(B, on_busy="queue")
    for _ in range(3):
        run.fetched(OCCUPIED)
        run.emptied()
    run.fetched(OCCUPIED)
    assert run.settle().category(waiting) == "loaded"
    assert run.problem(ticket).category == "slot_occupied"


def test_repeated_kill_adds_to_the_kill_time_once() -> None:
    """The phases together are no longer than the total."""
    run = Run()
    ticket = run.load(A)
    steps = (run.emptied, partial(run.fetched, OCCUPIED), run.emptied, run.fetched, run.spawned)
    for step in (*steps, run.ready):
        run.now += 1.0
        step()
    timings = run.loaded(ticket).timings
    assert (timings.kill, timings.download, timings.spawn, timings.health) == (2, 1, 1, 1)
    assert timings.total == 6


def test_lease_without_a_model() -> None:
    run = Run()
    assert_sentence("machine.not_loaded", run.problem(run.lease()).message)


def test_granted_lease_names_the_server() -> None:
    run = healthy()
    ticket = run.lease()
    granted = run.answers[ticket]
    assert granted == LeaseGranted(run.running.target, run.running.child, SERVER)


@pytest.mark.parametrize(
    ("returncode", "sentence"),
    [
        (None, "machine.ended_unknown"),
        (-9, "machine.ended_by_signal"),
        (0, "machine.ended_by_exit"),
        (1, "machine.ended_by_exit"),
    ],
)
def test_last_error_says_how_the_server_ended(returncode: int | None, sentence: str) -> None:
    run = healthy().crash(returncode)
    problem = run.last_error
    assert_sentence(sentence, problem.message, number=abs(returncode or 0))
    assert (problem.generation, problem.log_tail) == (1, ("it crashed",))
    assert run.ctx.last_exit == Exit(41, returncode, ("it crashed",))


def test_server_that_ends_while_another_load_is_due_is_not_restarted() -> None:
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.go(H)
    run.load(B, on_busy="queue")
    run.load(C, on_busy="queue")
    run.go(H)
    assert run.ctx.queue
    run.crash()
    assert_sentence("machine.ended_another_load_follows", run.last_error.message)
    assert run.ctx.recovery is None
    assert run.settle().state is H


def test_leases_of_a_dead_server_do_not_delay_the_kill() -> None:
    for is_draining in (False, True):
        run = healthy()
        run.lease()
        if is_draining:
            run.load(B)
            assert run.state is K
            assert not run.commands_of(Kill)
        run.crash()
        assert run.commands_of(Kill)
        assert run.ctx.gate is None
        assert run.ctx.last_exit is not None
        assert run.ctx.last_exit.returncode == -11


def test_late_exit_of_an_earlier_server_revokes_no_lease() -> None:
    run = healthy()
    run.load(B)
    run.go(H)
    lease = run.lease()
    run.load(C)
    before = run.ctx
    run.exited(41, -15)
    assert (run.state, run.ctx) == (K, before)
    assert (run.ctx.gate, run.inside) == ("draining", {lease})


def test_waiting_lease_is_refused_when_the_slot_cannot_be_emptied() -> None:
    run, _ = in_flight(K)
    lease = run.lease()
    run.kill_failed()
    assert (run.state, run.category(lease)) == (I, "not_loaded")


def test_last_error_announces_the_restart_and_the_cool_down() -> None:
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.go(H)
    run.crash()
    assert run.last_error.generation == 1
    assert_sentence("machine.restart_follows", run.last_error.message)
    assert run.ctx.recovery is not None
    assert run.ctx.recovery.generation == 1
    run.emptied()
    waiting = run.lease()
    run.fire("restart", 1)
    assert (run.state, run.ctx.generation) == (K, 2)
    run.go(S).fail()
    run.settle()
    assert_sentence("machine.cool_down_begins", run.last_error.message)
    run.now += 99.5
    for ticket, left_s in ((waiting, 100), (run.load(A), 0)):
        refused = run.problem(ticket)
        assert_sentence("machine.cooling_down", refused.message, left_s=left_s)
        assert (refused.reason, refused.generation) == ("cooling_down", 2)
    assert run.problem(run.lease()).retry_after_s == 0.5


def test_cancelled_restart_leaves_no_recovery() -> None:
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.go(H)
    run.crash()
    run.emptied()
    run.fire("restart", 1)
    run.go(D)
    run.cancel(generation=2)
    run.settle()
    assert (run.state, run.ctx.recovery, run.ctx.previous) == (I, None, None)


@pytest.mark.parametrize("end", ["loaded", "unloaded", "shut down", "failed"])
def test_previous_model_is_forgotten_at_every_end(end: str) -> None:
    """A much later failure must not bring it back."""
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
    assert run.state is (H if end == "loaded" else I)
    assert run.ctx.previous is None


def test_unload_of_an_absent_model_does_not_prevent_the_restore() -> None:
    run = healthy()
    ticket = run.load(B, restore_previous=True)
    run.unload(C)
    run.go(S).fail()
    run.settle()
    restored = run.problem(ticket).restored
    assert restored is not None
    assert (restored.model_path, restored.gguf_variant, run.state) == (A, None, H)


def test_restored_variant_is_reported() -> None:
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
    run.go(S).fail()
    run.settle()
    restored = run.problem(ticket).restored
    assert restored is not None
    assert (restored.generation, restored.gguf_variant) == (3, "Q4_0")
    assert run.ctx.generation == 3


def test_latest_unload_of_each_model_is_remembered() -> None:
    run = Run()
    older = run.ticket()
    for model in (A, B, A):
        run.unload(model)
        run.settle()
    assert [name for name, _ in run.ctx.unloads] == [B, A]
    run.load(A, ticket=older)
    assert run.category(older) == "cancelled"


def test_unload_ends_an_older_load_that_arrives_after_a_newer_one_of_its_model() -> None:
    run = Run()
    older = run.ticket()
    run.unload(A)
    newer = run.load(A)
    run.load(A, ticket=older)
    assert run.category(older) == "cancelled"
    assert run.settle().category(newer) == "loaded"


def test_failed_kill_ends_every_load_and_keeps_the_pid() -> None:
    run = healthy()
    loads = [run.load(B), run.load(C, on_busy="queue")]
    run.kill_failed()
    assert (run.state, run.ctx.queue, run.ctx.running) == (I, (), None)
    assert [run.problem(ticket).generation for ticket in loads] == [2, 3]
    assert run.ctx.child is not None


def test_cancel_of_one_caller_of_a_queued_load_spares_the_other() -> None:
    run, _ = in_flight(D)
    first = run.load(B, on_busy="queue", load_request_id="x")
    second = run.load(B, on_busy="queue", load_request_id="y")
    run.cancel("x")
    assert run.problem(first).category == "cancelled"
    run.settle()
    assert run.category(second) == "loaded"


def test_queued_load_that_finds_its_model_running_sets_the_idle_time() -> None:
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
    assert run.running.target.request.idle_ttl_s == 5.0
    assert run.category(run.load(A, on_busy="queue")) == "already"


def test_queued_load_that_finds_its_model_running_restarts_the_idle_time() -> None:
    run, _ = in_flight(D)
    between = run.load(B, on_busy="queue")
    run.load(A, on_busy="queue", idle_ttl_s=5.0)
    run.cancel(generation=2)
    assert run.category(between) == "cancelled"
    run.go(H)
    run.now += 10.0
    run.do(Promoted(Generation(3), run.now))
    assert (run.timer("idle").generation, run.timer("idle").after_s) == (1, 5.0)
    assert (run.running.wanted_at, run.running.idle_ttl_s) == (10.0, 5.0)


def test_queued_load_whose_model_has_just_died_reloads() -> None:
    """B30: the evidence of the step counts, not the state."""
    run, _ = in_flight(D)
    run.load(B, on_busy="queue")
    waiting = run.load(A, on_busy="queue")
    run.cancel(generation=2)
    run.go(H)
    run.do(Promoted(Generation(3), run.now, child_is_alive=False))
    assert (run.state, run.category(waiting)) == (K, None)
    assert run.settle().category(waiting) == "loaded"


def test_promotion_without_a_queued_load_is_ignored() -> None:
    for run in (Run(), healthy()):
        before = run.state, run.ctx
        run.do(Promoted(Generation(7), run.now))
        assert (run.state, run.ctx) == before
        assert run.commands == (DropStale(Generation(7), "promote"),)


@pytest.mark.parametrize("state", [I, W])
def test_exit_outside_of_healthy_becomes_the_last_exit(state: State) -> None:
    if state is W:
        run, _ = in_flight(W)
    else:
        run = healthy()
        run.unload()
        run.kill_failed()
    assert run.state is state
    before = run.ctx
    run.exited(99, -9, 9)
    assert (run.state, run.ctx, len(run.commands)) == (state, before, 1)
    run.exited()
    assert run.ctx.last_exit == Exit(41, -9)
    assert run.state is (W if state is W else K), "an occupied slot is verified again"
    assert DropStale not in run.kinds


@pytest.mark.parametrize("policy", [Policy(), Policy(abandoned_load="continue")])
def test_abandoned_queued_load_follows_the_policy(
    policy: Policy,
) -> None:
    run = Run(policy)
    run.load(A)
    run.go(D)
    gone, shared = run.load(B, on_busy="queue"), run.load(C, on_busy="queue")
    run.load(C, on_busy="queue")
    run.withdraw(gone)
    run.withdraw(shared)
    kept = [job.target.request.model_path for job in run.ctx.queue]
    assert kept == ([C] if policy.abandoned_load == "cancel" else [B, C])


def test_restart_in_progress_is_not_planned_any_more() -> None:
    """A plan that is carried out twice would be two loads."""
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.go(H)
    run.crash()
    run.emptied()
    run.unload(C)
    assert run.recovery == ("waiting", 1), "an unload of another model changes no plan"
    run.fire("restart", 1)
    assert run.recovery == ("trying", 1)


def test_last_error_is_the_failure_while_the_previous_model_is_restored() -> None:
    run = healthy()
    run.load(B, restore_previous=True)
    run.go(S).fail()
    problem = run.last_error
    assert (problem.category, problem.generation) == ("server_start_failed", 2)
    assert problem.restored is not None
    assert problem.restored.generation == 3
