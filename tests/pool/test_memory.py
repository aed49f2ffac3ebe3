"""Figures, budgets, out of memory: what is reserved, and what is done when it was wrong."""

from __future__ import annotations

import pytest

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.pool import facts
from orchestrator.pool.commands import DropStale, Start
from orchestrator.pool.context import Need, Policy
from orchestrator.pool.facts import Use
from orchestrator.pool.ledger import SERVERS, Amounts, group_account
from tests.kit.pool.run import A, P, R, Run, S, X, definition, host
from tests.kit.sentences import assert_sentence

POLICY = Policy(max_wait_s=30.0, min_resident_s=5.0)
OOM = Problem("server_start_failed", "there is too little memory", reason="out_of_memory")


# ------------------------------------------------------------------------------------ figures
@pytest.mark.parametrize("mib", [700, 1000, 1900])
def test_exact_figure_that_fits_is_reserved_and_known_from_then_on(mib: int) -> None:
    """B96: an estimate of a new architecture may be wrong in both directions."""
    run = Run(2000, a=1000)
    run.want("a")
    run.sized("a", mib)
    assert (run.state("a"), run.reserved) == (S, mib)
    assert run.entry("a").server == host(mib)
    need = run.entry("a").definition.need
    assert need is not None
    assert (need.amounts, need.source) == (host(mib), "exact")


def test_exact_figure_that_does_not_fit_ends_that_start_and_evicts_for_the_truth() -> None:
    run = Run(3000, POLICY, a=1000, b=1000, c=1000).resident("a", "b").at(10.0)
    ticket = run.want("c")
    run.sized("c", 1500)
    assert (run.state("c"), run.reasons[0], run.answers.get(ticket)) == (P, "figure", None)
    assert (sorted(run.stopped), run.reserved) == (["a", "c"], 3000)
    run.emptied("c")
    assert run.started == []
    run.emptied("a")
    assert run.of(Start) == [Start("c", Generation(4), host(1500))]
    run.sized("c", 1500).healthy("c")
    assert (run.answers[ticket], run.reserved) == ("granted", 2500)


def test_exact_figure_that_can_never_fit_refuses_with_need_budget_and_pins() -> None:
    pinned = definition(400, is_pinned=True)
    run = Run(3000, a=1000, p=pinned).resident("p")
    ticket = run.want("a")
    run.sized("a", 2800)
    assert run.answers[ticket] == "too_large"
    assert_sentence("pool.too_large", run.problems[ticket].message)
    run.emptied("a")
    assert run.answers[run.want("a")] == "too_large"


def test_declared_figure_is_believed_whatever_the_server_says() -> None:
    run = Run(1000, a=definition(300, source="declared"))
    run.want("a")
    run.sized("a", 200)
    assert (run.state("a"), run.reserved) == (S, 300)
    run.sized("a", 5000)
    assert run.entry("a").server == host(5000)
    run.healthy("a", mib=5100)
    assert (run.state("a"), run.reserved) == (R, 300)
    assert run.entry("a").server == host(5100)


def test_figure_of_a_changed_entry_is_not_learned() -> None:
    """It is that of the server that starts, not of the one that the catalogue now describes."""
    run = Run(3000, a=1000)
    run.want("a")
    run.define("a", definition(2000))
    run.sized("a", 1100)
    need = run.entry("a").definition.need
    assert need is not None
    assert (need.amounts, run.reserved) == (host(2000), 1100)


def test_figure_of_an_earlier_start_is_dropped() -> None:
    run = Run(3000, a=1000)
    run.want("a")
    run.do(facts.Sized("a", Generation(0), host(9000), run.now))
    assert run.commands == (DropStale("a", "sized"),)
    assert run.state("a") is S


# ------------------------------------------------------------------------------------- fitted
def test_auto_context_above_the_budget_is_fitted_into_what_pins_leave() -> None:
    pinned = definition(500, is_pinned=True)
    run = Run(3000, POLICY, a=definition(9000, least=100), p=pinned, b=500)
    run.resident("p", "b").at(10.0)
    ticket = run.want("a")
    assert run.stopped == ["b"]
    run.emptied("b")
    assert run.of(Start) == [Start("a", Generation(3), host(2500), is_fitted=True)]
    run.sized("a", 9000)
    assert (run.state("a"), run.reserved) == (S, 3000)
    run.healthy("a", mib=1800)
    assert (run.answers[ticket], run.reserved) == ("granted", 2300)
    run.want("b")
    assert run.started == ["b"]


def test_need_within_the_budget_is_not_fitted() -> None:
    run = Run(3000, a=definition(3000, least=100))
    run.want("a")
    assert run.of(Start) == [Start("a", Generation(1), host(3000))]


def test_server_that_outgrows_its_fitting_is_ended_and_told() -> None:
    run = Run(3000, a=definition(9000, least=100))
    ticket = run.want("a")
    run.healthy("a", mib=3001)
    assert (run.state("a"), run.reasons) == (P, ["figure"])
    assert (run.answers[ticket], run.problems[ticket].retry_after_s) == ("too_large", 1.0)
    assert_sentence("pool.outgrown", run.problems[ticket].message)
    assert run.emptied("a").state("a") is A


def test_figure_of_an_earlier_fitting_is_dropped() -> None:
    run = Run(3000, a=definition(9000, least=100))
    run.want("a")
    run.do(facts.BecameHealthy("a", Generation(0), run.now, host(9000), True))
    assert (run.commands, run.state("a")) == ((DropStale("a", "healthy"),), S)


def test_nothing_is_fitted_where_pins_leave_nothing() -> None:
    pinned = definition(3000, is_pinned=True)
    run = Run(3000, a=definition(9000, least=100), p=pinned).resident("p")
    assert run.answers[run.want("a")] == "too_large"


# ------------------------------------------------------------------------------ out of memory
def test_out_of_memory_evicts_what_is_idle_and_is_tried_once_more() -> None:
    run = Run(3000, POLICY, a=1000, b=1000, c=500).resident("a", "b").at(10.0)
    run.uses["b"] = Use("b", True, run.now)
    ticket = run.want("c")
    run.emptied("c", OOM)
    assert (run.stopped, run.reasons, run.states) == (["a"], ["memory"], "PRA")
    assert run.reserved == 2000
    assert run.started == []
    run.emptied("a")
    assert run.started == ["c"]
    run.emptied("c", OOM)
    assert (run.answers[ticket], run.states) == ("server_start_failed", "ARA")


def test_start_that_fails_otherwise_evicts_nobody() -> None:
    run = Run(3000, POLICY, a=1000, c=500).resident("a").at(10.0)
    ticket = run.want("c")
    run.emptied("c", Problem("server_start_failed", "it ended", reason="exited"))
    assert (run.answers[ticket], run.states) == ("server_start_failed", "RA")


def test_out_of_memory_with_nothing_idle_is_a_failed_start() -> None:
    run = Run(3000, POLICY, a=1000, c=500).resident("a").at(10.0)
    run.uses["a"] = Use("a", True, run.now)
    ticket = run.want("c")
    run.emptied("c", OOM)
    assert (run.answers[ticket], run.states) == ("server_start_failed", "RA")


def test_restart_by_the_house_that_runs_out_of_memory_is_tried_once_more_too() -> None:
    run = Run(3000, POLICY, a=1000, c=definition(500, restarts=True)).resident("a", "c").at(10.0)
    run.crash("c").emptied("c").at(20.0)
    assert run.state("c") is S
    run.emptied("c", OOM)
    assert (run.states, run.given_up) == ("PA", [])
    assert run.emptied("a").started == ["c"]


def test_preload_that_runs_out_of_memory_evicts_nobody() -> None:
    run = Run(3000, POLICY, a=1000, c=500).resident("a").at(10.0)
    run.do(facts.Preloaded("c", run.now)).emptied("c", OOM)
    assert (run.states, run.given_up) == ("RA", [("c", "preload")])


def test_second_try_belongs_to_who_waited_then() -> None:
    run = Run(3000, POLICY, a=1000, c=500).resident("a").at(10.0)
    ticket = run.want("c")
    run.emptied("c", OOM)
    run.withdraw("c", ticket)
    assert not run.entry("c").retries
    run.want("c")
    assert run.started == ["c"]


def test_success_after_a_second_try_allows_another_later() -> None:
    run = Run(3000, POLICY, a=1000, c=500).resident("a").at(10.0)
    run.want("c")
    run.emptied("c", OOM).emptied("a").healthy("c")
    assert run.state("c") is R
    assert not run.entry("c").retries


# ---------------------------------------------------------------------------- what does not die
def test_stuck_server_keeps_its_reservation_and_its_callers_are_told() -> None:
    run = Run(1000, POLICY, a=1000, b=1000).resident("a").at(10.0)
    other, unload = run.want("b"), run.unload("a")
    own = run.want("a")
    run.stuck("a")
    assert (run.state("a"), run.reserved) == (X, 1000)
    assert run.answers_of([own, unload, other]) == ["slot_occupied"] * 3
    assert_sentence("pool.stuck", run.problems[own].message)
    assert_sentence("pool.beside_stuck", run.problems[other].message)
    assert run.emptied("a").reserved == 0


def test_request_for_a_stuck_one_tries_to_stop_it_again() -> None:
    run = Run(1000, POLICY, a=1000).resident("a")
    run.unload("a")
    run.stuck("a")
    ticket = run.want("a")
    assert (run.state("a"), run.reasons) == (P, ["stuck"])
    run.emptied("a").healthy("a")
    assert run.answers[ticket] == "granted"


def test_start_that_cannot_be_stopped_is_stuck() -> None:
    run = Run(1000, a=1000)
    ticket = run.want("a")
    assert run.stuck("a").answers[ticket] == "slot_occupied"
    assert run.state("a") is X


# --------------------------------------------------------------------------------- the budget
def shrink(run: Run, mib: int) -> Run:
    return run.do(facts.Configured(run.policy, host(mib), run.now))


def test_smaller_budget_evicts_the_cheapest_that_makes_it_good() -> None:
    run = Run(3000, POLICY, a=1000, b=1000, c=1000).resident("a", "b", "c")
    for name, used_at in (("a", 9.0), ("b", 1.0), ("c", 5.0)):
        run.uses[name] = Use(name, name == "c", used_at)
    run.at(10.0)
    shrink(run, 2000)
    assert (run.stopped, run.reasons) == (["b"], ["budget"])
    shrink(run, 1000)
    assert run.stopped == ["a"]
    shrink(run, 500)
    assert run.stopped == ["c"], "in use: it is closed, and goes when it is drained"


def test_smaller_budget_spares_the_pinned_and_evicts_what_helps() -> None:
    run = Run(3000, POLICY, a=definition(2000, is_pinned=True), b=1000).resident("a", "b")
    shrink(run, 1000)
    assert (run.stopped, run.states) == (["b"], "RP")
    assert run.emptied("b").state("a") is R


def test_debt_of_a_device_that_is_not_needed_is_no_matter() -> None:
    run = Run(3000, POLICY, a=definition(2000, is_pinned=True)).resident("a")
    gpu = definition(None)
    run.define("g", gpu)
    run.do(facts.Configured(run.policy, Amounts.of({"Host": 1000, "CUDA0": 500}), run.now))
    run.want("g")
    need = Need(Amounts.of({"CUDA0": 400}))
    assert run.do(facts.Measured("g", run.entry("g").edition, need, run.now)).started == ["g"]


def test_larger_budget_starts_who_waits() -> None:
    run = Run(1000, POLICY, a=1000, b=1000).resident("a")
    run.want("b")
    assert shrink(run, 2000).started == ["b"]


# ------------------------------------------------------------------------------------ adoption
def adopt(run: Run, name: str, mib: int, *, has_entered: bool = True) -> Run:
    run.uses[name] = Use(name, False, None)
    return run.do(facts.Adopted(name, Generation(7), host(mib), run.now, has_entered=has_entered))


def test_adopted_server_is_resident_and_reserved() -> None:
    run = adopt(Run(3000, a=1000), "a", 1200)
    assert (run.state("a"), run.reserved, run.generation("a")) == (R, 1200, 7)
    assert run.answers[run.want("a")] == "granted"
    assert run.crash("a").state("a") is P
    assert run.emptied("a").reserved == 0


def test_adopted_servers_above_the_budget_are_evicted() -> None:
    run = adopt(adopt(Run(2000, a=1000, b=1000), "a", 1500), "b", 1500)
    assert len(run.stopped) == 1
    assert sorted(run.states) == ["P", "R"]


def test_adoption_of_what_is_unknown_started_or_closed_again_is_dropped() -> None:
    run = Run(3000, a=1000, b=1000)
    run.want("a")
    for name, has_entered in (("z", True), ("a", True), ("b", False)):
        adopt(run, name, 500, has_entered=has_entered)
        assert run.commands == (DropStale(name, "adopted"),)
    assert run.states == "SA"


def test_server_that_takes_more_than_expected_keeps_its_places() -> None:
    run = Run(3000, Policy(max_resident=1), a=definition(1000, group="g"))
    run.load("a")
    run.sized("a", 1500)
    held = run.ctx.ledger.of("a")
    assert (held["Host"], held[SERVERS], held[group_account("g")]) == (1500, 1, 1)


def test_start_out_of_memory_is_tried_again_when_something_is_going_already() -> None:
    """Nothing more could be evicted, and what is on its way out makes room."""
    run = Run(3000, a=1000, b=1000).resident("b").at(100.0)
    run.unload("b")
    run.load("a")
    run.emptied("a", OOM)
    assert (run.states, run.entry("a").retries) == ("AP", True)
    run.emptied("b")
    assert run.started == ["a"]


def test_start_that_runs_out_of_memory_twice_has_failed_whatever_is_idle_by_then() -> None:
    run = Run(3000, a=1000, b=1000, c=1000).resident("b").at(100.0)
    caller = run.load("a")
    run.emptied("a", OOM).emptied("b").resident("c").at(200.0)
    assert run.states == "SAR"
    run.emptied("a", OOM)
    assert (run.answers[caller], run.states) == ("server_start_failed", "AAR")


def test_eviction_after_out_of_memory_is_of_idle_servers_and_for_that_model() -> None:
    run = Run(3000, a=1000, b=1000).resident("b").at(100.0)
    run.load("a")
    run.emptied("a", OOM)
    assert [(s.name, s.reason, s.if_idle, s.room_for) for s in run.stops] == [
        ("b", "memory", True, "a")
    ]
    run.emptied("b").healthy("a")
    assert (run.entry("a").retries, run.entry("a").after) == (False, frozenset())


def test_adopted_server_has_its_places_and_later_starts_have_higher_generations() -> None:
    run = Run(3000, Policy(max_resident=2), a=definition(1000, group="g"), b=1000)
    run.do(facts.Adopted("a", Generation(7), host(900), run.now, has_entered=True))
    held = run.ctx.ledger.of("a")
    assert (held["Host"], held[SERVERS], held[group_account("g")]) == (900, 1, 1)
    run.load("b")
    assert run.generation("b") == 8


def test_learned_figure_keeps_what_the_server_can_do_with() -> None:
    run = Run(3000, a=definition(1000, least=400))
    run.load("a")
    run.sized("a", 1500)
    need = run.entry("a").definition.need
    assert need == Need(host(1500), "exact", host(400))


def test_measured_size_of_files_is_known_from_then_on() -> None:
    """An eviction is judged by it. Without one the catalogue's stays."""
    run = Run(3000, a=definition(None))
    run.load("a")
    measured = facts.Measured("a", run.entry("a").edition, Need(host(700)), run.now, 123)
    run.do(measured)
    assert (run.entry("a").definition.size_bytes, run.started) == (123, ["a"])
    assert not run.entry("a").is_measuring


def test_refusal_names_what_pins_hold_and_not_what_could_go() -> None:
    run = Run(3000, a=definition(1000, is_pinned=True), b=500, c=2500).resident("a", "b")
    caller = run.load("c")
    assert "pinned models hold 1000 MiB" in run.problems[caller].message


def test_what_is_larger_than_the_budget_is_told_so_where_nothing_is_pinned() -> None:
    run = Run(3000, a=5000)
    ticket = run.want("a")
    assert run.answers[ticket] == "too_large"
    assert_sentence("pool.too_large_alone", run.problems[ticket].message)
