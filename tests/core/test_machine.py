"""Loads on the machine: accepted, superseded, queued, rejected, joined or already loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.base.tokens import CancelReason, Generation
from orchestrator.machine.commands import (
    Accept,
    Download,
    Kill,
    Post,
    Probe,
    Settle,
    SetToken,
    Spawn,
)
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Child, Fetched, Promoted
from orchestrator.machine.states import State
from orchestrator.settings.files import HubModel
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ReloadReason
from tests.kit.machine.run import (
    BUSY_STATES,
    FREE,
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
from tests.kit.machine.world import files, target

CHILD = Child(Generation(1), 41)


# -------------------------------------------------------------------- a load that succeeds or fails


def test_load_passes_through_every_state_and_times_each() -> None:
    """A load passes through Killing even from Idle: the slot is verified before anything starts."""
    run = Run()
    run.now = 100.0
    ticket = run.load(A)
    assert run.state is K
    assert run.commands_of(Kill) == [Kill(Generation(1), None)]
    seen = [run.state]
    for end in (run.emptied, run.fetched, run.spawned, run.ready):
        run.now += 1.0
        end()
        seen.append(run.state)
    assert seen == [K, D, S, W, H]
    answer = run.loaded(ticket)
    assert (answer.generation, answer.child) == (1, CHILD)
    assert (answer.already, answer.joined, answer.reload_reasons) == (False, False, ())
    times = answer.timings
    assert (times.kill, times.download, times.spawn, times.health, times.total) == (1, 1, 1, 1, 4)


def test_probe_gets_the_child_and_the_stall_timeout() -> None:
    run, _ = in_flight(W, stall_timeout_s=7, llama_extra_args=["--seed", "1"])
    assert run.commands_of(Probe) == [Probe(Generation(1), CHILD, 7.0, 1, ("--seed", "1"))]


def test_downloaded_files_are_started_and_compared_later() -> None:
    """A Hub model's files and variant are only known for sure after the download."""
    run = healthy(llama_extra_args=["--seed", "1"])
    run.load(B)
    run.go(D)
    found = replace(files(B), variant="Q8_0", weights=(*files(B).weights, *files(C).weights))
    run.do(Fetched(run.effect, run.now, found, FREE))
    (spawn,) = run.commands_of(Spawn)
    assert spawn.target.model == found
    run.go(H)
    assert run.running.target == spawn.target
    assert dict(run.ctx.committed_args) == {
        (files(A).name, None, "chat"): ("--seed", "1"),
        (found.name, "Q8_0", "chat"): (),
    }


def test_hub_model_inherits_its_args_once_its_variant_is_known() -> None:
    run = healthy(llama_extra_args=["--seed", "1"])
    run.unload()
    run.settle()
    wanted = target(LoadRequest(model_path=A))
    hub = HubModel(repo="A")
    before = replace(wanted, model=replace(wanted.model, weights=(), hub=hub))
    run.load_target(before, run.ticket())
    run.go(D)
    run.do(Fetched(run.effect, run.now, wanted.model, FREE))
    (spawn,) = run.commands_of(Spawn)
    assert spawn.target.extra_args == ("--seed", "1")


def test_committed_args_hold_one_entry_per_source() -> None:
    run = healthy(llama_extra_args=["--seed", "1"])
    run.load(A, llama_extra_args=["--seed", "2"])
    run.settle()
    assert [args for _, args in run.ctx.committed_args] == [("--seed", "2")]


@pytest.mark.parametrize("state", BUSY_STATES)
def test_failure_in_any_phase_ends_in_idle_with_an_error(state: State) -> None:
    """B49: failure is not a state, and the next load works."""
    run, ticket = in_flight(state)
    run.fail()
    assert run.settle().state is I
    problem = run.problem(ticket)
    assert problem.generation == 1
    assert run.last_error.category == problem.category
    again = run.load(A)
    assert run.settle().category(again) == "loaded"
    assert run.ctx.last_error is None


@pytest.mark.parametrize("state", [S, W])
def test_failure_is_answered_when_the_slot_is_empty(state: State) -> None:
    """A caller that gets the error may start something else at once."""
    run, ticket = in_flight(state)
    run.fail()
    assert run.state is K
    assert run.category(ticket) is None
    assert run.emptied().category(ticket) == "server_start_failed"


# -------------------------------------------------------------------- a different target: supersede


@pytest.mark.parametrize("state", BUSY_STATES)
def test_different_target_supersedes_in_the_same_step(state: State) -> None:
    """B01: two loads in quick succession."""
    run, older = in_flight(state)
    newer = run.load(B)
    assert run.category(older) == "superseded"
    assert SetToken(Generation(1), CancelReason.SUPERSEDED) in run.commands
    assert not run.commands_of(Spawn)
    assert run.settle().state is H
    assert run.category(newer) == "loaded"
    assert run.generations[newer] == 2
    assert run.model == B


def test_child_of_a_superseded_spawn_is_killed_first() -> None:
    """B04: a cancelled spawn may still hand over a live child."""
    run, _ = in_flight(S)
    run.load(B)
    run.spawned()
    assert run.state is K
    assert run.commands_of(Kill) == [Kill(Generation(2), CHILD)]
    assert run.emptied().ctx.child is None
    assert run.commands_of(Download)


def test_newer_load_supersedes_queued_loads_too() -> None:
    run, first = in_flight(D)
    second = run.load(B, on_busy="queue")
    third = run.load(C)
    assert (run.category(first), run.category(second)) == ("superseded", "superseded")
    assert run.settle().category(third) == "loaded"


def test_healthy_server_is_killed_before_another_model_starts() -> None:
    """B14: stop the old server before the new one starts."""
    run = healthy()
    newer = run.load(B)
    assert (run.state, run.commands_of(Kill)) == (K, [Kill(Generation(2), CHILD)])
    answer = run.settle().loaded(newer)
    assert [reason.field for reason in answer.reload_reasons] == ["model_path"]


def test_older_call_that_arrives_later_does_not_supersede() -> None:
    """A slow look-up must not let an older call win."""
    run = Run()
    older = run.ticket()
    newer = run.load(B)
    run.load(A, ticket=older)
    assert run.category(older) == "superseded"
    assert run.settle().category(newer) == "loaded"


@pytest.mark.parametrize("model", ["A", "B"])
@pytest.mark.parametrize("others", [1, 2])
def test_older_call_loads_if_the_newer_callers_have_left(model: str, others: int) -> None:
    """A caller that goes away withdraws only its own interest."""
    run = Run()
    older = run.ticket()
    gone = [run.load("A") for _ in range(others)]
    for ticket in gone:
        run.withdraw(ticket)
    run.load(model, ticket=older)
    run.go(H)
    assert run.category(older) == "loaded"


def test_older_call_is_superseded_if_one_newer_caller_stays() -> None:
    run = Run()
    older = run.ticket()
    stays, leaves = run.load("A"), run.load("A")
    run.withdraw(leaves)
    run.load("B", ticket=older)
    run.go(H)
    assert [run.category(ticket) for ticket in (older, stays)] == ["superseded", "loaded"]


def test_older_call_is_superseded_by_an_abandoned_load_that_goes_on() -> None:
    run = Run(Policy(abandoned_load="continue"))
    older = run.ticket()
    run.withdraw(run.load("A"))
    run.load("B", ticket=older)
    assert run.category(older) == "superseded"


def test_older_call_is_superseded_by_an_already_loaded_call() -> None:
    """The newer call had no load of its own, and is the newest all the same."""
    run = healthy(A)
    older = run.ticket()
    newer = run.load(A)
    assert run.category(newer) == "already"
    run.load(B, ticket=older)
    assert (run.category(older), run.state) == ("superseded", H)


def test_older_call_for_the_running_model_is_already_loaded() -> None:
    run = Run()
    older = run.ticket()
    newer = run.load(A)
    run.settle().load(A, ticket=older)
    assert [run.category(t) for t in (newer, older)] == ["loaded", "already"]


def test_shutting_down_precedes_every_other_refusal() -> None:
    """A caller that gets `cancelled` may try again; after `shutting_down` that is useless."""
    run = healthy()
    older = run.ticket()
    run.cancel("x")
    run.unload()
    run.shutdown()
    run.load(B, ticket=older, load_request_id="x")
    assert run.category(older) == "shutting_down"


def test_older_call_that_joins_leaves_newer_queued_loads_alone() -> None:
    run = Run()
    older = run.ticket()
    first = run.load(A)
    queued = run.load(B, on_busy="queue")
    run.load(A, ticket=older)
    assert run.category(queued) is None
    run.settle()
    assert [run.category(t) for t in (older, first, queued)] == ["loaded", "loaded", "loaded"]


def test_last_error_names_the_model_that_superseded_a_load() -> None:
    run, _ = in_flight(W)
    run.load(B)
    assert run.last_error.category == "superseded"
    assert B in run.last_error.message


# ------------------------------------------------------------------------------------ queue, reject


def test_queue_advances_after_a_load_that_found_its_model_running() -> None:
    run = healthy(A)
    first = run.load(B)
    loads = [run.load(A, on_busy="queue"), run.load(A, on_busy="queue", force_reload=True)]
    loads += [run.load(C, on_busy="queue")]
    run.settle()
    assert [run.category(t) for t in (first, *loads)] == ["loaded"] * 4
    late = run.load(C, on_busy="queue")
    assert run.category(late) == "already"


def test_deadline_of_a_queued_load_ends_that_load_only() -> None:
    run, first = in_flight(D)
    late = run.load(B, on_busy="queue", deadline_s=5)
    other = run.load(C, on_busy="queue")
    run.fire("deadline", 2)
    assert run.category(late) == "deadline"
    assert [job.generation for job in run.ctx.queue] == [3]
    run.settle()
    assert [run.category(t) for t in (first, other)] == ["loaded", "loaded"]


@pytest.mark.parametrize("state", BUSY_STATES)
def test_queued_load_starts_after_the_load_before_it(state: State) -> None:
    run, first = in_flight(state)
    second = run.load(B, on_busy="queue")
    assert run.state is state
    assert run.tokens() == []
    run.go(H)
    assert run.category(first) == "loaded"
    assert run.category(second) is None
    assert Post(Promoted(Generation(2), run.now)) in run.commands
    assert run.settle().category(second) == "loaded"


def test_queued_loads_keep_their_order() -> None:
    run, _ = in_flight(D)
    second, third = run.load(B, on_busy="queue"), run.load(C, on_busy="queue")
    run.go(H).settle()
    assert list(run.answers) == [1, second, third]


def test_queued_load_whose_model_is_running_by_then_is_already_loaded() -> None:
    run, _ = in_flight(W)
    between = run.load(B, on_busy="queue", load_request_id="b")
    queued, joined = run.load(A, on_busy="queue"), run.load(A, on_busy="queue")
    run.cancel("b")
    assert run.category(between) == "cancelled"
    run.settle()
    answers = [run.loaded(queued), run.loaded(joined)]
    assert [(a.already, a.joined) for a in answers] == [(True, False), (True, True)]
    assert run.state is H


def test_forced_reload_that_joins_a_queued_load_reloads() -> None:
    run, _ = in_flight(W)
    run.load(B, on_busy="queue", load_request_id="b")
    run.load(A, on_busy="queue")
    run.cancel("b")
    forced = run.load(A, on_busy="queue", force_reload=True)
    run.ready()
    assert run.settle().category(forced) == "loaded"
    answer = run.loaded(forced)
    assert answer.generation > 1
    assert ReloadReason("force_reload", running=False, requested=True) in answer.reload_reasons


def test_queued_load_starts_after_a_failed_load() -> None:
    run, first = in_flight(W)
    second = run.load(B, on_busy="queue")
    run.fail()
    assert run.settle().category(second) == "loaded"
    assert run.category(first) == "server_start_failed"


@pytest.mark.parametrize("state", BUSY_STATES)
def test_reject_is_answered_busy_and_changes_nothing(state: State) -> None:
    run, first = in_flight(state)
    before = run.ctx
    refused = run.load(B, on_busy="reject")
    problem = run.problem(refused)
    assert (problem.category, problem.field, problem.generation) == ("busy", "on_busy", 1)
    assert (run.state, run.ctx) == (state, before)
    assert run.settle().category(first) == "loaded"


def test_queue_and_reject_load_if_nothing_is_in_flight() -> None:
    """`on_busy` is about another load in flight, not about a running model."""
    for on_busy in ("queue", "reject"):
        run = healthy(A)
        ticket = run.load(B, on_busy=on_busy)
        assert run.settle().category(ticket) == "loaded"


def test_phases_of_a_queued_load_are_timed_from_its_turn() -> None:
    """The time in the queue counts in the total only."""
    run, _ = in_flight(D)
    late = run.load(B, on_busy="queue")
    run.now = 7.0
    run.fail()
    assert run.state is K
    run.now = 8.0
    run.settle()
    answer = run.loaded(late)
    assert (answer.timings.kill, answer.timings.total) == (1.0, 8.0)


# --------------------------------------------------------------------------------------------- join


@pytest.mark.parametrize("state", BUSY_STATES)
def test_same_target_joins_the_load_in_flight(state: State) -> None:
    """B36: one download, one spawn, one generation, two answers."""
    run, first = in_flight(state)
    second = run.load(A)
    assert run.commands == (Accept(second, Generation(1), joined=True),)
    assert run.state is state
    run.settle()
    one, two = run.loaded(first), run.loaded(second)
    assert (one.joined, two.joined) == (False, True)
    assert replace(two, joined=False) == one


@pytest.mark.parametrize("state", BUSY_STATES)
def test_joined_callers_share_the_failure(state: State) -> None:
    run, first = in_flight(state)
    second = run.load(A)
    run.fail().settle()
    assert run.problem(first) == run.problem(second)


@pytest.mark.parametrize("on_busy", ["supersede", "queue", "reject"])
def test_same_target_joins_whatever_on_busy_says(on_busy: str) -> None:
    run, _ = in_flight(D)
    run.load(A, on_busy=on_busy)
    assert run.kinds == [Accept]


def test_omitted_args_join_a_load_with_args() -> None:
    """B35: omitted args are inherited, so they make no difference."""
    run, _ = in_flight(D, llama_extra_args=["--temp", "1"])
    ticket = run.load(A)
    assert run.generations[ticket] == 1
    other = run.load(A, llama_extra_args=[])
    assert run.generations[other] == 2


def test_cancelled_load_is_not_joined() -> None:
    """It has ended, although its effect has not."""
    run, first = in_flight(D)
    run.cancel(generation=1)
    second = run.load(A)
    assert run.generations[second] == 2
    assert run.settle().category(second) == "loaded"
    assert run.category(first) == "cancelled"


def test_load_in_flight_is_joined_past_the_queue() -> None:
    """A, then B, then A again: B is superseded, A goes on."""
    run, first = in_flight(W)
    second = run.load(B, on_busy="queue")
    third = run.load(A)
    assert run.category(second) == "superseded"
    assert run.settle().category(third) == "loaded"
    assert run.category(first) == "loaded"
    assert run.generations[third] == 1


# ----------------------------------------------------------------------------------- already loaded


def test_same_target_while_healthy_is_already_loaded() -> None:
    """Same pid, no effect, no change of state, answered in this very step."""
    run = healthy()
    ticket = run.load(A)
    assert (run.state, run.category(ticket)) == (H, "already")
    assert run.commands[0] == Accept(ticket, Generation(1), joined=False)
    assert run.kinds == [Accept, Settle]
    answer = run.loaded(ticket)
    assert (answer.child.pid, answer.generation, answer.reload_reasons) == (41, 1, ())


def test_dead_child_is_not_already_loaded() -> None:
    """B30: the server must be alive to match, and the reload says why it happened."""
    run = healthy()
    ticket = run.load(A, alive=False)
    assert run.state is K
    answer = run.settle().loaded(ticket)
    assert not answer.already
    assert answer.reload_reasons == (ReloadReason("server", running="exited", requested="alive"),)


def test_forced_reload_reloads_the_running_model() -> None:
    run = healthy()
    ticket = run.load(A, force_reload=True)
    assert run.state is K
    answer = run.settle().loaded(ticket)
    assert [reason.field for reason in answer.reload_reasons] == ["force_reload"]


def test_changed_setting_reloads_and_is_the_reason() -> None:
    """B28."""
    run = healthy(max_seq_length=4096)
    ticket = run.load(A, max_seq_length=0)
    answer = run.settle().loaded(ticket)
    assert answer.reload_reasons == (ReloadReason("max_seq_length", running=4096, requested=0),)


def test_failed_load_commits_no_args() -> None:
    """B41: a failed start must not spoil the next one."""
    run = healthy(llama_extra_args=["--temp", "1"])
    run.load(A, llama_extra_args=["--bogus"])
    run.go(W).fail().settle()
    ticket = run.load(A)
    answer = run.settle().loaded(ticket)
    assert answer.target.extra_args == ("--temp", "1")


def test_args_survive_an_unload_and_stay_with_their_model() -> None:
    """B37, B40."""
    run = healthy(llama_extra_args=["--temp", "1"])
    run.unload()
    run.settle()
    for model, args in ((B, ()), (A, ("--temp", "1"))):
        ticket = run.load(model)
        assert run.settle().loaded(ticket).target.extra_args == args
