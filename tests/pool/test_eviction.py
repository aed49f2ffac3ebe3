"""Who goes, and who is next."""

from __future__ import annotations

from orchestrator.pool import facts
from orchestrator.pool.commands import DropStale, SetTimer, Stop
from orchestrator.pool.context import Policy
from orchestrator.pool.facts import Use
from tests.kit.pool.run import P, R, Run, S, definition

POLICY = Policy(max_wait_s=30.0, min_resident_s=5.0)


def busy(run: Run, *names: str) -> Run:
    for name in names:
        run.uses[name] = Use(name, True, run.now)
    return run


def test_idle_resident_goes_at_once_and_the_waiter_follows_when_it_is_gone() -> None:
    run = Run(1000, POLICY, a=1000, b=1000).resident("a").at(10.0)
    ticket = run.want("b")
    stop = Stop("a", run.generation("a"), "room", if_idle=True, room_for="b")
    assert run.commands[0] == stop
    assert (run.states, run.reserved) == ("PA", 1000)
    run.emptied("a")
    assert (run.states, run.reserved, run.started) == ("AS", 1000, ["b"])
    assert run.healthy("b").answers[ticket] == "granted"


def test_victim_is_stopping_from_the_step_that_chooses_it() -> None:
    """B94: a new request for it waits like any other."""
    run = Run(1000, POLICY, a=1000, b=1000).resident("a").at(10.0)
    first = run.want("b")
    second = run.want("a")
    assert (run.state("a"), run.answers.get(second)) == (P, None)
    run.emptied("a").healthy("b")
    assert run.answers_of([first, second]) == ["granted", None]


def test_nothing_is_evicted_in_its_first_seconds() -> None:
    """B97: `min_resident_s` wins over everything a waiter could want."""
    policy = Policy(max_wait_s=1.0, min_resident_s=5.0)
    run = Run(1000, policy, a=1000, b=1000).resident("a").at(1.0)
    run.want("b")
    assert run.of(SetTimer) == [SetTimer(2.0)]
    assert run.at(4.9).state("a") is R
    assert run.at(5.0).state("a") is P


def test_resident_in_use_goes_only_for_who_has_waited_max_wait() -> None:
    """B93: endless traffic on one model does not starve the others."""
    run = busy(Run(1000, POLICY, a=1000, b=1000).resident("a"), "a").at(10.0)
    run.want("b")
    assert run.of(SetTimer) == [SetTimer(40.0)]
    assert run.at(39.9).state("a") is R
    run.at(40.0)
    assert run.of(Stop) == [Stop("a", run.generation("a"), "room", room_for="b")]
    assert run.state("a") is P


def test_resident_that_becomes_idle_goes_for_who_waits() -> None:
    run = busy(Run(1000, POLICY, a=1000, b=1000).resident("a"), "a").at(10.0)
    run.want("b")
    assert run.leave("a").stopped == ["a"]


def test_pinned_resident_never_goes() -> None:
    pinned = definition(1000, is_pinned=True)
    run = Run(2000, POLICY, a=pinned, b=1000, c=1000).resident("a", "b").at(10.0)
    run.want("c")
    assert run.stopped == ["b"]
    assert run.emptied("b").healthy("c").states == "RAR"


def test_largest_and_longest_unused_goes_by_what_its_return_costs() -> None:
    run = Run(3000, POLICY, a=1000, b=1000, c=1000, d=1000).resident("a", "b", "c")
    run.uses = {
        "a": Use("a", False, 10.0),
        "b": Use("b", False, 2.0),
        "c": Use("c", False, 8.0),
    }
    run.at(20.0).want("d")
    assert run.stopped == ["b"]


def test_two_small_ones_go_only_if_they_are_cheaper_than_the_large_one() -> None:
    run = Run(4000, POLICY, big=2000, s1=1000, s2=1000, new=2000).resident("big", "s1", "s2")
    run.uses["big"] = Use("big", False, 19.0)
    assert set(run.at(20.0).tried("new")) == {"s1", "s2"}
    run.uses["big"] = Use("big", False, 1.0)
    for name in ("s1", "s2"):
        run.uses[name] = Use(name, False, 19.5)
    assert run.tried("new") == ["big"]


def test_room_that_is_being_emptied_is_promised_once() -> None:
    """B92: two waiters never count on one victim."""
    run = Run(2000, POLICY, a=1000, b=1000, c=1000, d=1000).resident("a", "b").at(10.0)
    run.want("c")
    run.want("d")
    assert run.states == "PPAA"
    assert run.emptied("a").started == ["c"]
    assert run.emptied("b").started == ["d"]


def test_longest_wait_by_weight_is_next() -> None:
    run = busy(Run(1000, POLICY, a=1000, b=1000, c=definition(weight=3.0)).resident("a"), "a")
    run.at(10.0).want("b")
    run.at(14.0).want("c")
    run.at(20.0).leave("a")
    assert run.emptied("a").started == ["c"]


def test_overdue_waiter_is_next_whatever_the_weights() -> None:
    run = busy(Run(1000, POLICY, a=1000, b=1000, c=definition(weight=100.0)).resident("a"), "a")
    run.at(10.0).want("b")
    run.at(30.0).want("c")
    run.at(40.0)
    assert run.emptied("a").started == ["b"]


def test_nothing_is_started_in_the_room_of_an_overdue_waiter() -> None:
    """A large model does not starve behind small ones."""
    run = Run(2000, POLICY, big=2000, a=1000, b=1000).resident("a")
    busy(run, "a").at(10.0).want("big")
    run.at(38.0).want("b")
    assert run.started == ["b"]
    run.emptied("b")
    run.at(39.0).withdraw("b", run.want("b"))
    run.emptied("b")
    run.at(50.0)
    assert run.state("a") is P
    run.want("b")
    assert run.started == []
    assert run.emptied("a").started == ["big"]


def test_free_part_of_a_promised_room_is_not_given_to_who_has_other_room_to_come() -> None:
    """Else each small model takes what is free, gives what it frees, and the large one starves."""
    run = Run(3000, POLICY, big=2000, a=1000, b=1000, c=1000).resident("a", "b").at(10.0)
    big = run.want("big")
    assert len(run.stopped) == 1
    small = run.want("c")
    assert (run.states.count("P"), run.started) == (2, [])
    first, second = ("a", "b") if run.state("a") is P else ("b", "a")
    assert run.emptied(first).started == ["big"]
    assert run.emptied(second).started == ["c"]
    run.healthy("big").healthy("c")
    assert run.answers_of([big, small]) == ["granted", "granted"]


def test_a_small_model_passes_one_that_is_not_overdue() -> None:
    run = busy(Run(2000, POLICY, big=2000, a=1000, b=1000).resident("a"), "a").at(10.0)
    run.want("big")
    run.want("b")
    assert run.started == ["b"]


def test_of_a_group_one_is_resident_and_the_other_takes_its_place() -> None:
    g = definition(500, group="g")
    run = Run(3000, POLICY, a=g, b=g, c=500).resident("a", "c").at(10.0)
    run.want("b")
    assert run.stopped == ["a"]
    assert run.emptied("a").healthy("b").states == "ARR"


def test_pinned_one_of_a_group_refuses_the_others() -> None:
    run = Run(3000, POLICY, a=definition(500, group="g", is_pinned=True))
    run.define("b", definition(500, group="g")).resident("a").at(10.0)
    ticket = run.want("b")
    assert run.answers[ticket] == "too_large"
    assert run.problems[ticket].message.startswith("b does not fit beside a pinned model of its")


def test_max_resident_counts_servers() -> None:
    run = Run(9000, Policy(max_resident=2), a=1, b=1, c=1).resident("a", "b").at(10.0)
    run.want("c")
    assert len(run.stopped) == 1
    run.emptied(run.stopped[0])
    assert run.started == ["c"]


def test_pins_that_fill_max_resident_refuse_the_others() -> None:
    run = Run(9000, Policy(max_resident=1), a=definition(1, is_pinned=True), b=1).resident("a")
    ticket = run.want("b")
    assert run.answers[ticket] == "too_large"
    assert "max_resident" in run.problems[ticket].message


def test_unused_resident_is_stopped_after_its_idle_time() -> None:
    ttl = definition(1000, idle_ttl_s=900.0)
    run = Run(3000, POLICY, a=ttl, p=definition(1000, idle_ttl_s=900.0, is_pinned=True))
    run.at(100.0).resident("a", "p")
    run.uses["a"] = Use("a", False, 400.0)
    run.at(1299.0)
    assert run.states == "RR"
    run.at(1300.0)
    assert run.of(Stop) == [Stop("a", run.generation("a"), "idle", if_idle=True)]
    assert run.at(9999.0).states == "PR"


def test_resident_in_use_is_looked_at_again_after_its_idle_time() -> None:
    run = busy(Run(a=definition(1000, idle_ttl_s=900.0)).resident("a"), "a")
    assert run.at(2000.0).state("a") is R
    run.leave("a")
    assert run.at(2899.0).state("a") is R
    assert run.at(2900.0).state("a") is P


# -------------------------------------------------------------------------------- preloads
def test_preloads_start_in_their_order_and_what_does_not_fit_is_skipped() -> None:
    run = Run(2500, POLICY, a=1000, b=1000, c=1000, d=500)
    for name in ("c", "a", "b", "d"):
        run.do(facts.Preloaded(name, run.now))
        if name == "b":
            assert run.given_up == [("b", "preload")]
    assert (run.states, run.generation("c")) == ("SASS", 1)
    for name in ("a", "c", "d"):
        run.healthy(name)
    assert (run.states, run.ctx.waiting) == ("RARR", ())


def test_preload_evicts_nobody_not_even_the_idle() -> None:
    run = Run(1000, POLICY, a=1000, b=1000).resident("a").at(10.0)
    run.do(facts.Preloaded("b", run.now))
    assert (run.given_up, run.states) == ([("b", "preload")], "RA")


def test_request_for_a_preload_may_evict() -> None:
    run = busy(Run(1000, POLICY, a=1000, b=1000).resident("a").at(10.0), "a")
    ticket = run.want("b")
    run.do(facts.Preloaded("b", run.now))
    assert run.given_up == []
    run.leave("a").emptied("a").healthy("b")
    assert run.answers[ticket] == "granted"


def test_preload_of_what_is_there_or_unknown_is_no_matter() -> None:
    run = Run(1000, POLICY, a=1000).resident("a")
    before = run.ctx
    for name in ("a", "z"):
        run.do(facts.Preloaded(name, run.now))
        assert run.commands == (DropStale(name, "preload"),)
    assert run.ctx == before


def test_stops_are_for_somebody() -> None:
    run = Run(1000, POLICY, a=1000, b=1000).resident("a").at(10.0)
    run.withdraw("b", run.want("b"))
    assert run.emptied("a").states == "AA"
    assert run.state("b") is not S


def test_what_has_just_been_loaded_for_nobody_may_go_in_the_same_step() -> None:
    """The owner asks the gates of residents only, and nothing would make it look again."""
    run = Run(1000, Policy(min_resident_s=0.0), a=1000, b=1000)
    run.load("a")
    run.load("b")
    run.do(facts.BecameHealthy("a", run.generation("a"), run.now, None, True))
    assert (run.stopped, run.states) == (["a"], "PA")
    assert run.stops[0].if_idle


def test_room_for_two_waiters_is_made_in_one_step() -> None:
    """What has been chosen for the first is not counted for the second, and not against it."""
    run = Run(2000, Policy(min_resident_s=5.0), a=1000, b=1000, c=1000, d=1000)
    run.resident("a", "b")
    run.load("c")
    run.load("d")
    assert run.stopped == []
    run.at(5.0)
    assert {(stop.name, stop.room_for) for stop in run.stops} == {("a", "c"), ("b", "d")}
