"""Requests and loads: granted, refused, waiting, withdrawn."""

from __future__ import annotations

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.pool import facts
from orchestrator.pool.commands import Grant, Measure, SetTimer, Start
from orchestrator.pool.context import Need, Policy
from tests.kit.pool.run import A, P, R, Run, S, definition, host
from tests.kit.sentences import assert_sentence

BROKEN = Problem("server_start_failed", "it ended at once", reason="exited")


# ----------------------------------------------------------------------------------- a start
def test_first_request_starts_its_model_and_is_granted_when_it_is_healthy() -> None:
    """B91: a model is not evicted between its load and the request it was loaded for."""
    run = Run(a=1000)
    ticket = run.want("a")
    assert run.of(Start) == [Start("a", run.generation("a"), host(1000))]
    assert (run.state("a"), run.reserved, run.answers) == (S, 1000, {})
    run.healthy("a")
    assert run.commands[:1] == (Grant(ticket, "a"),)
    assert (run.state("a"), run.ctx.waiting) == (R, ())


def test_many_requests_for_one_absent_model_make_one_start() -> None:
    run = Run(a=1000)
    tickets = [run.want("a") for _ in range(5)]
    assert run.started == []
    run.healthy("a")
    assert [grant.ticket for grant in run.of(Grant)] == tickets
    assert run.reserved == 1000


def test_request_for_an_open_resident_is_granted_at_once() -> None:
    run = Run(a=1000).resident("a")
    ticket = run.want("a")
    assert run.commands == (Grant(ticket, "a"),)
    assert run.answers[run.load("a")] == "granted"


def test_gate_that_its_slot_has_closed_makes_the_request_wait() -> None:
    """The report of the crash is on its way: the pool is not the first to know."""
    run = Run(a=1000).resident("a")
    del run.uses["a"]
    ticket = run.want("a")
    assert (run.state("a"), run.answers.get(ticket)) == (R, None)
    run.crash("a")
    assert run.state("a") is P
    assert run.emptied("a").started == ["a"]
    assert run.healthy("a").answers[ticket] == "granted"


def test_healthy_that_is_heard_after_the_gate_has_closed_is_no_resident() -> None:
    run = Run(a=1000)
    ticket = run.want("a")
    run.healthy("a", is_open=False)
    assert (run.state("a"), run.answers.get(ticket)) == (S, None)
    assert run.emptied("a").answers[ticket] == "server_start_failed"


# --------------------------------------------------------------------------------- refusals
def test_request_for_an_unknown_model_is_refused() -> None:
    run = Run(a=1000)
    ticket = run.want("b")
    assert run.answers[ticket] == "model_not_found"
    assert_sentence("pool.unknown", run.problems[ticket].message)
    assert run.ctx.waiting == ()


def test_one_request_too_many_is_refused_at_once() -> None:
    """B99: counted before it is admitted. What the house wants is not counted."""
    run = Run(2000, Policy(max_waiting=2, min_resident_s=5.0), a=1000, b=1000, c=1000)
    run.do(facts.Preloaded("b", run.now))
    first, second, third = run.want("a"), run.load("a"), run.want("c")
    assert run.answers_of([first, second, third]) == [None, None, "too_many_waiting"]
    assert run.problems[third].retry_after_s == 5.0
    assert_sentence("pool.too_many_waiting", run.problems[third].message)
    run.healthy("a")
    assert run.answers_of([first, second]) == ["granted", "granted"]
    assert run.answers.get(run.want("c")) is None


def test_full_waiting_room_still_grants_what_is_open() -> None:
    run = Run(1000, Policy(max_waiting=1), a=1000, b=1000).resident("a")
    run.want("a")
    run.want("b")
    assert run.answers[run.want("a")] == "granted"


def test_request_that_has_waited_too_long_is_answered_and_its_start_ends() -> None:
    run = Run(1000, Policy(held_s=60.0, max_wait_s=30.0), a=1000)
    ticket = run.want("a")
    assert SetTimer(60.0) in run.commands
    run.at(60.0)
    assert (run.answers[ticket], run.state("a")) == ("not_loaded", P)
    assert run.problems[ticket].retry_after_s == 30.0
    assert_sentence("pool.held", run.problems[ticket].message)
    assert run.emptied("a").started == []


def test_call_by_hand_waits_as_long_as_it_takes() -> None:
    run = Run(1000, Policy(held_s=60.0), a=1000)
    load = run.load("a")
    run.at(50.0)
    request = run.want("a")
    run.at(200.0)
    assert run.answers_of([load, request]) == [None, "not_loaded"]
    assert run.state("a") is S


# ------------------------------------------------------------------------------ withdrawal
def test_last_waiter_that_leaves_withdraws_the_load() -> None:
    run = Run(a=1000)
    first, second = run.want("a"), run.load("a")
    assert run.withdraw("a", first).state("a") is S
    run.withdraw("a", second)
    assert (run.state("a"), run.reasons) == (P, ["withdrawn"])
    assert run.reserved == 1000
    assert run.emptied("a").reserved == 0


def test_waiter_that_leaves_before_its_start_is_forgotten() -> None:
    run = Run(1000, a=1000, b=1000).resident("a")
    ticket = run.want("b")
    run.withdraw("b", ticket)
    assert (run.ctx.waiting, run.state("a")) == ((), R)
    assert run.at(100.0).state("a") is R


def test_withdrawal_of_an_unknown_call_changes_nothing() -> None:
    run = Run(a=1000)
    run.want("a")
    before = run.ctx
    assert run.withdraw("a", Ticket(77)).ctx == before
    assert run.withdraw("z", Ticket(77)).ctx == before


# ----------------------------------------------------------------------------- failed starts
def test_requests_after_a_failed_start_get_the_same_problem_for_1_2_4_s() -> None:
    run = Run(a=1000)
    ticket = run.want("a")
    run.emptied("a", BROKEN)
    assert run.answers[ticket] == "server_start_failed"
    assert (run.problems[ticket].reason, run.problems[ticket].retry_after_s) == ("exited", 1.0)
    for cool_s in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        run.now += cool_s / 4
        early = run.want("a")
        assert run.problems[early].retry_after_s == pytest.approx(cool_s * 3 / 4)
        assert run.problems[early].message == BROKEN.message
        assert (run.state("a"), run.started) == (A, [])
        run.now += cool_s * 3 / 4
        run.want("a")
        assert run.started == ["a"]
        run.emptied("a", BROKEN)


def test_request_during_a_cool_down_gets_the_failure_also_if_too_many_wait() -> None:
    """It is the answer that helps."""
    run = Run(1000, Policy(max_waiting=1), a=1000, b=2000)
    run.want("a")
    run.emptied("a", BROKEN)
    run.do(facts.Configured(Policy(max_waiting=0), host(1000), run.now))
    assert run.answers[run.want("a")] == "server_start_failed"


def test_success_forgets_the_failures_before() -> None:
    run = Run(a=1000)
    for _ in range(3):
        run.load("a")
        run.emptied("a", BROKEN)
    run.resident("a")
    run.crash("a").emptied("a")
    ticket = run.want("a")
    run.emptied("a", BROKEN)
    assert run.problems[ticket].retry_after_s == 1.0


def test_load_by_hand_tries_at_once() -> None:
    run = Run(a=1000)
    run.want("a")
    run.emptied("a", BROKEN)
    ticket = run.load("a")
    assert run.started == ["a"]
    assert run.healthy("a").answers[ticket] == "granted"


def test_failed_start_without_a_problem_has_a_sentence() -> None:
    run = Run(a=1000)
    ticket = run.want("a")
    run.emptied("a")
    assert run.answers[ticket] == "server_start_failed"
    assert_sentence("pool.not_started", run.problems[ticket].message)


# ------------------------------------------------------------------------------- measuring
def test_need_that_is_not_known_is_measured_once_while_its_requests_wait() -> None:
    """A model of the Hub has no size before it is looked up."""
    run = Run(a=definition(None), b=1000)
    first = run.want("a")
    assert run.of(Measure) == [Measure("a", 1)]
    second = run.want("a")
    assert (run.of(Measure), run.state("a")) == ([], A)
    run.want("b")
    assert run.started == ["b"]
    run.do(facts.Measured("a", 1, Need(host(500)), run.now))
    assert run.started == ["a"]
    run.healthy("a")
    assert run.answers_of([first, second]) == ["granted", "granted"]


def test_need_that_cannot_be_measured_is_a_failed_start() -> None:
    run = Run(a=definition(None))
    ticket = run.want("a")
    problem = Problem("hub_unreachable", "the Hub does not answer")
    run.do(facts.MeasureFailed("a", 1, problem, run.now))
    assert (run.answers[ticket], run.problems[ticket].retry_after_s) == ("hub_unreachable", 1.0)
    assert run.answers[run.want("a")] == "hub_unreachable"
    run.at(1.0)
    run.want("a")
    assert run.of(Measure) == [Measure("a", 1)]


def test_measure_of_a_removed_entry_is_not_that_of_its_successor() -> None:
    run = Run(a=definition(None))
    run.want("a")
    run.remove("a")
    run.define("a", definition(None))
    run.want("a")
    assert run.of(Measure) == [Measure("a", 2)]
    assert run.do(facts.Measured("a", 1, Need(host(500)), run.now)).started == []


def test_measure_of_an_earlier_definition_is_dropped() -> None:
    run = Run(a=definition(None))
    run.want("a")
    run.define("a", definition(None))
    assert run.of(Measure) == [Measure("a", 2)]
    run.do(facts.Measured("a", 1, Need(host(500)), run.now))
    assert (run.started, run.entry("a").definition.need) == ([], None)
    assert run.do(facts.Measured("a", 2, Need(host(600)), run.now)).started == ["a"]
    assert run.reserved == 600


# ----------------------------------------------------------------------------------- places
def test_requests_get_the_places_of_a_server_one_after_the_other() -> None:
    run = Run(a=1000)
    first, second, third = (run.want("a", "request") for _ in range(3))
    run.healthy("a", places=1)
    assert run.answers == {first: "granted"}
    run.look(second)
    assert run.of(Grant) == [Grant(second, "a")]
    assert [waiter.ticket for waiter in run.ctx.waiting] == [third]


def test_lease_needs_no_place() -> None:
    run = Run(a=1000)
    first, second, lease = run.want("a", "request"), run.want("a", "request"), run.want("a")
    run.healthy("a", places=1)
    assert run.answers_of((first, second, lease)) == ["granted", None, "granted"]


def test_adopted_server_has_places_for_those_who_wait() -> None:
    """The first request comes before the pool has looked at what a dead owner left."""
    run = Run(a=definition(None))  # it is not known yet what it needs
    ticket, other = run.want("a", "request"), run.want("a", "request")
    adopted = facts.Adopted("a", Generation(1), host(1000), run.now, True, (ticket,))
    run.do(adopted)
    assert run.answers_of((ticket, other)) == ["granted", None]


def test_request_at_a_resident_waits_no_longer_than_the_pool_lets_anybody() -> None:
    run = Run(policy=Policy(held_s=60.0), a=1000)
    run.want("a", "request")
    run.healthy("a", places=1)
    ticket = run.want("a", "request", has_place=False)
    run.at(60.0)
    assert run.answers[ticket] == "not_loaded"
    assert_sentence("pool.no_free_slot", run.problems[ticket].message)


def test_requests_that_wait_for_places_count() -> None:
    run = Run(policy=Policy(max_waiting=1), a=1000)
    run.want("a", "request")
    run.healthy("a", places=1)
    run.want("a", "request", has_place=False)
    assert run.answers[run.want("a", "request", has_place=False)] == "too_many_waiting"


def test_cancel_of_a_load_leaves_the_queue_at_its_server_alone() -> None:
    run = Run(a=1000)
    run.want("a", "request")
    run.healthy("a", places=1)
    ticket = run.want("a", "request", has_place=False)
    assert run.cancel("a") == "False"
    assert run.answers.get(ticket) is None
    run.unload("a")
    assert run.answers[ticket] == "cancelled"


def test_requests_that_wait_for_a_place_are_served_by_the_next_server() -> None:
    run = Run(a=1000)
    run.want("a", "request")
    run.healthy("a", places=1)
    ticket = run.want("a", "request", has_place=False)
    run.crash("a").emptied("a")
    assert run.started == ["a"]
    run.healthy("a")
    assert run.answers[ticket] == "granted"
