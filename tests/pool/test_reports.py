"""What must change nothing: reports of earlier starts, reports out of place, refused calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.pool import facts
from orchestrator.pool.commands import DropStale, SetTimer
from orchestrator.pool.context import Need, Policy
from orchestrator.pool.facts import Fact, Use
from orchestrator.pool.states import State
from tests.kit.pool.run import A, P, R, Run, S, X, definition, host

OOM = Problem("server_start_failed", "there is too little memory", reason="out_of_memory")
REPORTS: dict[str, Callable[[Generation], Fact]] = {
    "sized": lambda g: facts.Sized("a", g, host(5), 0.0),
    "sized, too large": lambda g: facts.Sized("a", g, host(9000), 0.0),
    "healthy": lambda g: facts.BecameHealthy("a", g, 0.0, has_entered=True),
    "healthy, too large": lambda g: facts.BecameHealthy("a", g, 0.0, host(9000), True),
    "leaving": lambda g: facts.Leaving("a", g, 0.0),
    "emptied": lambda g: facts.Emptied("a", g, 0.0),
    "out of memory": lambda g: facts.Emptied("a", g, 0.0, OOM),
    "stuck": lambda g: facts.BecameStuck("a", g, 0.0),
}
OUT_OF_PLACE = [
    *((name, state) for name in ("sized", "sized, too large") for state in (A, R, P, X)),
    *((name, state) for name in ("healthy", "healthy, too large") for state in (A, R, P, X)),
    *(("leaving", state) for state in (A, S, P, X)),
    *((name, A) for name in ("emptied", "out of memory", "stuck")),
    ("stuck", X),
]


def second_start(state: State, **options: Any) -> Run:
    """Return a pool whose entry is in a state after its second start; `b` is idle beside it."""
    run = Run(3000, a=definition(1000, **options), b=1000).resident("b", "a").at(100.0)
    run.unload("a")
    run.emptied("a")
    if state is A:
        run.load("a")
        run.emptied("a")
        return run.at(200.0)
    run.load("a")
    if state is not S:
        run.healthy("a")
    if state in (P, X):
        run.unload("a")
    if state is X:
        run.stuck("a")
    assert run.state("a") is state
    return run


def nothing(run: Run, fact: Fact) -> None:
    """Assert that a fact is dropped, and that nothing follows from it."""
    entries, ledger, waiting = run.ctx.entries, run.ctx.ledger, run.ctx.waiting
    run.do(fact)
    assert run.commands[0] == DropStale("a", fact.trigger)
    assert all(isinstance(command, SetTimer) for command in run.commands[1:])
    assert (run.ctx.entries, run.ctx.ledger, run.ctx.waiting) == (entries, ledger, waiting)


@pytest.mark.parametrize("options", [{}, {"restarts": True}, {"source": "declared"}])
@pytest.mark.parametrize("state", [A, S, R, P, X])
@pytest.mark.parametrize("report", REPORTS)
def test_report_of_an_earlier_start_changes_nothing(
    report: str, state: State, options: dict[str, object]
) -> None:
    """It is about a server that is gone: to believe it would kill, or bless, the wrong one."""
    run = second_start(state, **options)
    assert run.generation("a") == Generation(3)
    nothing(run, REPORTS[report](Generation(2)))


@pytest.mark.parametrize(("report", "state"), OUT_OF_PLACE)
def test_report_that_comes_too_late_for_its_state_changes_nothing(
    report: str, state: State
) -> None:
    """A server may become Healthy while its stop is on its way."""
    run = second_start(state)
    nothing(run, REPORTS[report](run.generation("a")))


@pytest.mark.parametrize("state", [S, R, P, X])
def test_adoption_and_preload_of_what_is_in_its_slot_change_nothing(state: State) -> None:
    run = second_start(state)
    nothing(run, facts.Adopted("a", Generation(9), host(1), 0.0, has_entered=True))
    nothing(run, facts.Preloaded("a", 0.0))


@pytest.mark.parametrize("state", [A, S, R, P, X])
def test_measure_that_was_not_asked_for_changes_nothing(state: State) -> None:
    run = second_start(state)
    edition = run.entry("a").edition
    nothing(run, facts.Measured("a", edition, Need(host(1)), 0.0))
    nothing(run, facts.MeasureFailed("a", edition, OOM, 0.0))


@pytest.mark.parametrize("state", [S, R, P])
def test_measure_is_taken_in_every_state(state: State) -> None:
    """An entry may be changed while its old server runs."""
    run = second_start(state)
    run.define("a", definition(None))
    run.want("a")
    if state in (S, R):
        run.want("a")
    asked = run.entry("a")
    assert (asked.is_measuring, asked.state) == (True, P)
    run.do(facts.MeasureFailed("a", asked.edition - 1, OOM, 0.0))
    assert run.entry("a") == asked
    run.do(facts.Measured("a", asked.edition, Need(host(7)), 0.0))
    assert (run.state("a"), run.entry("a").is_measuring) == (P, False)
    run.emptied("a")
    assert (run.started, run.ctx.ledger.of("a")["Host"]) == (["a"], 7)


def test_measure_that_fails_while_the_old_server_stops_refuses_and_goes_on_stopping() -> None:
    run = second_start(R)
    run.define("a", definition(None))
    ticket = run.want("a")
    run.do(facts.MeasureFailed("a", run.entry("a").edition, OOM, 0.0))
    assert (run.answers[ticket], run.state("a")) == ("server_start_failed", P)
    assert run.emptied("a").state("a") is A


@pytest.mark.parametrize("state", [P, X])
def test_calls_for_a_removed_entry_are_refused_and_change_nothing(state: State) -> None:
    run = second_start(R)
    run.remove("a")
    if state is X:
        run.stuck("a")
    before = run.ctx
    tickets = [run.want("a"), run.load("a"), run.unload("a"), run.remove("a")]
    assert run.answers_of(tickets) == ["model_not_found"] * 4
    run.do(facts.Preloaded("a", 0.0))
    run.do(facts.Adopted("a", Generation(9), host(1), 0.0, has_entered=True))
    assert (run.state("a"), run.ctx.entries, run.ctx.waiting) == (state, before.entries, ())


@pytest.mark.parametrize("state", [A, S, R, P, X])
def test_request_too_many_changes_nothing(state: State) -> None:
    run = second_start(state)
    run.do(facts.Configured(Policy(max_waiting=0), host(3000), run.now))
    run.uses.pop("a", None)
    before = run.ctx.entries
    tickets = [run.want("a"), run.load("a", is_forced=True)]
    assert run.answers_of(tickets) == ["too_many_waiting"] * 2
    assert run.ctx.entries == before


def test_request_during_a_cool_down_does_not_touch_what_stops() -> None:
    """A failure of the measure cools down beside a server that stops."""
    run = second_start(P)
    run.define("a", definition(None))
    run.want("a")
    run.do(facts.MeasureFailed("a", run.entry("a").edition, OOM, 0.0))
    before = run.ctx.entries
    ticket = run.want("a")
    assert (run.answers[ticket], run.ctx.entries) == ("server_start_failed", before)


@pytest.mark.parametrize("state", [A, S, R, P, X])
def test_calls_after_the_shutdown_change_nothing(state: State) -> None:
    run = second_start(state)
    run.do(facts.ShutdownRequested(run.now))
    before = run.ctx.entries
    assert run.state("a") is (A if state is A else P)
    assert run.answers[run.want("a")] == "shutting_down"
    assert run.answers[run.want("z")] == "shutting_down"
    run.do(facts.Preloaded("z", 0.0)).do(facts.Preloaded("a", 0.0))
    run.do(facts.Adopted("a", Generation(9), host(1), 0.0, has_entered=True))
    assert (run.ctx.entries, run.ctx.waiting) == (before, ())


def test_unload_with_a_cut_while_it_drains_cancels_and_cuts() -> None:
    run = second_start(P)
    waiting, unload = run.want("a"), run.unload("a", cut=True)
    assert run.answers_of([waiting, unload]) == ["cancelled", None]
    assert [stop.cut for stop in run.stops] == [True]
    run.unload("a")
    assert run.stops == []
    assert run.state("a") is P
    assert run.emptied("a").answers[unload] == "emptied"


def test_withdrawn_call_of_an_unload_of_another_state_is_no_matter() -> None:
    for state in (A, S, R, P, X):
        run = second_start(state)
        before = run.ctx
        run.withdraw("a", Ticket(999))
        assert run.ctx.entries == before.entries


def test_removal_while_it_stops_refuses_who_waits_for_it() -> None:
    run = second_start(P)
    waiting, removal = run.want("a"), run.remove("a")
    assert run.answers_of([waiting, removal]) == ["model_not_found", None]
    assert (run.state("a"), run.entry("a").is_removed) == (P, True)
    run.emptied("a")
    assert (run.answers[removal], run.ctx.find("a")) == ("emptied", None)


@pytest.mark.parametrize("state", [R, X])
def test_removed_entry_is_forgotten_from_every_state(state: State) -> None:
    """Also if its slot is empty before it has been told to stop."""
    run = second_start(R)
    run.remove("a")
    if state is X:
        run.stuck("a")
    run.emptied("a")
    assert run.ctx.find("a") is None


def test_leases_of_an_adopted_server_are_granted_and_its_stay_begins() -> None:
    run = Run(1000, Policy(min_resident_s=5.0), b=1000, a=1000).resident("b")
    run.at(100.0)
    run.uses["b"] = Use("b", True, run.now)
    ticket = run.want("a")
    run.define("a", definition(1000))
    run.do(facts.Adopted("a", Generation(9), host(0), run.now, has_entered=True))
    assert (run.answers[ticket], run.entry("a").healthy_at, run.ctx.waiting) == ("granted", 100, ())


def test_emptied_of_an_earlier_start_ends_no_restart_and_forgets_no_removed_entry() -> None:
    run = Run(1000, a=definition(1000, restarts=True)).resident("a")
    run.crash("a").emptied("a").at(5.0)
    assert run.state("a") is S
    nothing(run, facts.Emptied("a", Generation(1), 0.0))
    run.healthy("a").remove("a")
    nothing(run, facts.Emptied("a", Generation(1), 0.0))
    assert run.entry("a").is_removed


def test_request_for_an_adopted_server_is_granted_though_its_measure_has_failed() -> None:
    """What runs does not cool down."""
    run = Run(1000, b=1000, a=definition(None)).resident("b")
    withdrawn = run.want("a")
    run.withdraw("a", withdrawn)
    run.uses["a"] = Use("a", False, None)
    run.do(facts.Adopted("a", Generation(9), host(0), run.now, has_entered=True))
    run.do(facts.MeasureFailed("a", run.entry("a").edition, OOM, run.now))
    assert (run.state("a"), run.entry("a").cool_until) == (R, 1.0)
    assert run.answers[run.want("a")] == "granted"
