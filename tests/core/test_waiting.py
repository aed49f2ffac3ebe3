"""Loads that wait in the queue for the Hub or for their files, prefetches, and how things end.

What runs goes on running until a load that may have its turn is due; whatever ends is said to have
ended once.
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
    Loaded,
    Post,
    Prefetched,
    Resolve,
    ServerEnded,
    SetToken,
)
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import (
    BecameReady,
    Emptied,
    Exit,
    Exited,
    Fact,
    Fetched,
    FetchFailed,
    LoadRequested,
    NotReady,
    PrefetchRequested,
    Promoted,
    Resolved,
    TimerFired,
)
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.machine.states import State
from orchestrator.settings.files import HubModel, ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.core.test_machine import A, C, D, H, I, K, Run, W, healthy, in_flight
from tests.kit.machine.world import files, resolved, target

B, E = "o/B", "o/E"
FULL = Policy(max_waiting=1, max_prefetches=1)
AWAY = Problem("hub_unreachable", "the hub is away")
RULES = RestartPolicy(backoff_s=4, backoff_max_s=60, limit=1, cool_down_s=100, stable_after_s=60)


def answered(run: Run, generation: int, model: str = B) -> Run:
    """The Hub has said what a model is."""
    return run.do(Resolved(Generation(generation), run.now, resolved(model)))


def arrived(run: Run, generation: int, model: str = B) -> Run:
    """The files of a model are there."""
    return run.do(Fetched(Generation(generation), run.now, files(model)))


def failed(run: Run, generation: int) -> Run:
    return run.do(FetchFailed(Generation(generation), run.now, AWAY))


def prefetch(run: Run, model: str, *, ticket: Ticket | None = None, **options: object) -> Ticket:
    ticket = ticket or run.ticket()
    wanted = target(LoadRequest.from_dict({"model_path": model, **options}))
    run.do(PrefetchRequested(ticket, wanted, run.now))
    return ticket


def promoted(run: Run) -> Run:
    """What the machine has posted to itself arrives."""
    (fact,) = [c.fact for c in run.commands if isinstance(c, Post)]
    return run.do(fact)


def told(run: Run, ticket: int) -> Problem:
    answer = run.answers[ticket]
    assert isinstance(answer, Problem)
    return answer


def begun(run: Run) -> list[tuple[str, int]]:
    kinds = Resolve | Download
    return [(type(c).__name__, c.generation) for c in run.commands if isinstance(c, kinds)]


def tokens(run: Run) -> list[int]:
    return [c.generation for c in run.commands if isinstance(c, SetToken)]


def concluded(run: Run) -> list[tuple[int, str]]:
    """What has been said of loads that ended in this step."""
    return [
        (c.generation, "loaded" if isinstance(c.answer, Loaded) else c.answer.category)
        for c in run.commands
        if isinstance(c, Concluded)
    ]


def ended(run: Run) -> list[tuple[int, str]]:
    return [(c.pid, c.how) for c in run.commands if isinstance(c, ServerEnded)]


# ---------------------------------------------------------------------------- what awaits something


def test_a_hub_model_is_asked_for_while_what_runs_serves() -> None:
    run = healthy()
    load = run.load(B)
    assert (run.state, begun(run), run.generations[load]) == (H, [("Resolve", 2)], 2)
    lease = run.lease()
    assert isinstance(run.answers[lease], LeaseGranted)
    answered(run, 2)
    assert run.state is H, "it is promoted by a fact of its own"
    promoted(run)
    assert (run.state, run.ctx.job and run.ctx.job.generation) == (K, 2)
    run.withdraw(lease)
    assert run.settle().category(load) == "loaded"


def test_with_prefetch_the_files_are_fetched_before_anything_is_stopped() -> None:
    run = healthy()
    load = run.load(B, prefetch=True)
    answered(run, 2)
    assert (run.state, begun(run)) == (H, [("Download", 2)])
    assert not [c for c in run.commands if isinstance(c, Post)]
    arrived(run, 2)
    promoted(run)
    assert run.state is K
    assert run.settle().category(load) == "loaded"


def test_a_hub_model_is_asked_for_in_every_state() -> None:
    """A load that only waits for another asks at once what it will need."""
    for state in (K, D, W):
        run, _ = in_flight(state)
        run.load(B, on_busy="queue")
        assert (run.state, begun(run)) == (state, [("Resolve", 2)])
        answered(run, 2)
        assert not [c for c in run.commands if isinstance(c, Post)], "its turn comes by itself"


@pytest.mark.parametrize("prefetch", [False, True])
def test_what_the_hub_refuses_costs_nobody_else_anything(prefetch: bool) -> None:
    """B72."""
    run = healthy()
    load = run.load(B, prefetch=prefetch)
    failed(run, 2)
    assert told(run, load).category == "hub_unreachable"
    assert (run.state, run.ctx.queue, concluded(run)) == (H, (), [(2, "hub_unreachable")])
    assert run.ctx.last_error is not None
    assert run.ctx.last_error.generation == 2
    failed(run, 2)
    assert [type(c) for c in run.commands] == [DropStale], "said twice, and fenced"


def test_an_answer_that_nobody_waits_for_is_fenced() -> None:
    run = healthy()
    run.load(B, prefetch=True)
    arrived(run, 2)
    assert [type(c) for c in run.commands] == [DropStale], "it waits for the Hub's answer"
    answered(run, 3)
    assert [type(c) for c in run.commands] == [DropStale]
    answered(run, 2)
    answered(run, 2)
    assert [type(c) for c in run.commands] == [DropStale], "it waits for its files"
    run.do(Promoted(Generation(2), run.now, True))
    assert ([type(c) for c in run.commands], run.state) == ([DropStale], H)


def leave(run: Run, ticket: Ticket) -> None:
    run.withdraw(ticket)


def cancel(run: Run, ticket: Ticket) -> None:
    run.cancel(generation=run.generations[ticket])


def time_out(run: Run, ticket: Ticket) -> None:
    run.do(TimerFired(Generation(run.generations[ticket]), run.now, "deadline"))


def fail(run: Run, ticket: Ticket) -> None:
    failed(run, run.generations[ticket])


def unload(run: Run, ticket: Ticket) -> None:
    run.unload(B)


ENDS = [leave, cancel, time_out, fail, unload]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_what_stood_behind_a_load_that_awaits_is_due_when_that_ends(
    end: Callable[[Run, Ticket], None],
) -> None:
    run = healthy()
    first = run.load(B, prefetch=True, deadline_s=1)
    behind = run.load(C, on_busy="queue")
    assert (run.state, len(run.ctx.queue)) == (H, 2)
    end(run, first)
    assert [g for g, _ in concluded(run)] == [2]
    assert tokens(run) == [2], "what was begun for it is told to end"
    promoted(run)
    assert run.state is K
    assert run.settle().category(behind) == "loaded"


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_in_idle_a_lease_waits_as_long_as_a_load_awaits_its_model(
    end: Callable[[Run, Ticket], None],
) -> None:
    run = Run()
    load = run.load(B, prefetch=True, deadline_s=1)
    lease = run.lease()
    assert (run.state, lease in run.answers) == (I, False)
    end(run, load)
    run.settle()
    assert told(run, lease).category == "not_loaded"
    assert run.state is I


def test_in_idle_a_load_that_is_due_begins() -> None:
    run = Run()
    load, lease = run.load(B), run.lease()
    answered(run, 1)
    promoted(run)
    assert run.state is K
    run.settle()
    assert run.category(load) == "loaded"
    assert isinstance(run.answers[lease], LeaseGranted)


def test_a_load_that_becomes_due_during_an_unload_follows_it() -> None:
    run = healthy()
    unloading = run.unload()
    load = run.load(B)
    run.do(Promoted(Generation(2), run.now, True))
    assert ([type(c) for c in run.commands], run.state) == ([DropStale], K), "it is not due yet"
    answered(run, 2)
    promoted(run)
    assert run.ctx.job is not None
    run.emptied()
    assert (run.state, unloading in run.answers) == (D, True)
    assert run.settle().category(load) == "loaded"


def test_an_unload_of_what_waits_in_idle_takes_what_is_behind_it() -> None:
    run = Run()
    first, behind = run.load(B, prefetch=True), run.load(C, on_busy="queue")
    unloading = run.unload(B)
    assert (run.state, tokens(run)) == (K, [1])
    run.settle()
    assert told(run, first).category == "cancelled"
    assert run.category(behind) == "loaded"
    assert unloading in run.answers


def test_a_load_that_finds_its_model_running_lets_go_on_what_came_after_it() -> None:
    """It was asked for between the two that wait, and is looked up last."""
    run = healthy()
    older, middle = run.load(B, prefetch=True), run.ticket()
    newer = run.load(C, on_busy="queue")
    run.load(A, ticket=middle)
    assert run.category(middle) == "already"
    assert told(run, older).category == "superseded"
    promoted(run)
    assert run.settle().category(newer) == "loaded"


def test_a_newer_load_supersedes_one_that_awaits_at_once() -> None:
    """B69: and an older one never ends a newer one."""
    run = healthy()
    older = run.load(B, prefetch=True)
    early = run.ticket()
    newer = run.load(E)
    assert (told(run, older).category, tokens(run)) == ("superseded", [2])
    assert concluded(run) == [(2, "superseded")]
    run.load(C, ticket=early)
    assert told(run, early).category == "superseded"
    answered(run, 3, E)
    promoted(run)
    assert run.settle().category(newer) == "loaded"


def test_a_load_that_turns_out_to_be_what_runs_is_answered_so() -> None:
    run = Run()
    run.load(B)
    promoted(answered(run, 1)).settle()
    first = run.ctx.running
    load = run.load(B, gguf_variant="v")
    assert run.category(load) == "already"
    other, request = run.ticket(), LoadRequest(model_path=B, revision="main")
    branch = ModelFiles((), None, None, HubModel(B, "main", is_settled=False))
    wanted = replace(target(request), model=branch)
    run.do(LoadRequested(other, wanted, run.now, True))
    assert run.state is H
    assert run.ctx.queue, "only the Hub knows whether that is another commit"
    answered(run, 2)
    promoted(run)
    assert (run.category(other), run.state, run.ctx.running) == ("already", H, first)
    assert concluded(run) == [(2, "loaded")]


def test_what_runs_may_become_idle_while_the_next_one_is_fetched() -> None:
    run = Run(Policy(idle_ttl_s=5))
    run.load(A)
    run.settle()
    load = run.load(B, prefetch=True)
    run.now = 6
    run.do(TimerFired(Generation(1), run.now, "idle"))
    assert run.state is K
    run.emptied()
    assert (run.state, load in run.answers) == (I, False)
    answered(run, 2)
    arrived(run, 2)
    promoted(run)
    assert run.settle().category(load) == "loaded"


def test_a_crash_while_the_next_one_is_fetched_is_answered_by_a_restart() -> None:
    run = Run(Policy(restart=RULES))
    run.load(A)
    run.settle()
    load = run.load(B, prefetch=True)
    run.do(Exited(Generation(1), run.now, Exit(41, -9)))
    assert (run.state, run.ctx.recovery and run.ctx.recovery.phase) == (K, "waiting")
    run.emptied()
    run.do(TimerFired(Generation(1), run.now, "restart"))
    run.settle()
    assert run.ctx.running is not None
    assert run.ctx.running.target.request.model_path == A
    assert load not in run.answers
    answered(run, 2)
    arrived(run, 2)
    promoted(run)
    assert run.settle().category(load) == "loaded"


def test_a_restart_that_fails_is_tried_again_though_a_load_awaits_its_model() -> None:
    run = Run(Policy(restart=replace(RULES, limit=2)))
    run.load(A)
    run.settle()
    run.load(B, prefetch=True)
    run.do(Exited(Generation(1), run.now, Exit(41, -9)))
    run.emptied()
    run.do(TimerFired(Generation(1), run.now, "restart"))
    run.go(W)
    run.fail()
    run.emptied()
    assert run.ctx.recovery is not None
    assert (run.ctx.recovery.phase, run.ctx.recovery.failures) == ("waiting", 2)


def test_what_ran_comes_back_before_what_awaits_its_model() -> None:
    run = healthy()
    load = run.load(C, restore_previous=True)
    waiting = run.load(B, prefetch=True, on_busy="queue")
    run.go(W)
    run.fail()
    run.settle()
    assert told(run, load).restored is not None
    assert run.ctx.running is not None
    assert run.ctx.running.target.request.model_path == A
    assert waiting not in run.answers


def test_what_failed_too_often_is_not_asked_for_again_either() -> None:
    run = Run(Policy(restart=RULES))
    run.load(B)
    answered(run, 1)
    promoted(run)
    run.settle()
    for generation, pid in ((1, 41), (2, 42)):
        run.do(Exited(Generation(generation), run.now, Exit(pid, -9)))
        run.emptied()
        if run.ctx.recovery and run.ctx.recovery.phase == "waiting":
            run.do(TimerFired(Generation(generation), run.now, "restart"))
            run.settle()
    assert run.ctx.recovery is not None
    assert run.ctx.recovery.phase == "cooling_down"
    again = run.load(B)
    assert told(run, again).reason == "cooling_down"
    assert begun(run) == []


# ----------------------------------------------------------------------------------------- bounds


def test_a_queue_that_is_full_says_busy() -> None:
    run = Run(FULL)
    run.load(A)
    kept = run.load(C, on_busy="queue")
    refused = run.load("X", on_busy="queue")
    assert (told(run, refused).category, told(run, refused).field) == ("busy", "on_busy")
    assert told(run, refused).message == "1 loads wait already: try again later"
    joined = run.load(C, on_busy="queue")
    rejected = run.load("X", on_busy="reject")
    assert "is in flight" in told(run, rejected).message
    run.settle()
    assert (run.category(kept), run.category(joined)) == ("loaded", "loaded")


def test_as_many_models_are_fetched_as_may_be() -> None:
    run = Run(Policy(max_prefetches=1))
    first = run.load(B, prefetch=True)
    refused = run.load(E, prefetch=True, on_busy="queue")
    assert (told(run, refused).category, told(run, refused).field) == ("busy", "prefetch")
    assert told(run, refused).message == "1 models are being fetched already: try again later"
    beside = prefetch(run, E)
    assert told(run, beside).category == "busy"
    rejected = run.load(E, prefetch=True, on_busy="reject")
    assert "is in flight" in told(run, rejected).message
    newer = run.load(E, prefetch=True)
    assert told(run, first).category == "superseded", "what it supersedes makes room"
    answered(run, 2, E)
    arrived(run, 2, E)
    promoted(run)
    assert run.settle().category(newer) == "loaded"


def test_a_load_that_needs_no_download_is_no_prefetch() -> None:
    run = Run(FULL)
    prefetch(run, B)
    load = run.load(A, prefetch=True)
    assert run.settle().category(load) == "loaded"


# -------------------------------------------------------------------------------------- prefetches


def test_a_prefetch_has_no_generation_of_a_load_and_changes_no_state() -> None:
    run = healthy()
    call = prefetch(run, B)
    assert (run.state, begun(run), run.ctx.generation) == (H, [("Download", -1)], 1)
    arrived(run, -1)
    assert run.answers[call] == Prefetched(files(B))
    assert (run.state, run.ctx.prefetches) == (H, ())
    arrived(run, -1)
    assert [type(c) for c in run.commands] == [DropStale]


def test_callers_of_the_same_prefetch_share_it_and_leave_one_by_one() -> None:
    run = Run(FULL)
    first, second, third = prefetch(run, B), prefetch(run, B), prefetch(run, B)
    assert begun(run) == []
    run.withdraw(first)
    assert tokens(run) == []
    run.withdraw(second)
    arrived(run, -1)
    assert run.answers == {third: Prefetched(files(B))}


def test_a_prefetch_nobody_waits_for_is_ended() -> None:
    run = Run(Policy(abandoned_load="continue"))
    call = prefetch(run, B)
    run.withdraw(call)
    assert (tokens(run), run.ctx.prefetches) == ([-1], ())


def test_a_prefetch_that_fails_or_takes_too_long_says_so() -> None:
    run = Run()
    call = prefetch(run, B)
    failed(run, -1)
    assert (told(run, call).category, run.ctx.prefetches) == ("hub_unreachable", ())
    late = prefetch(run, B, deadline_s=1)
    run.do(TimerFired(Generation(-2), run.now, "deadline"))
    assert (told(run, late).category, tokens(run)) == ("deadline", [-2])
    assert told(run, late).message == "not on disk within deadline_s = 1.0"
    assert told(run, late).generation is None
    run.do(TimerFired(Generation(-2), run.now, "deadline"))
    assert [type(c) for c in run.commands] == [DropStale]


def test_a_cancel_reaches_a_prefetch_by_its_id_also_when_it_comes_first() -> None:
    run = healthy()
    run.cancel("early")
    call = prefetch(run, B, load_request_id="early")
    assert (told(run, call).category, begun(run), run.state) == ("cancelled", [], H)
    other = prefetch(run, B, load_request_id="x")
    kept = prefetch(run, B, load_request_id="y")
    assert run.state is H
    again = prefetch(run, B, load_request_id="early")
    assert told(run, again).category == "cancelled"
    run.cancel("x")
    assert (told(run, other).category, tokens(run)) == ("cancelled", [])
    run.cancel("y")
    assert (told(run, kept).category, tokens(run)) == ("cancelled", [-1])
    late = run.cancel("y")
    load = run.load(A, load_request_id="y")
    assert late in run.answers
    assert run.category(load) == "already", "a late cancel is no early one"


def test_an_unload_leaves_prefetches_alone_and_a_shutdown_does_not() -> None:
    run = healthy()
    call = prefetch(run, B)
    run.unload()
    run.settle()
    assert call not in run.answers
    run.cancel("early")
    run.shutdown()
    assert (told(run, call).category, tokens(run)) == ("shutting_down", [-1])
    for state in (K, I):
        refused = prefetch(run, B, load_request_id="early")
        assert (told(run, refused).category, run.state) == ("shutting_down", state)
        run.settle()


# ------------------------------------------------------------------------ said once, in the end


def test_a_load_is_concluded_when_its_callers_hear_of_it() -> None:
    run, _ = in_flight(W)
    run.fail()
    assert (run.state, concluded(run)) == (K, [])
    assert [c.generation for c in run.ctx.ending] == [1]
    run.emptied()
    assert concluded(run) == [(1, "server_start_failed")]


def test_a_load_whose_callers_have_left_is_concluded_all_the_same() -> None:
    run, ticket = in_flight(W)
    queued = run.load(C, on_busy="queue")
    run.withdraw(queued)
    assert concluded(run) == [(2, "cancelled")]
    run.withdraw(ticket)
    run.fail()
    run.emptied()
    assert concluded(run) == [(1, "cancelled")]


def test_a_load_that_was_made_good_is_concluded_with_what_came_back() -> None:
    run = healthy()
    load = run.load(C, restore_previous=True)
    run.go(W)
    run.now = 3.0
    run.fail()
    run.emptied()
    assert concluded(run) == []
    run.go(H)
    assert concluded(run) == [(3, "loaded"), (2, "server_start_failed")]
    (again,) = [c for c in run.commands if isinstance(c, Concluded) and c.generation == 2]
    assert again.timings.health == 3.0
    assert again.answer == told(run, load)


@pytest.mark.parametrize(("returncode", "how"), [(7, "exit"), (-9, "signal"), (None, "unknown")])
def test_a_server_that_ends_by_itself_is_said_to_have_ended_once(
    returncode: int | None, how: str
) -> None:
    run = healthy()
    run.do(Exited(Generation(1), run.now, Exit(41, returncode)))
    assert ended(run) == [(41, how)]
    run.do(Exited(Generation(1), run.now, Exit(41, returncode)))
    assert ended(run) == []
    run.emptied()
    assert ended(run) == []


def test_a_server_that_is_stopped_is_said_to_be_when_the_slot_is_empty() -> None:
    run = healthy()
    run.unload()
    run.do(Exited(Generation(1), run.now, Exit(41, -15)))
    assert ended(run) == []
    run.emptied()
    assert ended(run) == [(41, "stopped")]


DEAD = NotReady(Generation(1), 0.0, Problem("server_start_failed", "it failed"))
STALLED = NotReady(Generation(1), 0.0, Problem("stalled", "it failed"))
NOT_ALIVE = BecameReady(Generation(1), 0.0, in_flight(W)[0].ready().ctx.running.server, False)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("seen", "how"), [(DEAD, "exit"), (NOT_ALIVE, "exit"), (STALLED, "stopped")]
)
def test_whoever_waits_for_its_health_may_find_it_dead_before_its_exit_is_noticed(
    seen: Fact, how: str
) -> None:
    """A stall is ended by us."""
    exited = Exited(Generation(1), 0.0, Exit(41, 1))
    run, _ = in_flight(W)
    run.do(seen)
    run.do(Exited(Generation(1), 0.0, Exit(40, 1)))
    assert [type(c) for c in run.commands] == [DropStale], "not its child"
    run.do(exited)
    assert ended(run) == ([(41, "exit")] if how == "exit" else [])
    assert run.ctx.last_exit == Exit(41, 1)
    run.emptied()
    assert ended(run) == ([] if how == "exit" else [(41, "stopped")])
    run, _ = in_flight(W)
    run.do(seen)
    run.do(Emptied(run.effect, run.now, Exit(41, 1)))
    assert ended(run) == [(41, how)], "its exit is noticed by whoever reaps it"
    run, _ = in_flight(W)
    run.do(exited)
    assert ended(run) == [(41, "exit")]
    run.do(seen)
    run.emptied()
    assert ended(run) == []


def test_a_process_that_kept_the_slot_occupied_may_end_at_last() -> None:
    run = healthy()
    run.unload()
    run.kill_failed()
    run.do(Exited(Generation(1), run.now, Exit(41, -9)))
    assert (run.state, ended(run)) == (K, [(41, "signal")])
    assert State(run.state) is K
