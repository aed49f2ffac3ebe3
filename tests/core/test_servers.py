"""Leases, drains, exits of the server, and the slot."""

from __future__ import annotations

import pytest

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    DropStale,
    Kill,
    LeaseGranted,
    Loaded,
    SetTimer,
    Spawn,
    Unloaded,
)
from orchestrator.machine.facts import (
    BecameReady,
    Child,
    Drained,
    Emptied,
    Exit,
    Exited,
    Fetched,
    FetchFailed,
    KillFailed,
    NotReady,
    Spawned,
    SpawnFailed,
)
from orchestrator.machine.guards import MAX_VERIFICATIONS
from orchestrator.machine.states import State
from tests.kit.machine.run import (
    BUSY_STATES,
    FREE,
    OCCUPIED,
    SERVER,
    A,
    B,
    D,
    H,
    I,
    K,
    Run,
    S,
    healthy,
    in_flight,
)
from tests.kit.machine.world import files

CHILD = Child(Generation(1), 41)


# ------------------------------------------------------------------------------------------- leases


def test_swap_waits_for_the_leases_and_then_kills() -> None:
    """B61: a swap must not cut off a request."""
    run = healthy()
    lease = run.lease()
    granted = run.answers[lease]
    assert isinstance(granted, LeaseGranted)
    assert granted.server == SERVER
    run.load(B)
    assert run.state is K
    assert run.commands_of(Kill) == []
    assert SetTimer(Generation(1), "drain", 30.0) in run.commands
    run.release(lease)
    assert run.commands_of(Kill) == [Kill(Generation(2), CHILD)]


def test_drain_times_out() -> None:
    """B25, B62: under constant traffic a drain without a deadline never ends."""
    run = healthy()
    run.lease()
    run.unload()
    run.fire("drain", 1)
    assert run.commands_of(Kill) == [Kill(Generation(1), CHILD)]
    assert run.ctx.gate is None


def test_unload_that_cuts_waits_for_no_lease() -> None:
    run = healthy()
    lease = run.lease()
    unload = run.unload(cut=True)
    assert run.commands_of(Kill) == [Kill(Generation(1), CHILD)]
    assert run.ctx.gate is None
    run.release(lease)
    assert run.commands == ()
    run.emptied()
    assert run.answers[unload] == Unloaded()


def test_unload_that_cuts_ends_a_drain_that_has_begun() -> None:
    run = healthy()
    run.lease()
    first = run.unload()
    assert run.commands_of(Kill) == []
    second = run.unload(cut=True)
    assert run.commands_of(Kill) == [Kill(Generation(1), CHILD)]
    run.emptied()
    assert run.answers[first] == run.answers[second] == Unloaded()


def test_cut_of_the_model_that_runs_lets_the_swap_go_on() -> None:
    run = healthy()
    run.lease()
    load = run.load(B)
    run.unload(A, cut=True)
    assert run.commands_of(Kill) == [Kill(Generation(2), CHILD)]
    run.go(H)
    answer = run.answers[load]
    assert isinstance(answer, Loaded)
    assert answer.target.request.model_path == B


def test_cut_of_another_model_cuts_nothing() -> None:
    run = healthy()
    lease = run.lease()
    run.unload(B, cut=True)
    assert (run.state, run.ctx.gate, run.inside) == (H, "open", {lease})


@pytest.mark.parametrize("what", ["kill has begun", "other server", "no server"])
def test_late_drain_timer_changes_nothing(what: str) -> None:
    """A timer cannot be revoked: its drain may be over when it fires."""
    run = healthy()
    if what == "no server":
        run.unload()
        run.emptied()
        run.unload()
        assert (run.state, run.ctx.child) == (K, None)
    elif what == "other server":
        run.load(B)
        run.go(H)
        run.lease()
        run.unload()
        assert (run.state, run.ctx.effect) == (K, None)
    else:
        run.unload()
        assert run.commands_of(Kill)
    before = run.ctx
    run.fire("drain", 1)
    assert (run.state, run.ctx) == (K, before)
    assert run.commands == (DropStale(Generation(1), "drain_expired"),)


def test_a_shutdown_waits_for_no_lease_of_a_drain_that_has_begun() -> None:
    run = healthy()
    run.lease()
    run.load(B)
    assert run.commands_of(Kill) == []
    run.shutdown()
    assert run.commands_of(Kill)[0].child == CHILD
    assert run.ctx.gate is None


def test_the_last_one_may_leave_after_the_drain_has_timed_out() -> None:
    run = healthy()
    run.lease()
    run.unload()
    before = run.fire("drain", 1).ctx
    run.do(Drained(Generation(1), run.now))
    assert (run.state, run.ctx) == (K, before)
    assert run.commands == (DropStale(Generation(1), "drained"),)


def test_lease_of_a_caller_that_went_away_does_not_delay_the_drain() -> None:
    run = healthy()
    lease = run.lease()
    run.load(B)
    run.withdraw(lease)
    assert run.commands_of(Kill) == [Kill(Generation(2), CHILD)]


def test_no_lease_is_granted_on_a_server_being_stopped() -> None:
    """B63."""
    run = healthy()
    run.unload()
    assert run.category(run.lease()) == "not_loaded"
    run = healthy()
    run.load(B)
    lease = run.lease()
    assert run.category(lease) is None
    answer = run.settle().answers[lease]
    assert isinstance(answer, LeaseGranted)
    assert answer.child.pid == 42


def test_withdrawn_lease_request_is_not_granted() -> None:
    """Nobody would release that lease, and the next swap would wait for it."""
    run, _ = in_flight(D)
    gone, stays = run.lease(), run.lease()
    run.withdraw(gone)
    run.settle()
    assert run.inside == {stays}
    assert gone not in run.answers


def test_waiting_lease_is_refused_when_the_load_fails() -> None:
    """B27: the waiter was never woken."""
    run, _ = in_flight(D)
    lease = run.lease()
    run.fail()
    assert run.category(lease) == "not_loaded"


def test_waiting_lease_is_refused_when_the_load_is_cancelled() -> None:
    """B27, for an unload and a cancel."""
    for end in (Run.unload, lambda run: run.cancel(generation=1)):
        run, _ = in_flight(S)
        lease = run.lease()
        end(run)
        assert run.settle().category(lease) == "not_loaded"


# ------------------------------------------------------------------------------- a server that ends


def test_server_that_ends_by_itself_is_no_longer_loaded() -> None:
    run = healthy()
    exit_ = Exit(41, -9, ("out of memory",))
    run.do(Exited(Generation(1), 0.0, exit_))
    assert run.state is K
    assert run.last_error.category == "server_exited"
    assert run.last_error.log_tail == ("out of memory",)
    assert run.ctx.last_exit == exit_
    assert run.emptied().state is I


def test_exit_of_a_stopped_server_stays_the_last_exit() -> None:
    run = healthy()
    run.unload()
    exit_ = Exit(41, -15, ("cleaning up",))
    run.emptied(exit_)
    assert run.ctx.last_exit == exit_
    run.unload()
    assert run.emptied().ctx.last_exit == exit_


def test_exit_of_another_process_is_ignored() -> None:
    """The exit of an earlier server may be noticed late."""
    run = healthy()
    before = run.ctx
    run.exited(99, 0)
    assert (run.state, run.ctx) == (H, before)
    assert run.commands == (DropStale(Generation(1), "exited"),)


def test_late_exit_of_an_unkillable_server_empties_the_slot() -> None:
    run = healthy()
    run.unload()
    run.kill_failed()
    run.exited()
    assert run.state is K
    run.emptied()
    assert (run.state, run.ctx.child) == (I, None)


# ----------------------------------------------------------------------------------------- the slot


def test_slot_that_fills_again_is_emptied_a_bounded_number_of_times() -> None:
    """B02: nothing is started beside a process that appears between kill and spawn."""
    run, ticket = in_flight(D)
    for _ in range(MAX_VERIFICATIONS):
        run.fetched(OCCUPIED)
        assert run.state is K
        run.emptied()
    run.fetched(OCCUPIED)
    assert run.settle().state is I
    assert run.category(ticket) == "slot_occupied"
    assert not run.commands_of(Spawn)


@pytest.mark.parametrize("state", BUSY_STATES)
def test_completion_of_an_older_load_is_ignored(state: State) -> None:
    """B05: a late completion of load N must not settle load N+1."""
    run = healthy(A)
    run.load(B)
    run.go(state)
    before = run.ctx
    old, problem = Generation(1), Problem("server_start_failed", "late")
    for fact in (
        Emptied(old, 0.0),
        KillFailed(old, 0.0, problem),
        Fetched(old, 0.0, files(A), FREE),
        FetchFailed(old, 0.0, problem),
        Spawned(old, 0.0, Child(old, 99)),
        SpawnFailed(old, 0.0, problem),
        BecameReady(old, 0.0, SERVER),
        NotReady(old, 0.0, problem),
    ):
        run.do(fact)
        assert (run.state, run.ctx) == (state, before)
        assert run.commands == (DropStale(old, fact.trigger),)
