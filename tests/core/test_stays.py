"""What happens beside the load in flight, or too late, changes neither the state nor its work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.base.tokens import Generation
from orchestrator.machine.commands import DropStale, LeaseGranted
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Drained, Exit, Hung, Resolved
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.machine.states import State
from tests.kit.machine.run import A, B, C, D, H, I, K, Run, S, W, healthy, in_flight
from tests.kit.machine.world import resolved, sized

HUB = "o/X"


def at(state: State) -> Run:
    """Return a machine in a state, with a load in flight unless it rests there."""
    if state is I:
        return Run()
    return healthy() if state is H else in_flight(state)[0]


@pytest.mark.parametrize("state", [S, W])
def test_figure_of_the_load_in_flight_is_recorded(state: State) -> None:
    run = at(state)
    figure = sized(Generation(1))
    run.do(figure)
    assert run.state is state
    assert run.ctx.job is not None
    assert run.ctx.job.memory == figure.memory


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("generation", [0, 1])
def test_figure_of_anything_else_is_dropped(state: State, generation: int) -> None:
    if generation and state in {S, W}:
        generation = 2
    run = at(state)
    before = run.ctx
    run.do(sized(Generation(generation)))
    assert (run.state, run.ctx) == (state, before)
    assert run.commands == (DropStale(Generation(generation), "sized"),)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("end", ["fetched", "failed", "deadline"])
def test_end_of_a_prefetch_leaves_the_state(state: State, end: str) -> None:
    run = at(state)
    call = run.prefetch(HUB, deadline_s=1)
    effect = run.ctx.effect
    ends: dict[str, Callable[[], object]] = {
        "fetched": lambda: run.fetched_beside(-1, HUB),
        "failed": lambda: run.fetch_failed(-1),
        "deadline": lambda: run.fire("deadline", -1),
    }
    ends[end]()
    assert call in run.answers
    assert (run.state, run.ctx.effect) == (state, effect)


@pytest.mark.parametrize("state", State)
def test_late_words_about_a_server_leave_the_state(state: State) -> None:
    run = at(state)
    now, effect = run.now, run.ctx.effect
    run.do(Resolved(Generation(0), now, resolved(HUB)))
    run.fire("deadline", 0)
    run.fire("drain", 0)
    run.do(Drained(Generation(0), now))
    run.do(Hung(Generation(0), now, Exit(40, None), silent_s=60.0))
    assert (run.state, run.ctx.effect) == (state, effect)


@pytest.mark.parametrize("state", State)
def test_lease_leaves_the_state(state: State) -> None:
    run = at(state)
    effect = run.ctx.effect
    run.lease()
    assert (run.state, run.ctx.effect) == (state, effect)


@pytest.mark.parametrize("state", [K, H])
def test_nobody_is_let_in_while_the_owner_ends(state: State) -> None:
    run = healthy(policy=Policy(keeps_server=True))
    run.shutdown(keep=state is H)
    assert run.state is state
    assert run.problem(run.lease()).category == "shutting_down"
    assert run.state is state


@pytest.mark.parametrize("limit", [0, 1])
def test_lease_leaves_a_crashed_server_to_its_end(limit: int) -> None:
    run = healthy(policy=Policy(restart=RestartPolicy(limit=limit)))
    run.crash()
    run.lease()
    assert run.state is K


@pytest.mark.parametrize("state", [K, D, S, W, H])
def test_download_of_a_queued_load_leaves_the_state(state: State) -> None:
    run = at(state)
    run.load(HUB, on_busy="queue", prefetch=True)
    run.fetched_beside(run.ctx.generation, HUB)
    assert run.state is state


def test_late_failure_of_a_download_leaves_the_load_that_could_be_replaced() -> None:
    run = healthy()
    run.load(B, restore_previous=True)
    run.go(D).fetch_failed(1)
    assert (run.state, run.kinds) == (D, [DropStale])


def test_cancelled_load_that_comes_to_rest_restores_nothing_and_keeps_nobody_waiting() -> None:
    run = healthy()
    run.load(B, restore_previous=True)
    run.go(D)
    waiting = run.lease()
    run.cancel(generation=2)
    run.fetched()
    assert (run.state, run.ctx.previous) == (I, None)
    assert run.problem(waiting).category == "not_loaded"


def test_load_of_another_model_ends_what_waits_at_once() -> None:
    run = healthy()
    waiting = run.load(HUB)
    run.load(B)
    assert run.category(waiting) == "superseded"


@pytest.mark.parametrize("state", [K, D, S, W])
def test_refused_and_waiting_calls_leave_the_load_in_flight(state: State) -> None:
    run = Run(Policy(max_waiting=1))
    run.load(A)
    run.go(state)
    run.load(B, on_busy="queue")
    effect = run.ctx.effect
    assert run.category(run.load(C, on_busy="queue")) == "busy"
    run.lease()
    assert (run.state, run.ctx.effect) == (state, effect)


@pytest.mark.parametrize("how", ["unload", "cancel", "withdraw", "deadline", "shutdown"])
def test_end_of_a_load_that_kills_leaves_none_in_flight(how: str) -> None:
    """What was to be killed is killed to the end."""
    run = healthy()
    load = run.load(B, deadline_s=1)
    ends: dict[str, Callable[[], object]] = {
        "unload": run.unload,
        "cancel": lambda: run.cancel(generation=2),
        "withdraw": lambda: run.withdraw(load),
        "deadline": lambda: run.fire("deadline", 2),
        "shutdown": lambda: run.shutdown(keep=False),
    }
    ends[how]()
    assert (run.state, run.ctx.job) == (K, None)
    assert run.category(load) != "loaded"
    run.emptied()
    assert run.state is I


def test_cancel_of_a_load_answers_all_its_callers() -> None:
    run = healthy()
    loads = [run.load(B), run.load(B)]
    run.cancel(generation=2)
    run.emptied()
    assert [run.category(load) for load in loads] == ["cancelled", "cancelled"]


def test_cancel_by_id_ends_a_load_that_kills_and_those_behind_it() -> None:
    run = healthy()
    loads = [run.load(B, load_request_id="x"), run.load(C, on_busy="queue", load_request_id="x")]
    run.cancel("x")
    run.settle()
    assert [run.category(load) for load in loads] == ["cancelled", "cancelled"]
    assert run.state is I


def test_lease_of_a_server_that_is_seen_to_be_gone_is_not_granted() -> None:
    run = healthy()
    assert not isinstance(run.answers.get(run.lease(alive=False)), LeaseGranted)
