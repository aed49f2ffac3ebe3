"""Unloads, removals, changes of the catalogue, crashes, the shutdown."""

from __future__ import annotations

import pytest

from orchestrator.errors import Problem
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.pool import facts
from orchestrator.pool.commands import AnswerEmptied, DropStale, Stop
from orchestrator.pool.context import Definition, Policy
from orchestrator.pool.facts import Use
from tests.kit.pool.run import A, P, R, Run, S, X, definition, host
from tests.kit.sentences import assert_sentence

BROKEN = Problem("server_start_failed", "it ended at once", reason="exited")


# -------------------------------------------------------------------------------------- unload
def test_unload_cancels_who_waits_and_is_answered_when_the_slot_is_empty() -> None:
    run = Run(a=1000)
    waiting = run.want("a")
    unload = run.unload("a")
    assert run.answers_of([waiting, unload]) == ["cancelled", None]
    assert_sentence("pool.unloaded", run.problems[waiting].message)
    assert (run.state("a"), run.reasons) == (P, ["unload"])
    second = run.unload("a")
    run.emptied("a")
    assert run.of(AnswerEmptied) == [AnswerEmptied(unload, "a"), AnswerEmptied(second, "a")]
    assert run.state("a") is A


def test_unload_of_an_absent_model_is_answered_at_once() -> None:
    run = Run(1000, a=1000, b=1000).resident("a")
    run.uses["a"] = Use("a", True, 0.0)
    waiting = run.want("b")
    unload = run.unload("b")
    assert run.answers_of([waiting, unload]) == ["cancelled", "emptied"]
    assert run.state("b") is A
    assert run.answers[run.unload("z")] == "model_not_found"


def test_unload_by_hand_takes_the_pinned_and_the_used_too() -> None:
    run = Run(a=definition(1000, is_pinned=True)).resident("a")
    run.uses["a"] = Use("a", True, 0.0)
    run.unload("a")
    assert run.of(Stop) == [Stop("a", run.generation("a"), "unload")]
    run.unload("a", cut=True)
    assert run.of(Stop) == [Stop("a", run.generation("a"), "unload", cut=True)]
    run.emptied("a")
    assert (run.state("a"), run.ctx.waiting) == (A, ())


def test_caller_of_an_unload_that_leaves_is_forgotten() -> None:
    run = Run(a=1000).resident("a")
    first, second = run.unload("a"), run.unload("a")
    run.withdraw("a", first).emptied("a")
    assert run.answers_of([first, second]) == [None, "emptied"]


def test_request_after_an_unload_starts_it_again() -> None:
    run = Run(a=1000).resident("a")
    run.unload("a")
    ticket = run.want("a")
    assert run.emptied("a").started == ["a"]
    assert run.healthy("a").answers[ticket] == "granted"


# -------------------------------------------------------------------------------------- reload
@pytest.mark.parametrize("state", [S, R])
def test_forced_load_stops_and_starts_again(state: object) -> None:
    run = Run(a=1000)
    first = run.want("a")
    if state is R:
        run.healthy("a")
    second = run.load("a", is_forced=True)
    assert (run.state("a"), run.reasons) == (P, ["reload"])
    assert run.emptied("a").started == ["a"]
    run.healthy("a")
    assert run.answers_of([first, second]) == ["granted", "granted"]


def test_changed_entry_is_reloaded_by_its_next_request() -> None:
    """B98: a changed line of the catalogue restarts nothing by itself."""
    run = Run(3000, a=1000, b=500).resident("a", "b")
    run.define("a", definition(2000))
    assert (run.commands, run.states) == ((), "RR")
    ticket = run.want("a")
    assert (run.reasons, run.states) == (["reload"], "PR")
    assert run.reserved == 2500, "the larger of old and new"
    run.emptied("a")
    assert (run.started, run.reserved) == (["a"], 2500)
    run.healthy("a")
    assert run.answers[ticket] == "granted"
    assert not run.entry("a").is_changed
    assert run.answers[run.want("a")] == "granted"


def test_smaller_new_need_holds_the_old_one_until_it_is_gone() -> None:
    run = Run(3000, a=2000).resident("a")
    run.define("a", definition(500))
    run.want("a")
    assert run.reserved == 2000
    run.emptied("a")
    assert run.reserved == 500


def test_larger_new_need_without_room_is_made_room_for() -> None:
    run = Run(3000, a=1000, b=1500).resident("a", "b").at(10.0)
    run.define("a", definition(2000))
    run.want("a")
    assert (run.stopped, run.reserved) == (["a", "b"], 2500)
    run.emptied("a")
    assert run.started == []
    assert run.emptied("b").started == ["a"]


def test_another_alias_changes_nothing_that_runs() -> None:
    run = Run(2000, Policy(max_wait_s=1.0), a=1000, b=2000).resident("a")
    run.sized("a", 1)
    pinned = definition(1000, is_pinned=True)
    run.define("a", pinned, is_other=False)
    assert run.answers[run.want("a")] == "granted"
    assert run.answers[run.want("b")] == "too_large", "pinned at once"


def test_learned_figure_outlives_another_alias_and_not_another_server() -> None:
    run = Run(2000, a=1000)
    run.want("a")
    run.sized("a", 700)
    run.define("a", definition(1000, weight=2.0), is_other=False)
    need = run.entry("a").definition.need
    assert need is not None
    assert (need.amounts, run.entry("a").definition.weight) == (host(700), 2.0)
    run.define("a", definition(900))
    need = run.entry("a").definition.need
    assert need is not None
    assert need.amounts == host(900)


def test_changed_entry_may_start_while_the_old_failure_cools_down() -> None:
    run = Run(2000, a=1000)
    run.want("a")
    run.emptied("a", BROKEN)
    run.define("a", definition(1000))
    run.want("a")
    assert run.started == ["a"]
    run.emptied("a", BROKEN)
    assert run.problems[run.want("a")].retry_after_s == 1.0


# ------------------------------------------------------------------------------------- removal
def test_removed_entry_is_unknown_at_once_and_forgotten_when_it_is_gone() -> None:
    run = Run(3000, a=1000, b=500).resident("a", "b")
    del run.uses["a"]
    waiting, removal = run.want("a"), run.remove("a")
    assert run.answers_of([waiting, removal]) == ["model_not_found", None]
    assert (run.state("a"), run.reasons, run.reserved) == (P, ["removed"], 1500)
    assert run.answers[run.want("a")] == "model_not_found"
    run.emptied("a")
    assert run.answers[removal] == "emptied"
    assert (run.ctx.find("a"), run.reserved) == (None, 500)


def test_removal_of_an_absent_entry_is_answered_at_once() -> None:
    run = Run(1000, a=1000, b=1000).resident("a")
    run.uses["a"] = Use("a", True, 0.0)
    waiting = run.want("b")
    removal = run.remove("b")
    assert run.answers_of([waiting, removal]) == ["model_not_found", "emptied"]
    assert run.ctx.find("b") is None
    assert run.answers[run.remove("b")] == "model_not_found"


def test_removed_by_the_catalogue_nobody_waits_for_the_end() -> None:
    run = Run(a=1000)
    run.do(facts.Removed("a", run.now))
    assert (run.commands, run.ctx.entries) == ((), ())
    assert run.do(facts.Removed("a", run.now)).commands == ()


def test_removed_entry_that_is_added_again_starts_when_its_slot_is_empty() -> None:
    run = Run(3000, a=1000).resident("a")
    removal = run.remove("a")
    run.define("a", definition(700))
    ticket = run.want("a")
    assert run.started == []
    run.emptied("a")
    assert (run.answers[removal], run.started, run.reserved) == ("emptied", ["a"], 700)
    assert run.healthy("a").answers[ticket] == "granted"


def test_removal_while_it_stops_keeps_the_callers_of_the_unload() -> None:
    run = Run(a=1000).resident("a")
    unload, removal = run.unload("a"), run.remove("a")
    run.emptied("a")
    assert run.answers_of([unload, removal]) == ["emptied", "emptied"]


# ------------------------------------------------------------------------------------- crashes
RESTART = RestartPolicy(backoff_s=1.0, backoff_max_s=60.0, limit=3, stable_after_s=60.0)


@pytest.mark.parametrize(
    "wish", [definition(1000, restarts=True), definition(1000, is_pinned=True)]
)
def test_crashed_server_that_the_house_wants_comes_back_after_a_backoff(
    wish: Definition,
) -> None:
    run = Run(1000, Policy(restart=RESTART), a=wish).resident("a").at(10.0)
    assert run.crash("a").state("a") is P
    run.emptied("a")
    assert (run.state("a"), run.ctx.timer_at) == (A, 11.0)
    assert run.at(11.0).state("a") is S
    assert run.healthy("a").state("a") is R
    assert run.ctx.waiting == ()


def test_crashed_server_that_nobody_wants_stays_away() -> None:
    run = Run(a=1000).resident("a")
    run.crash("a").emptied("a")
    assert (run.states, run.ctx.waiting) == ("A", ())


def test_restarts_back_off_and_end() -> None:
    """Without a backoff a server that crashes at once is started for ever."""
    run = Run(1000, Policy(restart=RESTART), a=definition(1000, restarts=True)).resident("a")
    for wait_s in (1.0, 2.0, 4.0):
        run.crash("a").emptied("a")
        assert run.ctx.timer_at == run.now + wait_s
        run.at(run.now + wait_s)
        assert run.state("a") is S
        run.healthy("a")
    run.crash("a").emptied("a")
    assert (run.state("a"), run.ctx.waiting) == (A, ())


def test_stable_server_starts_over_with_its_restarts() -> None:
    run = Run(1000, Policy(restart=RESTART), a=definition(1000, restarts=True)).resident("a")
    for _ in range(5):
        run.at(run.now + 60.0).crash("a").emptied("a")
        run.at(run.now + 1.0).healthy("a")
    assert run.entry("a").restarts == 1


def test_failed_restart_is_tried_again_and_given_up_at_last() -> None:
    run = Run(1000, Policy(restart=RESTART), a=definition(1000, restarts=True)).resident("a")
    run.crash("a").emptied("a").at(1.0)
    request = run.want("a")
    run.emptied("a", BROKEN)
    assert (run.answers[request], run.state("a")) == ("server_start_failed", A)
    assert run.answers[run.want("a")] == "server_start_failed"
    assert run.at(2.9).state("a") is A
    assert run.at(3.0).state("a") is S
    run.emptied("a", BROKEN)
    assert run.at(7.0).state("a") is S
    run.emptied("a", BROKEN)
    assert (run.given_up, run.ctx.waiting) == ([("a", "restart")], ())


def test_request_does_not_wait_for_the_backoff() -> None:
    run = Run(1000, a=definition(1000, restarts=True)).resident("a")
    run.crash("a").emptied("a")
    ticket = run.want("a")
    assert run.started == ["a"]
    run.healthy("a")
    assert (run.answers[ticket], run.ctx.waiting) == ("granted", ())


def test_unload_ends_what_the_house_wants() -> None:
    run = Run(1000, a=definition(1000, is_pinned=True)).resident("a")
    run.crash("a")
    run.unload("a")
    run.emptied("a")
    assert run.at(500.0).state("a") is A


# -------------------------------------------------------------------------------------- cancel
def test_cancel_ends_a_start_and_who_waits_for_it() -> None:
    run = Run(a=1000)
    waiting = run.want("a")
    assert run.cancel("a") == "True"
    assert (run.state("a"), run.reasons, run.answers[waiting]) == (P, ["withdrawn"], "cancelled")
    run.emptied("a")
    assert (run.state("a"), run.reserved) == (A, 0)


def test_cancel_ends_the_wait_for_room_and_for_an_empty_slot() -> None:
    run = Run(1000, a=1000, b=1000).resident("a")
    run.uses["a"] = Use("a", True, 0.0)
    waiting = run.want("b")
    assert (run.cancel("b"), run.answers[waiting], run.state("b")) == ("True", "cancelled", A)
    run.unload("a")
    again = run.want("a")
    assert (run.cancel("a"), run.answers[again], run.state("a")) == ("True", "cancelled", P)
    run.stuck("a")
    assert (run.cancel("a"), run.state("a")) == ("False", X)


def test_cancel_leaves_what_is_resident_stopping_or_at_rest() -> None:
    run = Run(a=1000, b=1000).resident("a")
    assert (run.cancel("a"), run.state("a")) == ("False", R)
    assert (run.cancel("b"), run.state("b")) == ("False", A)
    run.unload("a")
    assert (run.cancel("a"), run.state("a")) == ("False", P)
    assert run.cancel("z") == "model_not_found"
    run.remove("a")
    assert (run.cancel("a"), run.state("a")) == ("model_not_found", P)
    run.stuck("a")
    assert (run.cancel("a"), run.state("a")) == ("model_not_found", X)


def test_cancel_ends_a_restart_that_is_planned() -> None:
    run = Run(a=definition(1000, restarts=True)).resident("a")
    run.crash("a").emptied("a")
    assert (run.cancel("a"), run.state("a")) == ("True", A)
    assert run.at(500.0).state("a") is A


# ------------------------------------------------------------------------------------ shutdown
def test_shutdown_refuses_who_waits_and_stops_everything() -> None:
    run = Run(3000, Policy(), a=1000, b=1000, c=1000, d=1000).resident("a", "d")
    run.want("b")
    run.unload("d")
    run.stuck("d")
    waiting = run.want("c")
    run.do(facts.ShutdownRequested(run.now))
    assert run.answers[waiting] == "shutting_down"
    assert run.states == "PPAP"
    assert run.reasons == ["shutdown"] * 3
    assert run.ctx.waiting == ()


def test_nothing_is_accepted_after_the_shutdown() -> None:
    run = Run(1000, a=1000, b=definition(500, is_pinned=True))
    run.do(facts.ShutdownRequested(run.now))
    ticket = run.want("a")
    assert run.answers[ticket] == "shutting_down"
    assert_sentence("pool.shutting_down", run.problems[ticket].message)
    run.do(facts.Preloaded("a", run.now))
    assert run.commands == (DropStale("a", "preload"),)
    run.do(facts.Adopted("b", run.generation("b"), host(1), run.now, has_entered=True))
    assert (run.commands, run.states) == ((DropStale("b", "adopted"),), "AA")
    assert run.answers[run.unload("a")] == "emptied"


def test_cancel_ends_requests_for_what_is_not_there() -> None:
    """Those that wait for a place of a resident do not wait for a load."""
    run = Run(1000, a=1000, b=1000)
    run.resident("a").want("a")
    waiting = run.want("b", "request")
    assert run.cancel("b") == "True"
    assert run.answers[waiting] == "cancelled"
    assert run.cancel("b") == "False"


def test_restarts_in_a_row_are_counted_until_a_server_was_stable() -> None:
    """By how long it was Healthy, not by the clock."""
    restart = RestartPolicy(backoff_s=1.0, limit=2, stable_after_s=60.0)
    run = Run(1000, Policy(restart=restart), a=definition(1000, restarts=True)).resident("a")
    for stayed_s, count in ((1000.0, 1), (59.0, 2), (60.0, 1), (10.0, 2)):
        run.at(run.now + stayed_s).crash("a").emptied("a")
        assert run.entry("a").restarts == count
        run.at(run.now + 2.0).healthy("a")
    run.at(run.now + 59.0).crash("a").emptied("a")
    assert run.ctx.waiting == ()


def test_load_by_hand_ends_a_cool_down_for_requests_too() -> None:
    """They wait for that load, and are not refused with the failure of the one before."""
    run = Run(1000, a=1000)
    run.want("a")
    run.emptied("a", BROKEN)
    assert run.answers[run.want("a")] == "server_start_failed"
    run.load("a")
    waiting = run.want("a")
    assert waiting not in run.answers
    run.healthy("a")
    assert run.answers[waiting] == "granted"
    assert (run.entry("a").failures, run.entry("a").failure) == (0, None)


def test_callers_are_told_whether_it_was_an_unload_or_a_cancel() -> None:
    run = Run(1000, a=1000)
    for end, words in ((run.unload, "was unloaded while"), (run.cancel, "was cancelled while")):
        caller = run.want("a")
        end("a")
        assert words in run.problems[caller].message
        run.emptied("a")
