"""Queued loads that await the Hub or their files, prefetches, and what is reported at the end.

The server keeps running until a load is due. Each load and each server is concluded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    Concluded,
    Download,
    DropStale,
    LeaseGranted,
    Post,
    Prefetched,
)
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import (
    BecameReady,
    Emptied,
    Exit,
    Exited,
    Fact,
    NotReady,
    Promoted,
)
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.settings.files import HubModel, ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.kit.machine.run import SERVER, A, C, D, H, I, K, Run, W, healthy, in_flight
from tests.kit.machine.world import files, target
from tests.kit.sentences import assert_sentence

B, E = "o/B", "o/E"
FULL = Policy(max_waiting=1, max_prefetches=1)
RULES = RestartPolicy(backoff_s=4, backoff_max_s=60, limit=1, cool_down_s=100, stable_after_s=60)


# ------------------------------------------------------------------------- loads that await a model


def test_hub_model_is_resolved_while_the_server_runs() -> None:
    run = healthy()
    load = run.load(B)
    assert (run.state, run.begun_beside(), run.generations[load]) == (H, [("Resolve", 2)], 2)
    lease = run.lease()
    assert isinstance(run.answers[lease], LeaseGranted)
    run.resolved(2, B)
    assert run.state is H, "a promotion must arrive first"
    run.promote()
    assert (run.state, run.ctx.job and run.ctx.job.generation) == (K, 2)
    run.withdraw(lease)
    assert run.settle().category(load) == "loaded"


def test_prefetch_downloads_before_the_server_is_stopped() -> None:
    run = healthy()
    load = run.load(B, prefetch=True)
    run.resolved(2, B)
    assert (run.state, run.begun_beside()) == (H, [("Download", 2)])
    assert run.commands_of(Post) == []
    run.fetched_beside(2, B)
    run.promote()
    assert run.state is K
    assert run.settle().category(load) == "loaded"


def test_queued_hub_model_is_resolved_at_once_in_any_state() -> None:
    for state in (K, D, W):
        run, _ = in_flight(state)
        run.load(B, on_busy="queue")
        assert (run.state, run.begun_beside()) == (state, [("Resolve", 2)])
        run.resolved(2, B)
        assert run.commands_of(Post) == [], "the load before it is still in flight"


@pytest.mark.parametrize("prefetch", [False, True])
def test_refused_hub_model_leaves_the_server_running(prefetch: bool) -> None:
    """B72."""
    run = healthy()
    load = run.load(B, prefetch=prefetch)
    run.fetch_failed(2)
    assert run.problem(load).category == "hub_unreachable"
    assert (run.state, run.ctx.queue, run.concluded()) == (H, (), [(2, "hub_unreachable")])
    assert run.last_error.generation == 2
    run.fetch_failed(2)
    assert run.kinds == [DropStale], "the second failure is stale"


def test_unawaited_hub_answer_is_ignored() -> None:
    run = healthy()
    run.load(B, prefetch=True)
    run.fetched_beside(2, B)
    assert run.kinds == [DropStale], "it awaits the answer of the Hub"
    run.resolved(3, B)
    assert run.kinds == [DropStale]
    run.resolved(2, B)
    run.resolved(2, B)
    assert run.kinds == [DropStale], "it awaits its files"
    run.do(Promoted(Generation(2), run.now, True))
    assert (run.kinds, run.state) == ([DropStale], H)


def leave(run: Run, ticket: Ticket) -> None:
    run.withdraw(ticket)


def cancel(run: Run, ticket: Ticket) -> None:
    run.cancel(generation=run.generations[ticket])


def time_out(run: Run, ticket: Ticket) -> None:
    run.fire("deadline", run.generations[ticket])


def fail(run: Run, ticket: Ticket) -> None:
    run.fetch_failed(run.generations[ticket])


def unload(run: Run, ticket: Ticket) -> None:
    run.unload(B)


ENDS = [leave, cancel, time_out, fail, unload]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_load_behind_an_awaiting_load_is_due_when_that_ends(
    end: Callable[[Run, Ticket], None],
) -> None:
    run = healthy()
    first = run.load(B, prefetch=True, deadline_s=1)
    behind = run.load(C, on_busy="queue")
    assert (run.state, len(run.ctx.queue)) == (H, 2)
    end(run, first)
    assert [g for g, _ in run.concluded()] == [2]
    assert run.tokens() == [2], "its look-up or download is cancelled"
    run.promote()
    assert run.state is K
    assert run.settle().category(behind) == "loaded"


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_lease_in_idle_waits_while_a_load_awaits_its_model(
    end: Callable[[Run, Ticket], None],
) -> None:
    run = Run()
    load = run.load(B, prefetch=True, deadline_s=1)
    lease = run.lease()
    assert (run.state, lease in run.answers) == (I, False)
    end(run, load)
    run.settle()
    assert run.problem(lease).category == "not_loaded"
    assert run.state is I


def test_load_that_becomes_due_in_idle_begins() -> None:
    run = Run()
    load, lease = run.load(B), run.lease()
    run.resolved(1, B)
    run.promote()
    assert run.state is K
    run.settle()
    assert run.category(load) == "loaded"
    assert isinstance(run.answers[lease], LeaseGranted)


def test_load_that_becomes_due_during_an_unload_follows_it() -> None:
    run = healthy()
    unloading = run.unload()
    load = run.load(B)
    run.do(Promoted(Generation(2), run.now, True))
    assert (run.kinds, run.state) == ([DropStale], K), "it is not due yet"
    run.resolved(2, B)
    run.promote()
    assert run.ctx.job is not None
    run.emptied()
    assert (run.state, unloading in run.answers) == (D, True)
    assert run.settle().category(load) == "loaded"


def test_unload_of_an_awaiting_load_in_idle_starts_the_load_behind_it() -> None:
    run = Run()
    first, behind = run.load(B, prefetch=True), run.load(C, on_busy="queue")
    unloading = run.unload(B)
    assert (run.state, run.tokens()) == (K, [1])
    run.settle()
    assert run.problem(first).category == "cancelled"
    assert run.category(behind) == "loaded"
    assert unloading in run.answers


def test_already_loaded_call_supersedes_older_queued_loads_only() -> None:
    """It was called between two queued loads and arrives last."""
    run = healthy()
    older, middle = run.load(B, prefetch=True), run.ticket()
    newer = run.load(C, on_busy="queue")
    run.load(A, ticket=middle)
    assert run.category(middle) == "already"
    assert run.problem(older).category == "superseded"
    run.promote()
    assert run.settle().category(newer) == "loaded"


def test_newer_load_supersedes_an_awaiting_load_at_once() -> None:
    """B69."""
    run = healthy()
    older = run.load(B, prefetch=True)
    early = run.ticket()
    newer = run.load(E)
    assert (run.problem(older).category, run.tokens()) == ("superseded", [2])
    assert run.concluded() == [(2, "superseded")]
    run.load(C, ticket=early)
    assert run.problem(early).category == "superseded"
    run.resolved(3, E)
    run.promote()
    assert run.settle().category(newer) == "loaded"


def test_load_that_resolves_to_the_running_model_is_already_loaded() -> None:
    run = Run()
    run.load(B)
    run.resolved(1, B).promote().settle()
    first = run.ctx.running
    load = run.load(B, gguf_variant="v")
    assert run.category(load) == "already"
    other, request = run.ticket(), LoadRequest(model_path=B, revision="main")
    branch = ModelFiles((), None, None, HubModel(B, "main", is_settled=False))
    wanted = replace(target(request), model=branch)
    run.load_target(wanted, other)
    assert run.state is H
    assert run.ctx.queue, "only the Hub knows whether that is another commit"
    run.resolved(2, B)
    run.promote()
    assert (run.category(other), run.state, run.ctx.running) == ("already", H, first)
    assert run.concluded() == [(2, "loaded")]


def test_server_may_become_idle_during_a_prefetching_load() -> None:
    run = Run(Policy(idle_ttl_s=5))
    run.load(A)
    run.settle()
    load = run.load(B, prefetch=True)
    run.now = 6
    run.fire("idle", 1)
    assert run.state is K
    run.emptied()
    assert (run.state, load in run.answers) == (I, False)
    run.resolved(2, B)
    run.fetched_beside(2, B)
    run.promote()
    assert run.settle().category(load) == "loaded"


def test_crash_during_a_prefetching_load_is_followed_by_a_restart() -> None:
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.settle()
    load = run.load(B, prefetch=True)
    run.exited()
    assert (run.state, run.recovery) == (K, ("waiting", 1))
    run.emptied()
    run.fire("restart", 1)
    run.settle()
    assert run.model == A
    assert load not in run.answers
    run.resolved(2, B)
    run.fetched_beside(2, B)
    run.promote()
    assert run.settle().category(load) == "loaded"


def test_failed_restart_is_repeated_while_a_load_awaits_its_model() -> None:
    run = Run(Policy(restart=replace(RULES, limit=2)))
    run.load(A)
    run.settle()
    run.load(B, prefetch=True)
    run.exited()
    run.emptied()
    run.fire("restart", 1)
    run.go(W).fail()
    run.emptied()
    assert run.recovery == ("waiting", 2)


def test_previous_model_is_restored_before_an_awaiting_load() -> None:
    run = healthy()
    load = run.load(C, restore_previous=True)
    waiting = run.load(B, prefetch=True, on_busy="queue")
    run.go(W).fail()
    run.settle()
    assert run.problem(load).restored is not None
    assert run.model == A
    assert waiting not in run.answers


def test_cooling_down_hub_model_is_not_resolved_again() -> None:
    run = Run(Policy(restart=RULES))
    run.load(B)
    run.resolved(1, B)
    run.promote()
    run.settle()
    for generation, pid in ((1, 41), (2, 42)):
        run.exited(pid, -9, generation).emptied()
        if run.recovery == ("waiting", 1):
            run.fire("restart", generation)
            run.settle()
    assert run.recovery == ("cooling_down", 2)
    again = run.load(B)
    assert run.problem(again).reason == "cooling_down"
    assert run.begun_beside() == []


# ------------------------------------------------------------------------------------------- limits


def test_full_queue_is_answered_busy() -> None:
    run = Run(FULL)
    run.load(A)
    kept = run.load(C, on_busy="queue")
    refused = run.load("X", on_busy="queue")
    assert (run.problem(refused).category, run.problem(refused).field) == ("busy", "on_busy")
    assert_sentence("machine.queue_full", run.problem(refused).message, limit=1)
    joined = run.load(C, on_busy="queue")
    rejected = run.load("X", on_busy="reject")
    assert run.problem(rejected).generation == 2
    run.settle()
    assert (run.category(kept), run.category(joined)) == ("loaded", "loaded")


def test_prefetch_limit_is_answered_busy() -> None:
    run = Run(Policy(max_prefetches=1))
    first = run.load(B, prefetch=True)
    refused = run.load(E, prefetch=True, on_busy="queue")
    assert (run.problem(refused).category, run.problem(refused).field) == ("busy", "prefetch")
    assert_sentence("machine.prefetches_full", run.problem(refused).message, limit=1)
    assert run.state is I
    beside = run.prefetch(E)
    assert run.problem(beside).category == "busy"
    rejected = run.load(E, prefetch=True, on_busy="reject")
    assert run.problem(rejected).generation == 1
    newer = run.load(E, prefetch=True)
    assert run.problem(first).category == "superseded", "the superseded load does not count"
    run.resolved(2, E)
    run.fetched_beside(2, E)
    run.promote()
    assert run.settle().category(newer) == "loaded"


def test_prefetches_and_prefetching_loads_are_counted_together() -> None:
    run = Run(Policy(max_prefetches=2))
    run.load(B, prefetch=True)
    run.prefetch(E)
    assert run.problem(run.prefetch("o/F")).field == "prefetch"


def test_load_that_awaits_the_hub_only_does_not_count_as_prefetch() -> None:
    """Nor does one whose files have arrived."""
    run = Run(Policy(max_prefetches=1))
    run.load(B)
    assert run.prefetch(E) not in run.answers
    run = Run(Policy(max_prefetches=1))
    run.load(A)
    run.load(B, prefetch=True, on_busy="queue")
    run.resolved(2, B)
    run.fetched_beside(2, B)
    assert run.prefetch(E) not in run.answers


@pytest.mark.parametrize(
    ("is_on_disk", "is_settled", "is_refused"),
    [(True, True, False), (True, False, True), (False, True, True), (False, False, True)],
)
def test_load_counts_as_prefetch_unless_it_is_settled_and_on_disk(
    is_on_disk: bool, is_settled: bool, is_refused: bool
) -> None:
    run = Run(FULL)
    run.prefetch(E)
    weights = files(B).weights if is_on_disk else ()
    model = ModelFiles(weights, None, "V", HubModel(B, "c" * 40, is_settled=is_settled))
    wanted = replace(target(LoadRequest(model_path=B, prefetch=True)), model=model)
    load = run.load_target(wanted, run.ticket())
    assert run.category(load) == ("busy" if is_refused else None)


def test_refused_loads_leave_the_server_that_runs() -> None:
    run = healthy(policy=FULL)
    older = run.ticket()
    run.prefetch(B)
    run.unload(C)
    refused = [run.load(C, ticket=older), run.load(E, prefetch=True)]
    assert [run.category(ticket) for ticket in refused] == ["cancelled", "busy"]
    assert (run.state, run.model) == (H, A)


def test_load_without_a_download_does_not_count_as_prefetch() -> None:
    run = Run(FULL)
    run.prefetch(B)
    load = run.load(A, prefetch=True)
    assert run.settle().category(load) == "loaded"


# --------------------------------------------------------------------------------------- prefetches


def test_prefetch_has_a_negative_generation_and_changes_no_state() -> None:
    run = healthy()
    call = run.prefetch(B)
    assert (run.state, run.begun_beside(), run.ctx.generation) == (H, [("Download", -1)], 1)
    assert run.commands_of(Download) == [
        Download(Generation(-1), target(LoadRequest(model_path=B)))
    ]
    assert [job.awaits for job in run.ctx.prefetches] == ["files"]
    run.fetched_beside(-1, B)
    assert run.answers[call] == Prefetched(files(B))
    assert (run.state, run.ctx.prefetches) == (H, ())
    run.fetched_beside(-1, B)
    assert run.kinds == [DropStale]


def test_callers_of_the_same_prefetch_share_one_download() -> None:
    run = Run(FULL)
    first, second, third = run.prefetch(B), run.prefetch(B), run.prefetch(B)
    assert run.begun_beside() == []
    run.withdraw(first)
    assert run.tokens() == []
    run.withdraw(second)
    run.fetched_beside(-1, B)
    assert run.answers == {third: Prefetched(files(B))}


def test_caller_joins_the_prefetch_of_its_model_only() -> None:
    run = Run()
    first, other = run.prefetch(B), run.prefetch(E)
    joined = run.prefetch(B)
    run.fetched_beside(-2, E)
    assert run.answers == {other: Prefetched(files(E))}
    run.fetched_beside(-1, B)
    assert run.answers.keys() == {first, other, joined}


def test_answer_of_the_hub_is_that_of_one_queued_load() -> None:
    run = Run()
    run.load(B), run.load(E, on_busy="queue")
    run.resolved(2, E)
    assert [(job.generation, job.awaits) for job in run.ctx.queue] == [(1, "answer"), (2, None)]
    assert [job.target.model.hub.repo for job in run.ctx.queue if job.target.model.hub] == [B, E]


def test_prefetch_without_callers_is_cancelled() -> None:
    run = Run(Policy(abandoned_load="continue"))
    call = run.prefetch(B)
    run.withdraw(call)
    assert (run.tokens(), run.ctx.prefetches) == ([-1], ())


def test_prefetch_fails_with_the_hub_error_or_the_deadline() -> None:
    run = Run()
    call = run.prefetch(B)
    run.fetch_failed(-1)
    assert (run.problem(call).category, run.ctx.prefetches) == ("hub_unreachable", ())
    late = run.prefetch(B, deadline_s=1)
    run.fire("deadline", -2)
    assert (run.problem(late).category, run.tokens()) == ("deadline", [-2])
    assert_sentence("machine.prefetch_deadline", run.problem(late).message, deadline_s="1.0")
    assert run.problem(late).generation is None
    run.fire("deadline", -2)
    assert run.kinds == [DropStale]


def test_cancel_by_id_reaches_a_prefetch_early_or_late() -> None:
    run = healthy()
    run.cancel("early")
    call = run.prefetch(B, load_request_id="early")
    assert (run.problem(call).category, run.begun_beside(), run.state) == ("cancelled", [], H)
    other = run.prefetch(B, load_request_id="x")
    kept = run.prefetch(B, load_request_id="y")
    assert run.state is H
    again = run.prefetch(B, load_request_id="early")
    assert run.problem(again).category == "cancelled"
    run.cancel("x")
    assert (run.problem(other).category, run.tokens()) == ("cancelled", [])
    run.cancel("y")
    assert (run.problem(kept).category, run.tokens()) == ("cancelled", [-1])
    late = run.cancel("y")
    load = run.load(A, load_request_id="y")
    assert late in run.answers
    assert run.category(load) == "already", "a late cancel is not an early one"


def test_shutdown_ends_prefetches_and_an_unload_does_not() -> None:
    run = healthy()
    call = run.prefetch(B)
    run.unload()
    run.settle()
    assert call not in run.answers
    run.cancel("early")
    run.shutdown()
    assert (run.problem(call).category, run.tokens()) == ("shutting_down", [-1])
    for state in (K, I):
        refused = run.prefetch(B, load_request_id="early")
        assert (run.problem(refused).category, run.state) == ("shutting_down", state)
        run.settle()


# ------------------------------------------------------------ each load and server concluded once


def test_failed_load_is_concluded_when_its_callers_are_answered() -> None:
    run, _ = in_flight(W)
    run.fail()
    assert (run.state, run.concluded()) == (K, [])
    assert [c.generation for c in run.ctx.ending] == [1]
    run.emptied()
    assert run.concluded() == [(1, "server_start_failed")]


def test_load_without_callers_is_concluded_too() -> None:
    run, ticket = in_flight(W)
    queued = run.load(C, on_busy="queue")
    run.withdraw(queued)
    assert run.concluded() == [(2, "cancelled")]
    run.withdraw(ticket)
    run.fail()
    run.emptied()
    assert run.concluded() == [(1, "cancelled")]


def test_failed_load_is_concluded_with_the_one_that_restores() -> None:
    run = healthy()
    load = run.load(C, restore_previous=True)
    run.go(W)
    run.now = 3.0
    run.fail()
    run.emptied()
    assert run.concluded() == []
    run.go(H)
    assert run.concluded() == [(3, "loaded"), (2, "server_start_failed")]
    (again,) = (c for c in run.commands_of(Concluded) if c.generation == 2)
    assert again.timings.health == 3.0
    assert again.answer == run.problem(load)


@pytest.mark.parametrize(("returncode", "how"), [(7, "exit"), (-9, "signal"), (None, "unknown")])
def test_exit_of_a_server_is_reported_once(returncode: int | None, how: str) -> None:
    run = healthy()
    run.exited(41, returncode)
    assert run.ended() == [(41, how)]
    run.exited(41, returncode)
    assert run.ended() == []
    run.emptied()
    assert run.ended() == []


def test_stop_of_a_server_is_reported_when_the_slot_is_empty() -> None:
    run = healthy()
    run.unload()
    run.exited(41, -15)
    assert run.ended() == []
    run.emptied()
    assert run.ended() == [(41, "stopped")]


DEAD = NotReady(Generation(1), 0.0, Problem("server_start_failed", "it failed"))
STALLED = NotReady(Generation(1), 0.0, Problem("stalled", "it failed"))
NOT_ALIVE = BecameReady(Generation(1), 0.0, SERVER, False)


@pytest.mark.parametrize(
    ("seen", "how"), [(DEAD, "exit"), (NOT_ALIVE, "exit"), (STALLED, "stopped")]
)
def test_server_found_dead_by_the_probe_is_reported_once(seen: Fact, how: str) -> None:
    """A stalled server is stopped by us; a dead one has ended by itself."""
    exited = Exited(Generation(1), 0.0, Exit(41, 1))
    run, _ = in_flight(W)
    run.do(seen)
    run.exited(40, 1)
    assert run.kinds == [DropStale], "another pid"
    run.do(exited)
    assert run.ended() == ([(41, "exit")] if how == "exit" else [])
    assert run.ctx.last_exit == Exit(41, 1)
    run.emptied()
    assert run.ended() == ([] if how == "exit" else [(41, "stopped")])
    run, _ = in_flight(W)
    run.do(seen)
    run.do(Emptied(run.effect, run.now, Exit(41, 1)))
    assert run.ended() == [(41, how)], "the kill notices the exit"
    run, _ = in_flight(W)
    run.do(exited)
    assert run.ended() == [(41, "exit")]
    run.do(seen)
    run.emptied()
    assert run.ended() == []


def test_exit_of_an_unkillable_server_is_reported() -> None:
    run = healthy()
    run.unload()
    run.kill_failed()
    run.exited()
    assert (run.state, run.ended()) == (K, [(41, "signal")])
