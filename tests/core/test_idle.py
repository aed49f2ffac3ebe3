"""A server without leases is stopped after its idle time."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.machine.commands import DropStale, Kill, LeaseGranted, SetTimer
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import TimerFired, Withdrawn
from tests.kit.machine import run as kit
from tests.kit.machine.run import A, B, H, I, K, Run

TTL_S = 60.0
IDLE = Policy(idle_ttl_s=TTL_S)


def healthy(policy: Policy = IDLE, **options: Any) -> Run:
    return kit.healthy(policy=policy, **options)


def test_idle_time_begins_at_the_commit() -> None:
    """B65: a model was unloaded right after a long load, because nobody had used it yet."""
    run = Run(IDLE)
    run.load(A)
    run.now = 1000.0  # the load itself took longer than the time it may be idle
    run.settle()
    assert run.state is H
    assert run.timers("idle") == [SetTimer(Generation(1), "idle", TTL_S)]
    assert (run.running.wanted_at, run.running.idle_ttl_s) == (1000.0, TTL_S)


def test_idle_server_is_stopped_and_the_slot_is_verified() -> None:
    run = healthy().fire("idle", 1)
    assert run.state is K
    assert run.commands_of(Kill)
    assert run.emptied().state is I
    assert (run.ctx.child, run.ctx.running, run.ctx.last_error) == (None, None, None)


def test_a_server_in_use_has_its_idle_time_once_more() -> None:
    """A long answer is use for as long as it lasts."""
    run = healthy()
    lease = run.lease()
    run.fire("idle", 1)
    assert (run.state, run.ctx.gate) == (H, "open")
    assert run.commands == (SetTimer(Generation(1), "idle", TTL_S),)
    run.release(lease)
    assert run.fire("idle", 1).state is K


def test_a_server_that_was_used_has_what_is_left_of_its_idle_time() -> None:
    run = healthy()
    run.do(TimerFired(Generation(1), run.now, "idle", idle_in_s=12.5))
    assert run.state is H
    assert run.commands == (SetTimer(Generation(1), "idle", 12.5),)


def test_lease_during_an_idle_unload_is_refused_or_waits_for_a_load() -> None:
    """B27, B63: it must neither hang nor be granted a dying server."""
    run = healthy().fire("idle", 1)
    assert run.category(run.lease()) == "not_loaded"
    run.load(B)
    waiting = run.lease()
    assert isinstance(run.settle().answers[waiting], LeaseGranted)


def test_load_during_an_idle_unload_follows_it() -> None:
    run = healthy().fire("idle", 1)
    ticket = run.load(A)
    assert run.settle().state is H
    assert run.category(ticket) == "loaded"
    assert run.timers("idle") == [SetTimer(Generation(2), "idle", TTL_S)]


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
def test_idle_ttl_of_the_request_wins_and_pinned_wins_over_both(
    policy_s: float | None, options: dict[str, Any], expected_s: float | None
) -> None:
    run = healthy(Policy(idle_ttl_s=policy_s), **options)
    assert [timer.after_s for timer in run.timers("idle")] == ([expected_s] if expected_s else [])
    if expected_s is None:
        assert run.fire("idle", 1).state is H


@pytest.mark.parametrize("on_busy", ["supersede", "queue"])
def test_already_loaded_call_sets_the_idle_time(on_busy: str) -> None:
    """B28: a changed setting that is answered `already_loaded` must take effect all the same."""
    run = healthy()
    first = run.load(A, pinned=True, on_busy=on_busy)
    assert run.category(first) == "already"
    assert run.fire("idle", 1).state is H
    second = run.load(A, idle_ttl_s=5, on_busy=on_busy)
    assert run.category(second) == "already"
    assert run.timers("idle") == [SetTimer(Generation(1), "idle", 5.0)]
    assert run.fire("idle", 1).state is K


def test_joining_call_sets_the_idle_time() -> None:
    run = Run(IDLE)
    run.load(A)
    joined = run.load(A, pinned=True)
    assert run.settle().category(joined) == "loaded"
    assert run.timers("idle") == []
    assert run.fire("idle", 1).state is H


def test_queued_load_of_the_same_model_sets_the_idle_time() -> None:
    run = Run(IDLE)
    run.load(A)
    queued = run.load(A, on_busy="queue", idle_ttl_s=7)
    run.settle()
    assert run.category(queued) == "loaded"
    assert run.timers("idle") == [SetTimer(Generation(1), "idle", 7.0)]


def test_idle_timer_of_an_earlier_server_is_ignored() -> None:
    """B05, for timers."""
    run = healthy()
    run.load(B)
    run.settle()
    before = run.ctx
    run.fire("idle", 1)
    assert (run.state, run.ctx) == (H, before)
    assert run.commands == (DropStale(Generation(1), "idle_expired"),)


def test_idle_timer_after_a_crash_is_ignored() -> None:
    run = healthy()
    run.exited(41, -11)
    run.emptied()
    assert run.fire("idle", 1).state is I
    assert run.last_error.category == "server_exited"


def test_a_withdrawal_without_a_lease_does_not_restart_the_idle_time() -> None:
    """A caller may go away after its answer."""
    run = healthy()
    run.now += 10.0
    run.do(Withdrawn(Ticket(1), run.now))
    assert run.timers("idle") == []
    assert run.running.wanted_at == 0.0
