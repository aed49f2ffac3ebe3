"""What a dead owner has left, what a shutdown leaves, and a server that hangs."""

from __future__ import annotations

import pytest

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import Done, DropStale, Kill, Probe, Unloaded
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Exit
from orchestrator.machine.recovery import RestartPolicy
from tests.kit.machine.run import A, B, D, H, I, K, Run, W, healthy
from tests.kit.machine.world import on_disk

KEEP = Policy(keeps_server=True)
RESTART = Policy(restart=RestartPolicy(limit=2))


def adopting(model: str = A) -> Run:
    run = Run(KEEP).find(model)
    assert run.state is W
    return run


# ------------------------------------------------------------------------------ the next owner


def test_a_kept_server_is_adopted_after_a_probe_that_compares_its_files() -> None:
    run = adopting()
    (probe,) = run.commands_of(Probe)
    assert (probe.generation, probe.child.pid) == (7, 47)
    assert probe.unchanged == on_disk(A).files
    run.ready()
    assert run.state is H
    assert run.running.adopted
    assert run.running.target == on_disk(A)
    assert run.concluded() == [(7, "loaded")]


def test_generations_and_extra_args_go_on_from_the_adopted_server() -> None:
    run = adopting().ready()
    assert run.category(run.load(A)) == "already"
    ticket = run.load(B)
    run.settle()
    assert run.generations[ticket] == 8
    assert not run.loaded(ticket).adopted
    assert dict(run.ctx.committed_args)[on_disk(A).source] == ()


@pytest.mark.parametrize("pid", [47, None])
def test_what_no_keeper_remembers_is_ended(pid: int | None) -> None:
    run = Run(KEEP).find(None, pid=pid)
    assert run.state is K
    assert [kill.child and kill.child.pid for kill in run.commands_of(Kill)] == [pid]
    run.emptied()
    assert run.state is I
    assert run.ctx.child is None
    assert run.ended() == ([(47, "stopped")] if pid else [])


def test_a_load_of_the_same_model_gets_the_adopted_server() -> None:
    run = adopting()
    ticket = run.load(A)
    assert run.state is W
    run.ready()
    assert run.category(ticket) == "already"
    assert run.loaded(ticket).child.pid == 47
    assert run.loaded(ticket).adopted


def test_a_load_of_another_model_ends_the_adoption() -> None:
    run = adopting()
    ticket = run.load(B)
    assert run.tokens() == [7]
    run.settle()
    assert run.model == B
    assert run.loaded(ticket).child.pid != 47


def test_a_failed_adoption_is_told_and_ends_the_server() -> None:
    run = adopting().fail()
    assert run.state is K
    assert run.concluded() == [(7, "server_start_failed")]
    assert run.last_error.message == "it failed"
    assert run.emptied().state is I


def test_a_server_that_ends_while_it_is_adopted_is_told() -> None:
    run = adopting().exited(47, generation=7).ready(alive=False)
    assert run.last_error.message == "the server that was found has ended since"
    assert run.emptied().state is I


def test_a_server_that_is_found_dead_was_not_ended_by_us() -> None:
    for run in (adopting().ready(alive=False), adopting().fail()):
        run.emptied(Exit(47, -9))
        assert run.ended() == [(47, "signal")]


@pytest.mark.parametrize("is_ready", [True, False])
def test_who_joined_a_failed_adoption_gets_a_server_of_its_own(is_ready: bool) -> None:
    run = adopting()
    ticket = run.load(A)
    run = run.ready(alive=False) if is_ready else run.fail()
    assert (run.state, run.concluded()) == (K, [])
    run.settle()
    assert run.category(ticket) == "loaded"
    assert run.generations[ticket] == 7
    assert not run.running.adopted
    assert run.loaded(ticket).child.generation == 7


def test_a_caller_that_leaves_or_cancels_does_not_end_an_adoption() -> None:
    run = adopting()
    gone, by_id = run.load(A), run.load(A, load_request_id="x")
    by_number = run.load(A)
    run.withdraw(gone)
    run.cancel("x")
    assert run.category(by_id) == "cancelled"
    run.cancel(generation=7)
    assert run.category(by_number) == "cancelled"
    assert (run.state, run.ready().state) == (W, H)


def test_an_unload_ends_an_adoption() -> None:
    run = adopting()
    ticket = run.unload()
    run.settle()
    assert (run.state, run.answers[ticket]) == (I, Unloaded())


def test_a_server_found_late_is_ignored() -> None:
    run = Run(KEEP)
    run.load(A)
    run.go(D).find(A)
    assert run.state is D
    assert run.commands == (DropStale(Generation(7), "found"),)
    assert run.settle().running.child.pid != 47


# --------------------------------------------------------------------------------- a shutdown


def test_a_shutdown_leaves_a_healthy_server_where_the_policy_says_so() -> None:
    run = healthy(A, KEEP)
    lease = run.lease()
    waiting = run.load("o/B", on_busy="queue")
    ticket = run.shutdown()
    assert (run.state, run.answers[ticket]) == (H, Done(is_kept=True))
    assert run.category(waiting) == "shutting_down"
    assert run.concluded() == [(2, "shutting_down")]
    assert run.ctx.gate is None
    assert run.release(lease).state is H
    assert run.category(run.load(A)) == "shutting_down"


@pytest.mark.parametrize(
    ("policy", "keep", "alive"), [(KEEP, False, True), (KEEP, True, False), (Policy(), True, True)]
)
def test_any_other_shutdown_ends_the_server(policy: Policy, keep: bool, alive: bool) -> None:
    run = healthy(A, policy)
    ticket = run.shutdown(keep=keep, alive=alive)
    assert run.state is K
    assert run.emptied().answers[ticket] == Done()


# ------------------------------------------------------------------------------------- a hang


def test_a_server_that_hangs_is_ended_and_told() -> None:
    run = healthy()
    lease = run.lease()
    run.hang()
    assert (run.state, run.commands_of(Kill)[0].child) == (K, run.ctx.child)
    assert (run.ctx.gate, run.release(lease).commands) == (None, ())
    assert run.ctx.last_exit == Exit(41, None, ("the last words",), "hung")
    assert run.last_error == Problem(
        "server_exited",
        "the server hung: neither an answer nor any work for 60 s: load the model again",
        generation=run.ctx.generation,
        log_tail=("the last words",),
    )
    run.emptied(Exit(41, -9))
    assert (run.state, run.ended()) == (I, [(41, "hung")])
    assert run.ctx.last_exit == Exit(41, -9, (), "hung")


def test_the_exit_of_a_server_that_hung_is_told_as_a_hang() -> None:
    run = healthy().hang().exited()
    assert run.ctx.last_exit == Exit(41, -9, (), "hung")
    run.emptied()
    assert (run.state, run.ended()) == (I, [(41, "hung")])


def test_one_that_hung_and_could_not_be_killed_is_told_when_it_ends() -> None:
    run = healthy().hang().kill_failed()
    assert run.state is I
    run.exited()
    assert (run.state, run.ended()) == (K, [(41, "hung")])


def test_a_server_that_hangs_is_restarted_by_policy() -> None:
    run = healthy(A, RESTART).hang()
    assert run.recovery == ("waiting", 1)
    timer = run.timer("restart")
    last_exit = Exit(41, -15, (), "hung")
    run.emptied(Exit(41, -15)).expire(timer)
    run.emptied(Exit(41, -15))  # effects tell of the last server once more
    assert run.ctx.last_exit == last_exit
    assert (run.settle().state, run.model) == (H, A)


def test_a_hang_of_another_server_changes_nothing() -> None:
    run = healthy()
    hung = run.running
    run.load(B)
    run.settle()
    ctx = run.ctx
    run.do(run.hang_of(hung))
    assert (run.state, run.ctx) == (H, ctx)
    assert run.commands == (DropStale(hung.generation, "hung"),)


def test_after_a_hang_the_load_that_is_due_follows_at_once() -> None:
    run = healthy(A, RESTART)
    ticket = run.load("o/B")
    run.resolved(2, "o/B").hang()
    assert run.recovery is None
    assert run.emptied().state is D
    run.settle()
    assert run.category(ticket) == "loaded"
