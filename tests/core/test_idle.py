"""A server nobody uses is stopped, decided in the same place as everything else."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.machine.commands import DropStale, Kill, LeaseGranted, SetTimer
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Exit as ServerExit
from orchestrator.machine.facts import Exited, LeaseReleased, TimerFired, Withdrawn
from tests.core.test_machine import A, B, H, I, K, Run

TTL_S = 60.0


def healthy(policy: Policy | None = None, **options: Any) -> Run:
    run = Run(policy or Policy(idle_ttl_s=TTL_S))
    run.load(A, **options)
    return run.settle()


def idle_timers(run: Run) -> list[SetTimer]:
    return [c for c in run.commands if isinstance(c, SetTimer) and c.kind == "idle"]


def idle_at(run: Run) -> float | None:
    assert run.ctx.running is not None
    return run.ctx.running.idle_at


def expire(run: Run, generation: int = 1) -> Run:
    return run.do(TimerFired(Generation(generation), run.now, "idle"))


def release(run: Run, lease: Ticket) -> None:
    run.do(LeaseReleased(lease, run.now))


def test_a_model_nobody_has_used_yet_gets_its_whole_time() -> None:
    """B65: a model unloaded right after its load because nobody had used it yet."""
    run = Run(Policy(idle_ttl_s=TTL_S))
    run.load(A)
    run.now = 1000.0  # the load itself took longer than the time it may be idle
    run.settle()
    assert run.state is H
    assert idle_timers(run) == [SetTimer(Generation(1), "idle", TTL_S)]
    assert idle_at(run) == 1060.0


def test_a_server_nobody_uses_is_stopped_and_the_slot_is_verified() -> None:
    """It goes the way of every stop: Killing, then Idle with nothing alive."""
    run = expire(healthy())
    assert run.state is K
    assert run.began(Kill)
    assert run.emptied().state is I
    assert (run.ctx.child, run.ctx.running, run.ctx.last_error) == (None, None, None)


def test_a_lease_keeps_the_server_and_the_time_begins_when_the_last_is_given_back() -> None:
    """A long answer is use for as long as it lasts."""
    run = healthy()
    first, second = run.lease(), run.lease()
    assert idle_at(run) is None
    assert expire(run).commands == (DropStale(Generation(1), "idle_expired"),)
    release(run, first)
    assert (run.state, idle_timers(run)) == (H, [])
    run.now = 500.0
    release(run, second)
    assert idle_timers(run) == [SetTimer(Generation(1), "idle", TTL_S)]
    assert idle_at(run) == 560.0
    assert expire(run).state is K


def test_a_holder_that_goes_away_gives_the_server_back_to_its_clock() -> None:
    """A client that disconnects must not keep a model loaded for ever."""
    run = healthy()
    lease = run.lease()
    run.withdraw(lease)
    assert idle_timers(run) == [SetTimer(Generation(1), "idle", TTL_S)]


def test_a_request_meets_a_server_that_stays_or_none() -> None:
    """B27, B63: a request during an idle unload hangs, or meets a dying server."""
    run = expire(healthy())
    assert run.category(run.lease()) == "not_loaded"
    run.load(B)
    waiting = run.lease()
    assert isinstance(run.settle().answers[waiting], LeaseGranted)


def test_a_load_during_an_idle_unload_follows_it() -> None:
    """What is asked for last is what runs in the end."""
    run = expire(healthy())
    ticket = run.load(A)
    assert run.settle().state is H
    assert run.category(ticket) == "loaded"
    assert idle_timers(run) == [SetTimer(Generation(2), "idle", TTL_S)]


@pytest.mark.parametrize(
    ("policy_s", "options", "expected_s"),
    [
        (None, {}, None),
        (TTL_S, {}, TTL_S),
        (TTL_S, {"idle_ttl_s": 5}, 5.0),
        (None, {"idle_ttl_s": 5}, 5.0),
        (TTL_S, {"pinned": True}, None),
        (TTL_S, {"idle_ttl_s": 5, "pinned": True}, None),
    ],
)
def test_the_request_wins_over_the_orchestrator_and_pinned_over_both(
    policy_s: float | None, options: dict[str, Any], expected_s: float | None
) -> None:
    """Contract section 1: `idle_ttl_s`, and a pinned model never."""
    run = healthy(Policy(idle_ttl_s=policy_s), **options)
    assert [timer.after_s for timer in idle_timers(run)] == ([expected_s] if expected_s else [])
    if expected_s is None:
        assert expire(run).state is H


@pytest.mark.parametrize("on_busy", ["supersede", "queue"])
def test_a_load_that_finds_its_model_running_decides_how_long_it_stays(on_busy: str) -> None:
    """B28: a changed setting that answers `already_loaded` must arrive all the same."""
    run = healthy()
    first = run.load(A, pinned=True, on_busy=on_busy)
    assert run.category(first) == "already"
    assert expire(run).state is H
    second = run.load(A, idle_ttl_s=5, on_busy=on_busy)
    assert run.category(second) == "already"
    assert idle_timers(run) == [SetTimer(Generation(1), "idle", 5.0)]
    assert expire(run).state is K


def test_who_joins_a_load_decides_how_long_its_model_stays() -> None:
    """The newest request for a model is the one whose wishes hold."""
    run = Run(Policy(idle_ttl_s=TTL_S))
    run.load(A)
    joined = run.load(A, pinned=True)
    assert run.settle().category(joined) == "loaded"
    assert idle_timers(run) == []
    assert expire(run).state is H


def test_a_load_that_waited_and_finds_its_model_running_counts_as_use() -> None:
    """It was asked for, so it is wanted: its time begins anew."""
    run = Run(Policy(idle_ttl_s=TTL_S))
    run.load(A)
    queued = run.load(A, on_busy="queue", idle_ttl_s=7)
    run.settle()
    assert run.category(queued) == "loaded"
    assert idle_timers(run) == [SetTimer(Generation(1), "idle", 7.0)]


def test_the_clock_of_an_earlier_server_stops_no_later_one() -> None:
    """B05 for timers: what belongs to load N means nothing to load N+1."""
    run = healthy()
    run.load(B)
    run.settle()
    before = run.ctx
    expire(run, generation=1)
    assert (run.state, run.ctx) == (H, before)
    assert run.commands == (DropStale(Generation(1), "idle_expired"),)


def test_a_server_that_ends_by_itself_is_not_taken_for_idle() -> None:
    """The timer that is still set finds nothing to stop."""
    run = healthy()
    run.do(Exited(Generation(1), run.now, ServerExit(41, -11)))
    run.emptied()
    assert expire(run).state is I
    assert run.ctx.last_error is not None
    assert run.ctx.last_error.category == "server_exited"


@pytest.mark.parametrize("fact", [LeaseReleased, Withdrawn])
def test_who_leaves_without_having_used_the_server_does_not_prolong_its_life(fact: Any) -> None:
    """A lease is given back once, but said twice; a caller goes away after its answer."""
    run = healthy()
    run.now += 10.0
    run.do(fact(Ticket(1), run.now))
    assert idle_timers(run) == []
    assert idle_at(run) == TTL_S
