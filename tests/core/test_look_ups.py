"""Calls whose model is being looked up on disk: they can be ended at once, and have no load yet."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine import commands
from orchestrator.machine.actions.working import MAX_REMEMBERED
from orchestrator.machine.commands import (
    CancelAnswer,
    Concluded,
    Done,
    DropStale,
    Prefetched,
    SetTimer,
    StopTimer,
    Unloaded,
)
from orchestrator.machine.context import LookUp, Policy
from orchestrator.machine.facts import LookUpFailed, Purpose
from orchestrator.machine.states import State
from orchestrator.settings.request import LoadRequest
from tests.kit.machine.run import A, B, C, D, H, I, K, Run, W, healthy, in_flight
from tests.kit.machine.world import files
from tests.kit.sentences import assert_sentence

PURPOSES: list[Purpose] = ["load", "prefetch"]
HUB = "o/B"


def looking(run: Run, model: str = A, purpose: Purpose = "load", **options: Any) -> Ticket:
    """Begin the look-up of a call."""
    request = LoadRequest.from_dict({"model_path": model, **options})
    return run.look_up(request, run.ticket(), purpose)


def at(state: State, policy: Policy | None = None) -> Run:
    """Return a machine in a state, whose next call has ticket 2."""
    run = Run(policy)
    if state is I:
        run.ticket()
        return run
    run.load(A)
    return run.go(state)


def looked_up(run: Run) -> list[int]:
    """The calls that are being looked up."""
    return [look_up.ticket for look_up in run.ctx.look_ups]


def assert_ended(run: Run, *tickets: Ticket) -> None:
    """The calls are not looked up any more, and what the look-ups find is dropped."""
    assert not {*tickets} & {*looked_up(run)}
    state, answers = run.state, len(run.answers)
    for ticket in tickets:
        assert run.stopped.count(StopTimer(Generation(ticket), "look_up")) == 1
        for purpose in PURPOSES:
            run.found(ticket, A, purpose)
            assert run.commands == (DropStale(Generation(0), purpose),)
        run.do(LookUpFailed(ticket, Problem("model_not_found", "no such file"), run.now))
        assert run.commands == (DropStale(Generation(0), "look_up_failed"),)
        run.fire("look_up", ticket)
        assert run.commands == (DropStale(Generation(ticket), "look_up_expired"),)
    assert (run.state, len(run.answers)) == (state, answers)


# -------------------------------------------------------------------------------------- it begins


@pytest.mark.parametrize("purpose", PURPOSES)
def test_call_is_looked_up_first_and_has_no_generation(purpose: Purpose) -> None:
    run = healthy()
    run.now = 5.0
    request = LoadRequest(model_path=B, stall_timeout_s=60.0)
    ticket = run.look_up(request, run.ticket(), purpose)
    assert run.commands == (
        commands.LookUp(ticket, request, purpose),
        SetTimer(Generation(ticket), "look_up", 60.0),
    )
    assert run.ctx.look_ups == (LookUp(ticket, request, purpose, 5.0),)
    assert (run.state, run.ctx.generation, run.ctx.last_prefetch) == (H, 1, 0)
    assert (run.ctx.queue, run.ctx.prefetches, ticket in run.answers) == ((), (), False)


def test_look_ups_end_in_any_order() -> None:
    run = Run()
    first, second = looking(run, A), looking(run, HUB, "prefetch")
    assert looked_up(run) == [first, second]
    run.found(second, HUB, "prefetch")
    assert (looked_up(run), len(run.ctx.prefetches)) == ([first], 1)
    assert run.stopped == [StopTimer(Generation(second), "look_up")]
    run.found(first, A)
    assert (looked_up(run), run.generations) == ([], {first: 1})
    assert_ended(run, first, second)
    assert run.settle().category(first) == "loaded"


@pytest.mark.parametrize("state", State)
def test_look_ups_are_limited(state: State) -> None:
    """A disk that hangs must not take every thread."""
    run = at(state, Policy(max_looking=2))
    run.cancel("x")
    first, second, third = looking(run, HUB), looking(run, HUB), looking(run, B)
    problem = run.problem(third)
    assert (problem.category, problem.field) == ("busy", "model_path")
    assert_sentence("machine.look_ups_full", problem.message, limit=2)
    assert run.category(looking(run, B, load_request_id="x")) == "cancelled"
    assert (run.state, looked_up(run)) == (state, [first, second])
    run.found(first, HUB)
    assert (run.state, looking(run) in run.answers) == (state, False)


@pytest.mark.parametrize("state", State)
def test_prefetch_of_a_local_model_is_answered_at_once(state: State) -> None:
    """There is nothing to download, so the limit of downloads does not matter."""
    run = at(state, Policy(max_prefetches=1))
    for _ in range(2):
        call = looking(run, C, "prefetch")
        run.found(call, C, "prefetch")
        assert run.answers[call] == Prefetched(files(C))
    first, same, other = (run.prefetch(name) for name in (HUB, HUB, "o/E"))
    assert (first in run.answers, same in run.answers) == (False, False)
    assert (run.problem(other).category, run.problem(other).field) == ("busy", "prefetch")
    assert (run.state, len(run.ctx.prefetches), looked_up(run)) == (state, 1, [])


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("purpose", PURPOSES)
def test_look_up_that_fails_answers_its_call(purpose: Purpose, state: State) -> None:
    run = at(state)
    failing, other = looking(run, B, purpose), looking(run, C)
    problem = Problem("model_not_found", "no such file", field="model_path")
    run.do(LookUpFailed(failing, problem, run.now))
    assert (run.problem(failing), looked_up(run)) == (problem, [other])
    assert (run.state, run.ctx.last_error) == (state, None)
    assert_ended(run, failing)


# ----------------------------------------------------------------------------------------- it ends


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize(
    ("stall_s", "deadline_s", "limit_s", "category", "field"),
    [
        (60.0, None, 60.0, "stalled", "stall_timeout_s"),
        (60.0, 61.0, 60.0, "stalled", "stall_timeout_s"),
        (60.0, 60.0, 60.0, "deadline", "deadline_s"),
        (60.0, 2.5, 2.5, "deadline", "deadline_s"),
    ],
)
def test_look_up_ends_at_the_deadline_or_when_it_stalls(
    stall_s: float,
    deadline_s: float | None,
    limit_s: float,
    category: str,
    field: str,
    purpose: Purpose,
    state: State,
) -> None:
    """B73: a disk that does not answer must not hold a call for ever."""
    run = at(state)
    other = looking(run, C)
    late = looking(run, B, purpose, stall_timeout_s=stall_s, deadline_s=deadline_s)
    timer = run.timer("look_up")
    assert timer == SetTimer(Generation(late), "look_up", limit_s)
    run.expire(timer)
    problem = run.problem(late)
    assert (problem.category, problem.field, problem.generation) == (category, field, None)
    assert_sentence(
        "machine.look_up_late", problem.message, field=field, limit_s=f"{limit_s:g}", model=B
    )
    assert (run.state, looked_up(run)) == (state, [other])
    assert_ended(run, late)


def test_deadline_counts_from_the_call() -> None:
    run = Run()
    run.now = 10.0
    load = looking(run, A, deadline_s=5)
    beside = looking(run, HUB, "prefetch", deadline_s=7)
    run.now = 14.0
    run.found(load, A, deadline_s=5)
    assert run.timers("deadline") == [SetTimer(Generation(1), "deadline", 1.0)]
    run.found(beside, HUB, "prefetch", deadline_s=7)
    assert run.timers("deadline") == [SetTimer(Generation(-1), "deadline", 3.0)]
    assert [job.accepted_at for job in run.ctx.prefetches] == [10.0]


def test_look_up_is_part_of_the_total_and_of_no_phase() -> None:
    run = Run()
    run.now = 10.0
    ticket = looking(run)
    run.now = 14.0
    run.found(ticket, A)
    run.now = 15.0
    run.go(H)
    timings = run.loaded(ticket).timings
    assert (timings.kill, timings.download, timings.spawn, timings.health) == (1, 0, 0, 0)
    assert timings.total == 5
    (concluded,) = run.commands_of(Concluded)
    assert concluded.accepted_at == 10.0


@pytest.mark.parametrize("purpose", PURPOSES)
def test_cancel_by_id_ends_the_look_ups_of_that_id(purpose: Purpose) -> None:
    run = healthy()
    named, same = (looking(run, B, purpose, load_request_id="x") for _ in range(2))
    other, unnamed = looking(run, B, purpose, load_request_id="y"), looking(run, B, purpose)
    cancel = run.cancel("x")
    for ticket in (named, same):
        problem = run.problem(ticket)
        assert (problem.category, problem.generation) == ("cancelled", None)
        assert_sentence("machine.cancelled", problem.message)
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert (run.state, looked_up(run)) == (H, [other, unnamed])
    assert_ended(run, named, same)


def test_cancel_ends_a_load_and_the_look_up_of_its_id() -> None:
    run, load = in_flight(W, load_request_id="x")
    waiting = looking(run, B, load_request_id="x")
    run.cancel("x")
    assert (run.category(waiting), run.category(load)) == ("cancelled", None)
    assert run.settle().category(load) == "cancelled"
    assert_ended(run, waiting)


def test_cancel_by_generation_ends_no_look_up() -> None:
    run = Run()
    ticket = looking(run)
    cancel = run.cancel(generation=1)
    assert run.answers[cancel] == CancelAnswer(cancelled=False)
    assert looked_up(run) == [ticket]


def test_cancel_that_overtakes_its_look_up_wins() -> None:
    run = Run()
    run.cancel("x")
    for purpose in PURPOSES:
        ticket = looking(run, A, purpose, load_request_id="x")
        assert_sentence("machine.cancelled_early", run.problem(ticket).message)
        assert (run.problem(ticket).category, looked_up(run)) == ("cancelled", [])


def test_latest_ids_are_remembered_from_their_look_up_on() -> None:
    """B21: a cancel of one of them is late, and must not end a newer load of that id."""
    run = Run(Policy(max_looking=1000))
    for number in range(MAX_REMEMBERED):
        looking(run, load_request_id=f"x{number}")
    looking(run, load_request_id="x0")
    looking(run)
    looking(run, load_request_id="last")
    assert run.ctx.seen_ids == (*(f"x{n}" for n in range(2, MAX_REMEMBERED)), "x0", "last")
    assert run.ctx.cancelled_ids == ()


@pytest.mark.parametrize("model", [None, B])
def test_unload_ends_the_look_ups_of_loads_it_names(model: str | None) -> None:
    run = healthy()
    named, prefetch, later = looking(run, B), looking(run, B, "prefetch"), Ticket(99)
    other = looking(run, C)
    run.look_up(LoadRequest(model_path=B), later)
    unload = run.unload(model)
    problem = run.problem(named)
    assert (problem.category, problem.generation) == ("cancelled", None)
    assert_sentence("machine.cancelled_by_unload", problem.message)
    kept = [prefetch, later] if model is None else [prefetch, other, later]
    assert looked_up(run) == kept
    run.settle()
    assert run.answers[unload] == Unloaded(changed=True)
    assert run.state is (I if model is None else H)
    assert_ended(run, named)


def test_unload_of_what_is_not_looked_up_changes_nothing() -> None:
    """The words of an unload are compared; the files are not known yet."""
    run = healthy()
    for purpose, model in (("load", B), ("prefetch", C)):
        looking(run, model, "load" if purpose == "load" else "prefetch")
    for model in ("b", C):
        assert run.answers[run.unload(model)] == Unloaded(changed=False)
    assert len(looked_up(run)) == 2


@pytest.mark.parametrize("how", ["begins", "joins", "already loaded"])
def test_accepted_load_supersedes_older_look_ups_of_other_models(how: str) -> None:
    """B69: their callers need not wait for a disk; one of the same model may still join."""
    run = healthy(B) if how == "already loaded" else in_flight(D, B)[0] if how == "joins" else Run()
    older = looking(run, A)
    spared = [
        looking(run, "b"),
        looking(run, A, on_busy="queue"),
        looking(run, A, on_busy="reject"),
        looking(run, A, "prefetch"),
    ]
    run.look_up(LoadRequest(model_path=A), Ticket(99))
    newer = run.load(B)
    assert newer in run.generations
    problem = run.problem(older)
    assert (problem.category, problem.generation) == ("superseded", None)
    assert_sentence("machine.superseded", problem.message, model=B)
    assert looked_up(run) == [*spared, 99]
    assert_ended(run, older)


def test_load_that_is_refused_supersedes_no_look_up() -> None:
    run, _ = in_flight(D)
    older = looking(run, B)
    assert run.category(run.load(C, on_busy="reject")) == "busy"
    assert looked_up(run) == [older]


def test_shutdown_ends_every_look_up() -> None:
    run = healthy()
    ended = [looking(run, B), looking(run, B, "prefetch"), looking(run, C, on_busy="queue")]
    shutdown = run.shutdown()
    for ticket in ended:
        problem = run.problem(ticket)
        assert (problem.category, problem.generation) == ("shutting_down", None)
        assert_sentence("machine.cancelled_by_shutdown", problem.message)
    refused = looking(run, A)
    assert run.category(refused) == "shutting_down"
    assert looked_up(run) == []
    assert_ended(run, *ended)
    assert run.settle().answers[shutdown] == Done()


# ---------------------------------------------------------------------------- the caller goes away


@pytest.mark.parametrize("purpose", PURPOSES)
def test_withdrawn_caller_ends_its_look_up(purpose: Purpose) -> None:
    run = healthy()
    gone, other = looking(run, B, purpose), looking(run, B, purpose)
    run.withdraw(gone)
    assert (run.commands, looked_up(run)) == ((), [other])
    assert_ended(run, gone)
    assert run.answers.keys() == {1}


CONTINUE = Policy(abandoned_load="continue")


def test_abandoned_look_up_is_followed_by_its_load_if_the_policy_says_so() -> None:
    run = Run(CONTINUE)
    gone, other = looking(run, A), looking(run, A)
    run.withdraw(gone)
    assert [look_up.has_caller for look_up in run.ctx.look_ups] == [False, True]
    assert run.stopped == []
    run.found(gone, A)
    assert (run.state, run.generations[gone]) == (K, 1)
    assert [job.callers for job in run.ctx.wanted] == [()]
    run.found(other, A)
    assert [caller.ticket for job in run.ctx.wanted for caller in job.callers] == [other]
    run.settle()
    assert (run.model, run.category(other), gone in run.answers) == (A, "loaded", False)


def test_abandoned_look_up_joins_without_a_caller() -> None:
    run = Run(CONTINUE)
    load, gone = run.load(A), looking(run, A)
    run.withdraw(gone)
    run.found(gone, A)
    assert [caller.ticket for job in run.ctx.wanted for caller in job.callers] == [load]
    assert run.settle().answers.keys() == {load}


def test_abandoned_prefetch_ends_under_any_policy() -> None:
    run = Run(CONTINUE)
    gone = looking(run, HUB, "prefetch")
    run.withdraw(gone)
    assert looked_up(run) == []
    assert_ended(run, gone)


@pytest.mark.parametrize("end", ["cancel", "unload", "shutdown", "deadline"])
def test_abandoned_look_up_ends_without_an_answer(end: str) -> None:
    run = Run(CONTINUE)
    gone = looking(run, A, load_request_id="x")
    timer = run.timer("look_up")
    run.withdraw(gone)
    match end:
        case "cancel":
            run.cancel("x")
        case "unload":
            run.unload(A)
        case "shutdown":
            run.shutdown()
        case _:
            run.expire(timer)
    assert (looked_up(run), gone in run.answers) == ([], False)
    assert_ended(run, gone)
