"""Concurrent calls, sentence by sentence, on the machine alone: what each fact answers and begins.

The checker proves that no order breaks an invariant; these tests say what the answers are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import pytest

from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.actions.working import MAX_REMEMBERED_IDS
from orchestrator.machine.commands import (
    Accept,
    Answer,
    CancelAnswer,
    Command,
    Done,
    Download,
    DropStale,
    Kill,
    LeaseGranted,
    Loaded,
    Post,
    Probe,
    SetTimer,
    Settle,
    SetToken,
    Spawn,
    Unloaded,
)
from orchestrator.machine.context import Context, Policy
from orchestrator.machine.facts import (
    BecameReady,
    CancelRequested,
    Child,
    Emptied,
    Exit,
    Exited,
    Fact,
    Fetched,
    FetchFailed,
    KillFailed,
    LeaseReleased,
    LeaseRequested,
    LoadRequested,
    NotReady,
    Promoted,
    ServerFacts,
    ShutdownRequested,
    SlotEvidence,
    Spawned,
    SpawnFailed,
    TimerFired,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.machine.guards import EARLY_CANCEL_S, MAX_VERIFICATIONS
from orchestrator.machine.states import State
from orchestrator.machine.step import step
from orchestrator.settings.files import HubModel
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ReloadReason
from tests.kit.machine.world import files, target

I, K, D, S, W, H = State  # noqa: E741 (the table's own letters)
A, B, C = "A", "B", "C"
FREE = SlotEvidence(is_empty=True)
HELD = SlotEvidence(is_empty=False, reason="the slot's lock is held")
BUSY_STATES = [K, D, S, W]
SERVER = ServerFacts("http://127.0.0.1:36017")


def _check_sentence(answer: object) -> None:
    """Whoever hears of a failure, or reads the status, hears a sentence."""
    if isinstance(answer, Problem):
        assert answer.message
        assert "None" not in answer.message


class Run:
    """A machine, its callers' answers, and what it was asked to carry out."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.state = State.IDLE
        self.ctx = Context(policy or Policy())
        self.now = 0.0
        self.tickets = 0
        self.commands: tuple[Command, ...] = ()
        self.answers: dict[int, Answer] = {}
        self.generations: dict[int, int] = {}

    def do(self, fact: Fact) -> Self:
        self.state, self.ctx, self.commands = step(self.state, self.ctx, fact)
        for command in self.commands:
            if isinstance(command, Settle):
                assert command.ticket not in self.answers, f"call {command.ticket} answered twice"
                self.answers[command.ticket] = command.answer
                _check_sentence(command.answer)
            elif isinstance(command, Accept):
                self.generations[command.ticket] = command.generation
        _check_sentence(self.ctx.last_error)
        return self

    # --------------------------------------------------------------------------------- callers

    def ticket(self) -> Ticket:
        self.tickets += 1
        return Ticket(self.tickets)

    def load(
        self, model: str, *, ticket: Ticket | None = None, alive: bool = True, **options: Any
    ) -> Ticket:
        ticket = ticket or self.ticket()
        wanted = target(LoadRequest.from_dict({"model_path": model, **options}))
        self.do(LoadRequested(ticket, wanted, self.now, alive))
        return ticket

    def unload(self, model: str | None = None) -> Ticket:
        ticket = self.ticket()
        self.do(UnloadRequested(ticket, model, self.now))
        return ticket

    def cancel(self, name: str | None = None, generation: int | None = None) -> Ticket:
        ticket = self.ticket()
        self.do(CancelRequested(ticket, name, generation, self.now))
        return ticket

    def lease(self, *, alive: bool = True) -> Ticket:
        ticket = self.ticket()
        self.do(LeaseRequested(ticket, self.now, alive))
        return ticket

    def shutdown(self) -> Ticket:
        ticket = self.ticket()
        self.do(ShutdownRequested(ticket, self.now))
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        self.do(Withdrawn(ticket, self.now))

    def category(self, ticket: int) -> str | None:
        """`loaded`, `already`, the category of a failure; None while there is no such answer."""
        answer = self.answers.get(ticket)
        if isinstance(answer, Loaded):
            return "already" if answer.already else "loaded"
        return answer.category if isinstance(answer, Problem) else None

    # --------------------------------------------------------------------------------- effects

    @property
    def effect(self) -> Generation:
        assert self.ctx.effect is not None
        return self.ctx.effect.generation

    def emptied(self) -> Self:
        return self.do(Emptied(self.effect, self.now))

    def kill_failed(self) -> Self:
        problem = Problem("slot_occupied", "pid 41 would not die")
        return self.do(KillFailed(self.effect, self.now, problem))

    def fetched(self, slot: SlotEvidence = FREE) -> Self:
        assert self.ctx.job is not None
        return self.do(Fetched(self.effect, self.now, self.ctx.job.target.model, slot))

    def spawned(self) -> Self:
        generation = self.effect
        return self.do(Spawned(generation, self.now, Child(generation, 40 + generation)))

    def ready(self, *, alive: bool = True) -> Self:
        return self.do(BecameReady(self.effect, self.now, SERVER, alive))

    def fail(self) -> Self:
        """The effect in flight ends badly."""
        assert self.ctx.effect is not None
        problem = Problem("server_start_failed", "it failed")
        failed: dict[str, Callable[[Generation, float, Problem], Fact]] = {
            "kill": KillFailed,
            "download": FetchFailed,
            "spawn": SpawnFailed,
            "probe": NotReady,
        }
        return self.do(failed[self.ctx.effect.kind](self.effect, self.now, problem))

    def go(self, state: State) -> Self:
        """Let the load in flight get this far."""
        ends = {K: self.emptied, D: self.fetched, S: self.spawned, W: self.ready}
        for _ in range(40):
            if self.state is state:
                return self
            ends[self.state]()
        raise AssertionError(f"it does not get to {state}")

    def settle(self) -> Self:
        """Let every effect succeed, and what was posted arrive, until the machine rests."""
        for _ in range(40):
            posted = [c.fact for c in self.commands if isinstance(c, Post)]
            if posted:
                self.do(replace(posted[0], child_is_alive=True))
            elif self.ctx.effect is not None:
                {"kill": self.emptied, "download": self.fetched, "spawn": self.spawned}.get(
                    self.ctx.effect.kind, self.ready
                )()
            else:
                return self
        raise AssertionError("it does not come to rest")

    def began(self, kind: type[Kill | Download | Spawn | Probe]) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]


def healthy(model: str = A, **options: Any) -> Run:
    run = Run()
    run.load(model, **options)
    run.go(H)
    return run


def in_flight(state: State, model: str = A, **options: Any) -> tuple[Run, Ticket]:
    run = Run()
    ticket = run.load(model, **options)
    run.go(state)
    assert run.category(ticket) is None
    return run, ticket


# ---------------------------------------------------------------------- a load that goes its way


def test_a_load_walks_through_all_states_and_says_how_long_each_took() -> None:
    """A load passes through Killing even from Idle: the slot is verified before anything starts."""
    run = Run()
    run.now = 100.0
    ticket = run.load(A)
    assert run.state is K
    assert run.began(Kill) == [Kill(Generation(1), None)]
    seen = [run.state]
    for end in (run.emptied, run.fetched, run.spawned, run.ready):
        run.now += 1.0
        end()
        seen.append(run.state)
    assert seen == [K, D, S, W, H]
    answer = run.answers[ticket]
    assert isinstance(answer, Loaded)
    assert (answer.generation, answer.child) == (1, Child(Generation(1), 41))
    assert (answer.already, answer.joined, answer.reload_reasons) == (False, False, ())
    times = answer.timings
    assert (times.kill, times.download, times.spawn, times.health, times.total) == (1, 1, 1, 1, 4)


def test_a_probe_knows_the_child_and_its_stall_clock() -> None:
    """Two clocks: any progress resets the stall clock, which the request sets."""
    run, _ = in_flight(W, stall_timeout_s=7, llama_extra_args=["--seed", "1"])
    child = Child(Generation(1), 41)
    assert run.began(Probe) == [Probe(Generation(1), child, 7.0, 1, ("--seed", "1"))]


def test_what_was_fetched_is_what_is_started_and_what_is_compared_later() -> None:
    """A Hub model is known in full only when it is here: its files, its variant, its flags."""
    run = healthy(llama_extra_args=["--seed", "1"])
    run.load(B)
    run.go(D)
    found = replace(files(B), variant="Q8_0", weights=(*files(B).weights, *files(C).weights))
    run.do(Fetched(run.effect, run.now, found, FREE))
    (spawn,) = run.began(Spawn)
    assert spawn.target.model == found
    run.go(H)
    assert run.ctx.running is not None
    assert run.ctx.running.target == spawn.target
    assert dict(run.ctx.committed_args) == {
        (files(A).name, None, "chat"): ("--seed", "1"),
        (found.name, "Q8_0", "chat"): (),
    }


def test_the_flags_a_hub_model_had_last_time_are_known_when_its_variant_is() -> None:
    """What is not on disk yet inherits nothing; what was found does, before it is started."""
    run = healthy(llama_extra_args=["--seed", "1"])
    run.unload()
    run.settle()
    wanted = target(LoadRequest(model_path=A))
    hub = HubModel(repo="A")
    before = replace(wanted, model=replace(wanted.model, weights=(), hub=hub))
    run.do(LoadRequested(run.ticket(), before, run.now, True))
    run.go(D)
    run.do(Fetched(run.effect, run.now, wanted.model, FREE))
    (spawn,) = run.began(Spawn)
    assert spawn.target.extra_args == ("--seed", "1")


def test_a_source_is_remembered_once_with_its_last_flags() -> None:
    """What is inherited is what became Healthy last, however often that was."""
    run = healthy(llama_extra_args=["--seed", "1"])
    run.load(A, llama_extra_args=["--seed", "2"])
    run.settle()
    assert [args for _, args in run.ctx.committed_args] == [("--seed", "2")]


@pytest.mark.parametrize("state", BUSY_STATES)
def test_a_failure_in_any_phase_ends_in_idle_with_its_reason(state: State) -> None:
    """Failure is not a state: the caller hears why, and the next load works (B49)."""
    run, ticket = in_flight(state)
    run.fail()
    assert run.settle().state is I
    problem = run.answers[ticket]
    assert isinstance(problem, Problem)
    assert problem.generation == 1
    assert run.ctx.last_error is not None
    assert run.ctx.last_error.category == problem.category
    again = run.load(A)
    assert run.settle().category(again) == "loaded"
    assert run.ctx.last_error is None


@pytest.mark.parametrize("state", [S, W])
def test_a_failure_is_told_when_the_slot_is_empty_again(state: State) -> None:
    """Whoever hears of the failure may start something else at once."""
    run, ticket = in_flight(state)
    run.fail()
    assert run.state is K
    assert run.category(ticket) is None
    assert run.emptied().category(ticket) == "server_start_failed"


# ---------------------------------------------------------------- a different target: supersede


@pytest.mark.parametrize("state", BUSY_STATES)
def test_a_different_target_supersedes_at_once_and_proceeds(state: State) -> None:
    """Two quick Applies (B01): the older caller hears `superseded` in the same step."""
    run, older = in_flight(state)
    newer = run.load(B)
    assert run.category(older) == "superseded"
    assert SetToken(Generation(1), CancelReason.SUPERSEDED) in run.commands
    assert not run.began(Spawn)
    assert run.settle().state is H
    assert run.category(newer) == "loaded"
    assert run.generations[newer] == 2
    assert run.ctx.running is not None
    assert run.ctx.running.target.request.model_path == B


def test_the_superseded_servers_child_is_killed_before_the_newer_one_starts() -> None:
    """A cancelled spawn may still hand over a live child (B04)."""
    run, _ = in_flight(S)
    run.load(B)
    run.spawned()
    assert run.state is K
    assert run.began(Kill) == [Kill(Generation(2), Child(Generation(1), 41))]
    assert run.emptied().ctx.child is None
    assert run.began(Download)


def test_a_newer_load_supersedes_those_that_queue_too() -> None:
    """The last Apply wins over everything that is not Healthy yet."""
    run, first = in_flight(D)
    second = run.load(B, on_busy="queue")
    third = run.load(C)
    assert (run.category(first), run.category(second)) == ("superseded", "superseded")
    assert run.settle().category(third) == "loaded"


def test_superseding_a_healthy_model_kills_it_first() -> None:
    """Stop old before start new (B14)."""
    run = healthy()
    newer = run.load(B)
    assert (run.state, run.began(Kill)) == (K, [Kill(Generation(2), Child(Generation(1), 41))])
    answer = run.settle().answers[newer]
    assert isinstance(answer, Loaded)
    assert [reason.field for reason in answer.reload_reasons] == ["model_path"]


def test_an_older_call_that_arrives_later_does_not_supersede() -> None:
    """A slow look-up must not let an older click win, whatever became of the newer one."""
    run = Run()
    older = run.ticket()
    newer = run.load(B)
    run.load(A, ticket=older)
    assert run.category(older) == "superseded"
    assert run.settle().category(newer) == "loaded"


@pytest.mark.parametrize("model", ["A", "B"])
@pytest.mark.parametrize("others", [1, 2])
def test_an_older_call_does_not_give_way_to_callers_that_have_left(model: str, others: int) -> None:
    """Who goes away withdraws only its own interest, also where its load was accepted first."""
    run = Run()
    older = run.ticket()
    gone = [run.load("A") for _ in range(others)]
    for ticket in gone:
        run.withdraw(ticket)
    run.load(model, ticket=older)
    run.go(H)
    assert run.category(older) == "loaded"


def test_an_older_call_gives_way_to_those_that_stay_of_a_load_that_one_has_left() -> None:
    run = Run()
    older = run.ticket()
    stays, leaves = run.load("A"), run.load("A")
    run.withdraw(leaves)
    run.load("B", ticket=older)
    run.go(H)
    assert [run.category(ticket) for ticket in (older, stays)] == ["superseded", "loaded"]


def test_an_older_call_gives_way_to_a_load_that_goes_on_without_callers() -> None:
    run = Run(Policy(abandoned_load="continue"))
    older = run.ticket()
    run.withdraw(run.load("A"))
    run.load("B", ticket=older)
    assert run.category(older) == "superseded"


def test_an_older_call_does_not_win_over_a_newer_one_that_was_already_loaded() -> None:
    """The newer call was answered without a load of its own; it is the newest all the same."""
    run = healthy(A)
    older = run.ticket()
    newer = run.load(A)
    assert run.category(newer) == "already"
    run.load(B, ticket=older)
    assert (run.category(older), run.state) == ("superseded", H)


def test_an_older_call_for_what_runs_is_already_loaded() -> None:
    """It has what it wants: that the newer call wanted the same is no reason to refuse it."""
    run = Run()
    older = run.ticket()
    newer = run.load(A)
    run.settle().load(A, ticket=older)
    assert [run.category(t) for t in (newer, older)] == ["loaded", "already"]


def test_of_several_reasons_to_refuse_a_load_the_end_comes_first() -> None:
    """Who hears `cancelled` may ask again; who hears `shutting_down` need not."""
    run = healthy()
    older = run.ticket()
    run.cancel("x")
    run.unload()
    run.shutdown()
    run.load(B, ticket=older, load_request_id="x")
    assert run.category(older) == "shutting_down"


def test_an_older_call_that_joins_leaves_newer_loads_in_the_queue() -> None:
    """Joining ends the queue only as far as it is older."""
    run = Run()
    older = run.ticket()
    first = run.load(A)
    queued = run.load(B, on_busy="queue")
    run.load(A, ticket=older)
    assert run.category(queued) is None
    run.settle()
    assert [run.category(t) for t in (older, first, queued)] == ["loaded", "loaded", "loaded"]


# -------------------------------------------------------------------------------- queue, reject


def test_the_queue_goes_on_behind_a_load_that_found_its_model_running() -> None:
    """Whoever waits behind it is promoted too, and later loads find a queue as before."""
    run = healthy(A)
    first = run.load(B)
    loads = [run.load(A, on_busy="queue"), run.load(A, on_busy="queue", force_reload=True)]
    loads += [run.load(C, on_busy="queue")]
    run.settle()
    assert [run.category(t) for t in (first, *loads)] == ["loaded"] * 4
    late = run.load(C, on_busy="queue")
    assert run.category(late) == "already"


def test_a_queued_load_that_is_too_late_leaves_the_others_in_the_queue() -> None:
    """A deadline is of one load."""
    run, first = in_flight(D)
    late = run.load(B, on_busy="queue", deadline_s=5)
    other = run.load(C, on_busy="queue")
    run.do(TimerFired(Generation(2), 5.0, "deadline"))
    assert run.category(late) == "deadline"
    assert [job.generation for job in run.ctx.queue] == [3]
    run.settle()
    assert [run.category(t) for t in (first, other)] == ["loaded", "loaded"]


@pytest.mark.parametrize("state", BUSY_STATES)
def test_a_queued_load_comes_strictly_after(state: State) -> None:
    """Both hold, one after the other, and the second says what it replaced."""
    run, first = in_flight(state)
    second = run.load(B, on_busy="queue")
    assert run.state is state
    assert [c for c in run.commands if isinstance(c, SetToken)] == []
    run.go(H)
    assert run.category(first) == "loaded"
    assert run.category(second) is None
    assert Post(Promoted(Generation(2), run.now)) in run.commands
    assert run.settle().category(second) == "loaded"


def test_queued_loads_keep_their_order() -> None:
    """Oldest first."""
    run, _ = in_flight(D)
    second, third = run.load(B, on_busy="queue"), run.load(C, on_busy="queue")
    run.go(H).settle()
    assert list(run.answers) == [1, second, third]


def test_a_queued_load_of_what_runs_by_then_is_already_loaded() -> None:
    """Its turn comes, and nothing needs doing: no second start for the same thing."""
    run, _ = in_flight(W)
    between = run.load(B, on_busy="queue", load_request_id="b")
    queued, joined = run.load(A, on_busy="queue"), run.load(A, on_busy="queue")
    run.cancel("b")
    assert run.category(between) == "cancelled"
    run.settle()
    answers = run.answers[queued], run.answers[joined]
    assert [isinstance(a, Loaded) and (a.already, a.joined) for a in answers] == [
        (True, False),
        (True, True),
    ]
    assert run.state is H


def test_a_reload_that_joins_a_queued_load_is_a_reload() -> None:
    """`force_reload` reloads even when nothing differs, also when it meets one that waits."""
    run, _ = in_flight(W)
    run.load(B, on_busy="queue", load_request_id="b")
    run.load(A, on_busy="queue")
    run.cancel("b")
    forced = run.load(A, on_busy="queue", force_reload=True)
    run.ready()
    assert run.settle().category(forced) == "loaded"
    answer = run.answers[forced]
    assert isinstance(answer, Loaded)
    assert answer.generation > 1
    assert ReloadReason("force_reload", running=False, requested=True) in answer.reload_reasons


def test_a_queued_load_starts_after_the_one_before_it_failed() -> None:
    """The failure of one is no failure of the next."""
    run, first = in_flight(W)
    second = run.load(B, on_busy="queue")
    run.fail()
    assert run.settle().category(second) == "loaded"
    assert run.category(first) == "server_start_failed"


@pytest.mark.parametrize("state", BUSY_STATES)
def test_reject_is_told_busy_and_changes_nothing(state: State) -> None:
    """`busy` names the load that is in the way."""
    run, first = in_flight(state)
    before = run.ctx
    refused = run.load(B, on_busy="reject")
    problem = run.answers[refused]
    assert isinstance(problem, Problem)
    assert (problem.category, problem.field, problem.generation) == ("busy", "on_busy", 1)
    assert (run.state, run.ctx) == (state, before)
    assert run.settle().category(first) == "loaded"


def test_queue_and_reject_just_load_when_nothing_is_in_flight() -> None:
    """`on_busy` is about another load in flight, not about a running model."""
    for on_busy in ("queue", "reject"):
        run = healthy(A)
        ticket = run.load(B, on_busy=on_busy)
        assert run.settle().category(ticket) == "loaded"


# ----------------------------------------------------------------------------------------- join


@pytest.mark.parametrize("state", BUSY_STATES)
def test_the_same_target_joins_and_both_get_the_same_outcome(state: State) -> None:
    """One download, one spawn, one generation, two answers (B36)."""
    run, first = in_flight(state)
    second = run.load(A)
    assert run.commands == (Accept(second, Generation(1), joined=True),)
    assert run.state is state
    run.settle()
    one, two = run.answers[first], run.answers[second]
    assert isinstance(one, Loaded)
    assert isinstance(two, Loaded)
    assert (one.joined, two.joined) == (False, True)
    assert replace(two, joined=False) == one


@pytest.mark.parametrize("state", BUSY_STATES)
def test_those_who_joined_share_the_failure(state: State) -> None:
    """The same outcome, also when it is a bad one."""
    run, first = in_flight(state)
    second = run.load(A)
    run.fail().settle()
    assert run.answers[first] == run.answers[second]
    assert isinstance(run.answers[first], Problem)


@pytest.mark.parametrize("on_busy", ["supersede", "queue", "reject"])
def test_joining_does_not_depend_on_what_to_do_when_busy(on_busy: str) -> None:
    """The load in flight is the one that is wanted: there is nothing in the way."""
    run, _ = in_flight(D)
    run.load(A, on_busy=on_busy)
    assert [type(c) for c in run.commands] == [Accept]


def test_omitted_args_join_a_load_with_args() -> None:
    """B35: a duplicate with omitted args is no difference."""
    run, _ = in_flight(D, llama_extra_args=["--temp", "1"])
    ticket = run.load(A)
    assert run.generations[ticket] == 1
    other = run.load(A, llama_extra_args=[])
    assert run.generations[other] == 2


def test_a_cancelled_load_is_not_joined() -> None:
    """It has ended, though its effect has not: the newcomer gets a load of its own."""
    run, first = in_flight(D)
    run.cancel(generation=1)
    second = run.load(A)
    assert run.generations[second] == 2
    assert run.settle().category(second) == "loaded"
    assert run.category(first) == "cancelled"


def test_the_load_in_flight_is_joined_over_the_head_of_the_queue() -> None:
    """A, then B, then A again in quick succession: B gives way, A goes on."""
    run, first = in_flight(W)
    second = run.load(B, on_busy="queue")
    third = run.load(A)
    assert run.category(second) == "superseded"
    assert run.settle().category(third) == "loaded"
    assert run.category(first) == "loaded"
    assert run.generations[third] == 1


# ------------------------------------------------------------------------------- already loaded


def test_the_same_target_while_healthy_is_already_loaded() -> None:
    """Same pid, no effect, no change of state; answered in this very step."""
    run = healthy()
    ticket = run.load(A)
    assert (run.state, run.category(ticket)) == (H, "already")
    assert run.commands[0] == Accept(ticket, Generation(1), joined=False)
    assert [type(c) for c in run.commands] == [Accept, Settle]
    answer = run.answers[ticket]
    assert isinstance(answer, Loaded)
    assert (answer.child.pid, answer.generation, answer.reload_reasons) == (41, 1, ())


def test_a_dead_child_is_not_already_loaded() -> None:
    """B30: liveness is part of the match, and the reload says why."""
    run = healthy()
    ticket = run.load(A, alive=False)
    assert run.state is K
    answer = run.settle().answers[ticket]
    assert isinstance(answer, Loaded)
    assert not answer.already
    assert answer.reload_reasons == (ReloadReason("server", running="exited", requested="alive"),)


def test_a_forced_reload_reloads_what_runs() -> None:
    """`force_reload` is a reason of its own."""
    run = healthy()
    ticket = run.load(A, force_reload=True)
    assert run.state is K
    answer = run.settle().answers[ticket]
    assert isinstance(answer, Loaded)
    assert [reason.field for reason in answer.reload_reasons] == ["force_reload"]


def test_a_load_that_is_still_warming_up_is_joined_not_already_loaded() -> None:
    """B31: a load short-circuits onto a server that is not ready yet."""
    run, _ = in_flight(W)
    ticket = run.load(A)
    assert run.category(ticket) is None


def test_a_changed_setting_is_not_already_loaded_and_names_itself() -> None:
    """B28."""
    run = healthy(max_seq_length=4096)
    ticket = run.load(A, max_seq_length=0)
    answer = run.settle().answers[ticket]
    assert isinstance(answer, Loaded)
    assert answer.reload_reasons == (ReloadReason("max_seq_length", running=4096, requested=0),)


def test_args_are_committed_only_by_success() -> None:
    """B41: a failed start poisons the next one."""
    run = healthy(llama_extra_args=["--temp", "1"])
    run.load(A, llama_extra_args=["--bogus"])
    run.go(W).fail().settle()
    ticket = run.load(A)
    answer = run.settle().answers[ticket]
    assert isinstance(answer, Loaded)
    assert answer.target.extra_args == ("--temp", "1")


def test_args_survive_an_unload_and_never_reach_another_model() -> None:
    """B37, B40."""
    run = healthy(llama_extra_args=["--temp", "1"])
    run.unload()
    run.settle()
    for model, args in ((B, ()), (A, ("--temp", "1"))):
        ticket = run.load(model)
        answer = run.settle().answers[ticket]
        assert isinstance(answer, Loaded)
        assert answer.target.extra_args == args


# --------------------------------------------------------------------------------------- unload


@pytest.mark.parametrize("state", BUSY_STATES)
def test_an_unload_cancels_the_load_and_returns_when_the_slot_is_empty(state: State) -> None:
    """It sets the token and waits for nothing but the effect's own end (B16, B20)."""
    run, ticket = in_flight(state)
    unload = run.unload()
    assert SetToken(Generation(1), CancelReason.USER) in run.commands
    assert (run.category(ticket), run.category(unload)) == (None, None)
    assert run.settle().state is I
    assert run.category(ticket) == "cancelled"
    assert run.answers[unload] == Unloaded()
    assert run.ctx.child is None


def test_an_unload_of_a_healthy_model_kills_it() -> None:
    """And only a verified empty slot is an answer."""
    run = healthy()
    unload = run.unload()
    assert (run.state, run.category(unload)) == (K, None)
    run.emptied()
    assert (run.state, run.answers[unload]) == (I, Unloaded())


def test_an_unload_with_nothing_loaded_succeeds() -> None:
    """200, also when nothing was loaded: after a look at the slot, which may not be empty."""
    run = Run()
    unload = run.unload()
    assert (run.state, run.answers) == (K, {})
    assert run.emptied().answers[unload] == Unloaded()
    assert run.state is I


def test_an_unload_during_a_spawn_reaps_the_late_process() -> None:
    """B04, B16: the child is handed over after the user said stop; it is killed, not forgotten."""
    run, ticket = in_flight(S)
    unload = run.unload()
    run.spawned()
    assert (run.state, run.ctx.child) == (K, Child(Generation(1), 41))
    assert run.began(Kill) == [Kill(Generation(1), Child(Generation(1), 41))]
    assert run.answers == {}
    run.emptied()
    assert run.category(ticket) == "cancelled"
    assert run.answers[unload] == Unloaded()


def test_a_shutdown_during_a_kill_begins_no_second_one() -> None:
    """At most one effect is in flight."""
    run = healthy()
    run.unload()
    assert len(run.began(Kill)) == 1
    run.shutdown()
    assert run.began(Kill) == []
    assert run.emptied().state is I


def test_an_unload_that_fails_says_so_and_keeps_the_pid() -> None:
    """B06: what will not die keeps the slot occupied, and the next load is refused with that."""
    run = healthy()
    unload = run.unload()
    run.kill_failed()
    assert (run.state, run.category(unload)) == (I, "slot_occupied")
    assert run.ctx.child == Child(Generation(1), 41)
    ticket = run.load(B)
    assert run.state is K
    assert run.began(Kill) == [Kill(Generation(2), Child(Generation(1), 41))]
    assert run.kill_failed().category(ticket) == "slot_occupied"
    again = run.unload()
    assert run.state is K
    assert run.emptied().answers[again] == Unloaded()


def test_an_unload_of_another_model_changes_nothing_and_says_so() -> None:
    """A `model_path` that is neither loaded nor loading."""
    run = healthy(A)
    before = run.ctx
    unload = run.unload(C)
    assert run.answers[unload] == Unloaded(changed=False)
    assert (run.state, replace(run.ctx, unloads=())) == (H, before)


def test_an_unload_by_name_leaves_the_load_of_another_model_alone() -> None:
    """B22: unloading A, which is being replaced, does not cancel B, which replaces it."""
    run = healthy(A)
    newer = run.load(B)
    unload = run.unload(A)
    assert run.state is K
    run.emptied()
    assert run.answers[unload] == Unloaded()
    assert run.settle().category(newer) == "loaded"


def test_an_unload_by_name_ends_the_queued_load_of_that_model_only() -> None:
    """Each queued load is its own."""
    run, first = in_flight(D)
    second, third = run.load(B, on_busy="queue"), run.load(C, on_busy="queue")
    unload = run.unload(B)
    run.settle()
    assert [run.category(t) for t in (first, second, third)] == ["loaded", "cancelled", "loaded"]
    assert run.answers[unload] == Unloaded()


@pytest.mark.parametrize("state", [D, S, W, H])
def test_an_unload_of_what_only_waits_is_answered_at_once(state: State) -> None:
    """What loads or serves is another model and stays: the slot may not be empty for years."""
    run, _ = in_flight(K)
    queued, other = run.load(B, on_busy="queue"), run.load(C, on_busy="queue")
    run.go(state)
    unload = run.unload(B)
    assert run.answers[queued] == Problem(
        "cancelled", "ended by an unload", generation=Generation(2)
    )
    assert run.answers[unload] == Unloaded()
    assert [job.target.request.model_path for job in run.ctx.wanted][-1:] == [C]
    withdrawn = run.unload(C)
    assert (run.category(other), run.answers[withdrawn]) == ("cancelled", Unloaded())
    assert (run.state, run.ctx.queue, run.settle().state) == (state, (), H)
    assert run.ctx.running is not None
    assert run.ctx.running.target.is_called(A)


def test_an_unload_of_what_waits_behind_an_ending_load_waits_for_its_end() -> None:
    """Nothing stays: the slot will be empty soon, and that is worth waiting for."""
    run, _ = in_flight(S)
    queued = run.load(B)
    unload = run.unload(B)
    assert (run.category(queued), run.category(unload)) == (None, None)
    assert unload not in run.answers
    run.spawned().emptied()
    assert (run.state, run.category(queued), run.answers[unload]) == (I, "cancelled", Unloaded())


def test_a_load_asked_for_before_an_unload_does_not_start_after_it() -> None:
    """B17: what was on its way when the user said stop is stopped as well."""
    run = Run()
    older = run.ticket()
    run.unload()
    run.emptied()
    run.load(A, ticket=older)
    assert (run.state, run.category(older)) == (I, "cancelled")
    newer = run.load(A)
    assert run.settle().category(newer) == "loaded"


def test_an_unload_by_name_stops_only_that_model_on_its_way() -> None:
    """The load of A is stopped though A was not there yet; the load of B is not meant."""
    run = Run()
    one, other = run.ticket(), run.ticket()
    assert run.answers[run.unload(A)] == Unloaded(changed=False)
    run.load(A, ticket=one)
    assert run.category(one) == "cancelled"
    run.load(B, ticket=other)
    assert run.settle().category(other) == "loaded"


# --------------------------------------------------------------------------------------- cancel


@pytest.mark.parametrize("by", ["id", "generation"])
@pytest.mark.parametrize("state", BUSY_STATES)
def test_a_cancel_ends_its_load_in_any_phase(state: State, by: str) -> None:
    """It is answered when the load's own effect has ended and nothing of it is left."""
    run, ticket = in_flight(state, load_request_id="x")
    cancel = run.cancel("x") if by == "id" else run.cancel(generation=1)
    assert SetToken(Generation(1), CancelReason.USER) in run.commands
    assert run.settle().state is I
    assert run.category(ticket) == "cancelled"
    assert run.answers[cancel] == CancelAnswer(cancelled=True)


def test_a_cancel_never_touches_a_resident_model() -> None:
    """B21: its load was committed; the cancel is late, and is told so."""
    run = healthy(load_request_id="x")
    before = run.ctx
    for cancel in (run.cancel("x"), run.cancel(generation=1), run.cancel(generation=7)):
        assert run.answers[cancel] == CancelAnswer(cancelled=False)
    assert (run.state, run.ctx) == (H, before)


def test_a_cancel_touches_only_its_load() -> None:
    """B22: cancelling another model's load cancels this one."""
    run, first = in_flight(D, load_request_id="a")
    second = run.load(B, on_busy="queue", load_request_id="b")
    cancel = run.cancel("b")
    assert run.category(second) == "cancelled"
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert run.settle().category(first) == "loaded"


def test_a_cancel_by_id_ends_one_caller_while_others_want_the_load() -> None:
    """B23: one client's cancel aborts the load for everyone who joined."""
    run, first = in_flight(D, load_request_id="a")
    second = run.load(A, load_request_id="b")
    cancel = run.cancel("a")
    assert run.category(first) == "cancelled"
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert not any(isinstance(c, SetToken) for c in run.commands)
    assert run.settle().category(second) == "loaded"


def test_a_cancel_by_generation_ends_the_load_for_everybody() -> None:
    """Who names the load means the load."""
    run, first = in_flight(D)
    second = run.load(A)
    run.cancel(generation=1)
    run.settle()
    assert [run.category(t) for t in (first, second)] == ["cancelled", "cancelled"]


def test_a_cancel_by_id_ends_every_load_of_that_id() -> None:
    """A handle given twice names both: the caller said stop."""
    run, first = in_flight(D, load_request_id="x")
    second = run.load(B, on_busy="queue", load_request_id="x")
    cancel = run.cancel("x")
    assert run.settle().state is I
    assert [run.category(t) for t in (first, second)] == ["cancelled", "cancelled"]
    assert run.answers[cancel] == CancelAnswer(cancelled=True)


def test_a_cancel_that_overtakes_its_load_wins() -> None:
    """An id not seen yet is remembered."""
    run = Run()
    assert run.answers[run.cancel("x")] == CancelAnswer(cancelled=False)
    ticket = run.load(A, load_request_id="x")
    assert (run.state, run.category(ticket)) == (I, "cancelled")
    other = run.load(A, load_request_id="y")
    assert run.settle().category(other) == "loaded"


def test_an_early_cancel_is_remembered_for_sixty_seconds() -> None:
    """Longer, and a new load under an old name would be cancelled by a forgotten click."""
    assert EARLY_CANCEL_S == 60
    for waited, category in ((60.0, "cancelled"), (60.1, None)):
        run = Run()
        run.cancel("x")
        run.now = waited
        assert run.category(run.load(A, load_request_id="x")) == category


def test_the_sixty_seconds_are_counted_from_the_cancel() -> None:
    """Monotonic clocks begin anywhere: a host that is up for days remembers a cancel as well."""
    run = Run()
    run.now = 1e6
    run.cancel("x")
    run.now += 1.0
    assert run.category(run.load(A, load_request_id="x")) == "cancelled"


def test_a_cancelled_download_leaves_nothing_to_be_killed() -> None:
    """The slot was verified empty before it; whoever cancels need not wait for another look."""
    run, ticket = in_flight(D)
    run.cancel(generation=1)
    run.fetched()
    assert (run.state, run.began(Kill)) == (I, [])
    assert run.category(ticket) == "cancelled"


def test_a_cancel_of_another_generation_touches_nothing() -> None:
    """It names a load that has ended: the one in flight, and who joined it, go on."""
    run = healthy()
    first, second = run.load(B), run.load(B)
    run.load(C, on_busy="queue")
    before = run.ctx
    for generation in (1, 7):
        cancel = run.cancel(generation=generation)
        assert run.answers[cancel] == CancelAnswer(cancelled=False)
        assert (run.state, run.ctx) == (K, before)
    run.settle()
    assert [run.category(ticket) for ticket in (first, second)] == ["loaded", "loaded"]


def test_a_cancel_by_generation_ends_a_queued_load_for_everybody() -> None:
    """Both callers hear it, and the load before it goes on."""
    run, first = in_flight(D)
    waiting = [run.load(B, on_busy="queue") for _ in range(2)]
    cancel = run.cancel(generation=2)
    assert [run.category(ticket) for ticket in waiting] == ["cancelled", "cancelled"]
    assert run.answers[cancel] == CancelAnswer(cancelled=True)
    assert run.ctx.queue == ()
    assert run.settle().category(first) == "loaded"


@pytest.mark.parametrize("began", [0.0, 1e6])
def test_a_second_early_cancel_forgets_only_what_is_over(began: float) -> None:
    """Each flood of cancels cleans up behind itself; what still counts is kept."""
    run = Run()
    run.now = began
    run.cancel("x")
    run.now += EARLY_CANCEL_S
    run.cancel("y")
    assert run.category(run.load(A, load_request_id="x")) == "cancelled"
    run.now += 0.5
    run.cancel("z")
    assert [name for name, _ in run.ctx.cancelled_ids] == ["y", "z"]


@pytest.mark.parametrize("by", ["cancel", "unload", "shutdown", "deadline"])
@pytest.mark.parametrize("state", BUSY_STATES)
def test_the_last_error_says_how_a_load_was_ended(state: State, by: str) -> None:
    """Status is read by those who did not call: they see that it was ended, and which load."""
    run, ticket = in_flight(state, deadline_s=5)
    if by == "cancel":
        run.cancel(generation=1)
    elif by == "deadline":
        run.do(TimerFired(Generation(1), run.now, "deadline"))
    else:
        run.shutdown() if by == "shutdown" else run.unload()
    told, shown = run.settle().answers[ticket], run.ctx.last_error
    assert isinstance(told, Problem)
    assert shown == told
    assert told.generation == 1


def test_every_caller_that_is_cancelled_hears_of_which_load() -> None:
    """One id may be that of several calls: each hears of its own."""
    run, first = in_flight(D, load_request_id="x")
    second = run.load(B, on_busy="queue", load_request_id="x")
    joined = run.load(B, on_busy="queue")
    run.cancel("x")
    run.settle()
    for ticket, generation in ((first, 1), (second, 2)):
        told = run.answers[ticket]
        assert isinstance(told, Problem)
        assert (told.category, told.generation) == ("cancelled", generation)
    assert run.category(joined) == "loaded"


def test_only_so_many_early_cancels_are_remembered() -> None:
    """The oldest is forgotten first; a flood of names costs bounded memory."""
    assert MAX_REMEMBERED_IDS == 256
    run = Run()
    for number in range(257):
        run.cancel(f"x{number}")
    assert len(run.ctx.cancelled_ids) == 256
    assert run.category(run.load(A, load_request_id="x1")) == "cancelled"
    assert run.category(run.load(A, load_request_id="x0")) is None


def test_a_cancel_of_an_id_that_was_seen_is_late_not_early() -> None:
    """B21: a delayed cancel kills a newer load of the same name."""
    run = healthy(load_request_id="x")
    run.cancel("x")
    assert run.ctx.cancelled_ids == ()
    ticket = run.load(B, load_request_id="x")
    assert run.settle().category(ticket) == "loaded"


def test_a_cancel_before_the_commit_wins_and_one_after_it_is_late() -> None:
    """The owner's step into Healthy is the linearization point."""
    run, ticket = in_flight(W)
    run.cancel(generation=1)
    assert run.ready().state is K
    assert run.settle().category(ticket) == "cancelled"

    run, ticket = in_flight(W)
    run.ready()
    cancel = run.cancel(generation=1)
    assert (run.category(ticket), run.state) == ("loaded", H)
    assert run.answers[cancel] == CancelAnswer(cancelled=False)


def test_a_second_cancel_finds_nothing_to_cancel() -> None:
    """A token is set at most once."""
    run, _ = in_flight(D)
    run.cancel(generation=1)
    second = run.cancel(generation=1)
    assert run.answers[second] == CancelAnswer(cancelled=False)
    assert not any(isinstance(c, SetToken) for c in run.commands)


def test_a_cancel_while_the_old_server_drains_is_answered_at_once() -> None:
    """A cancel settles within the kill ladder's own bound; a drain may take half a minute."""
    run = healthy(A)
    run.lease()
    ticket = run.load(B)
    assert (run.state, run.ctx.effect) == (K, None)
    cancel = run.cancel(generation=2)
    assert run.category(ticket) == "cancelled"
    assert run.answers[cancel] == CancelAnswer(cancelled=True)


# ------------------------------------------------------------------------------------- withdraw


@pytest.mark.parametrize("state", BUSY_STATES)
def test_a_caller_that_goes_away_withdraws_only_its_own_interest(state: State) -> None:
    """B23: the load goes on while anyone still wants it."""
    run, first = in_flight(state)
    second = run.load(A)
    run.withdraw(first)
    assert run.commands == ()
    run.settle()
    assert (run.category(first), run.category(second)) == (None, "loaded")


@pytest.mark.parametrize("state", BUSY_STATES)
def test_the_last_caller_that_goes_away_ends_the_load(state: State) -> None:
    """The default policy: nobody wants it any more."""
    run, ticket = in_flight(state)
    run.withdraw(ticket)
    assert SetToken(Generation(1), CancelReason.USER) in run.commands
    assert run.settle().state is I
    assert run.answers == {}


@pytest.mark.parametrize("state", BUSY_STATES)
def test_a_policy_may_let_an_abandoned_load_go_on(state: State) -> None:
    """The orchestrator itself still wants it."""
    run = Run(Policy(abandoned_load="continue"))
    ticket = run.load(A)
    run.go(state).withdraw(ticket)
    assert run.settle().state is H
    assert run.answers == {}
    assert run.answers.get(run.cancel(generation=1)) == CancelAnswer(cancelled=False)


def test_an_abandoned_queued_load_never_starts() -> None:
    """Its place in the queue goes with its last caller."""
    run, first = in_flight(D)
    second = run.load(B, on_busy="queue")
    run.withdraw(second)
    assert run.settle().state is H
    assert run.category(first) == "loaded"
    assert run.ctx.queue == ()


def test_who_withdrew_is_not_answered_when_the_load_fails() -> None:
    """Also when the caller leaves between the failure and the empty slot."""
    run, ticket = in_flight(W)
    run.fail()
    run.withdraw(ticket)
    assert run.settle().answers == {}


def test_a_late_withdrawal_changes_nothing() -> None:
    """The answer and the caller's leaving crossed each other."""
    run = healthy()
    before = run.ctx
    run.withdraw(Ticket(1))
    assert (run.state, run.ctx, run.commands) == (H, before, ())


# --------------------------------------------------------------------------------------- leases


def test_a_swap_waits_for_the_leases_and_then_kills() -> None:
    """B61: a swap kills a generation in the middle."""
    run = healthy()
    lease = run.lease()
    granted = run.answers[lease]
    assert isinstance(granted, LeaseGranted)
    assert granted.server == SERVER
    run.load(B)
    assert run.state is K
    assert run.began(Kill) == []
    assert SetTimer(Generation(1), "drain", 30.0) in run.commands
    run.do(LeaseReleased(lease, run.now))
    assert run.began(Kill) == [Kill(Generation(2), Child(Generation(1), 41))]


def test_a_drain_has_an_end() -> None:
    """B62: a drain without a deadline waits for ever under constant traffic (B25)."""
    run = healthy()
    run.lease()
    run.unload()
    run.do(TimerFired(Generation(1), 30.0, "drain"))
    assert run.began(Kill) == [Kill(Generation(1), Child(Generation(1), 41))]
    assert run.ctx.leases == frozenset()


@pytest.mark.parametrize("what", ["killing already", "another server's", "nothing was there"])
def test_a_drain_timer_that_is_late_changes_nothing(what: str) -> None:
    """A timer cannot be called back: what it was for may be over when it fires."""
    run = healthy()
    if what == "nothing was there":
        run.unload()
        run.emptied()
        run.unload()
        assert (run.state, run.ctx.child) == (K, None)
    elif what == "another server's":
        run.load(B)
        run.go(H)
        run.lease()
        run.unload()
        assert (run.state, run.ctx.effect) == (K, None)
    else:
        run.unload()
        assert run.began(Kill)
    before = run.ctx
    run.do(TimerFired(Generation(1), 30.0, "drain"))
    assert (run.state, run.ctx) == (K, before)
    assert run.commands == (DropStale(Generation(1), "drain_expired"),)


def test_a_lease_whose_holder_went_away_does_not_hold_up_the_drain() -> None:
    """The grant and the caller's leaving crossed each other; nobody will release it."""
    run = healthy()
    lease = run.lease()
    run.load(B)
    run.withdraw(lease)
    assert run.began(Kill) == [Kill(Generation(2), Child(Generation(1), 41))]


def test_no_lease_is_granted_on_a_server_that_is_being_stopped() -> None:
    """B63: a request granted during a stop meets a dying server."""
    run = healthy()
    run.unload()
    assert run.category(run.lease()) == "not_loaded"
    run = healthy()
    run.load(B)
    lease = run.lease()
    assert run.category(lease) is None
    answer = run.settle().answers[lease]
    assert isinstance(answer, LeaseGranted)
    assert answer.child.pid == 42


def test_who_no_longer_waits_for_a_lease_is_given_none() -> None:
    """A lease nobody holds is given back by nobody, and the next swap would wait for it."""
    run, _ = in_flight(D)
    gone, stays = run.lease(), run.lease()
    run.withdraw(gone)
    run.settle()
    assert run.ctx.leases == {stays}
    assert gone not in run.answers


def test_a_lease_waits_for_a_load_and_hears_when_it_fails() -> None:
    """B27: the waiter was never woken."""
    run, _ = in_flight(D)
    lease = run.lease()
    run.fail()
    assert run.category(lease) == "not_loaded"


def test_a_lease_that_waits_hears_when_the_load_is_ended() -> None:
    """B27 once more: an unload or a cancel ends the wait, too."""
    for end in (Run.unload, lambda run: run.cancel(generation=1)):
        run, _ = in_flight(S)
        lease = run.lease()
        end(run)
        assert run.settle().category(lease) == "not_loaded"


# ------------------------------------------------------------------------------------ shut down


@pytest.mark.parametrize("state", [*BUSY_STATES, H])
def test_a_shutdown_ends_everything_and_starts_nothing_more(state: State) -> None:
    """B07: quit during a load leaves a server. The latch holds before and after a spawn."""
    run = Run()
    ticket = run.load(A)
    run.go(state)
    queued = run.load(B, on_busy="queue") if state is not H else None
    shutdown = run.shutdown()
    assert run.settle().state is I
    assert run.answers[shutdown] == Done()
    assert run.ctx.child is None
    assert run.category(ticket) == ("loaded" if state is H else "shutting_down")
    assert queued is None or run.category(queued) == "shutting_down"
    assert run.category(run.load(A)) == "shutting_down"
    assert run.category(run.lease()) == "shutting_down"
    assert run.state is I


def test_a_shutdown_takes_back_the_leases() -> None:
    """It does not wait for a stream to end."""
    run = healthy()
    run.lease()
    run.shutdown()
    assert run.began(Kill) == [Kill(Generation(1), Child(Generation(1), 41))]


# ------------------------------------------------------------------------- the server by itself


def test_a_server_that_dies_is_no_longer_loaded_and_says_why() -> None:
    """A corpse is never loaded; what is left of its tree is emptied."""
    run = healthy()
    exit_ = Exit(41, -9, ("out of memory",))
    run.do(Exited(Generation(1), 0.0, exit_))
    assert run.state is K
    assert run.ctx.last_error is not None
    assert run.ctx.last_error.category == "server_exited"
    assert run.ctx.last_error.log_tail == ("out of memory",)
    assert run.ctx.last_exit == exit_
    assert run.emptied().state is I


def test_the_end_of_a_server_that_was_stopped_is_remembered() -> None:
    """Until another one ends: a load that finds nothing to stop has seen no end."""
    run = healthy()
    run.unload()
    exit_ = Exit(41, -15, ("cleaning up",))
    run.do(Emptied(run.effect, run.now, exit_))
    assert run.ctx.last_exit == exit_
    run.unload()
    assert run.emptied().ctx.last_exit == exit_


def test_the_exit_of_another_process_is_fenced() -> None:
    """The exit of an earlier server may be noticed late."""
    run = healthy()
    before = run.ctx
    run.do(Exited(Generation(1), 0.0, Exit(99, 0)))
    assert (run.state, run.ctx) == (H, before)
    assert run.commands == (DropStale(Generation(1), "exited"),)


def test_a_server_that_would_not_die_and_then_does_leaves_an_empty_slot() -> None:
    """Idle and occupied: its exit lets the slot be verified again, by itself."""
    run = healthy()
    run.unload()
    run.kill_failed()
    run.do(Exited(Generation(1), 0.0, Exit(41, -9)))
    assert run.state is K
    run.emptied()
    assert (run.state, run.ctx.child) == (I, None)


# ------------------------------------------------------------------------- the slot, and the clock


def test_a_slot_that_fills_again_is_emptied_again_within_bounds() -> None:
    """B02: between the kill and the spawn the slot may be taken; nothing is started beside it."""
    run, ticket = in_flight(D)
    for _ in range(MAX_VERIFICATIONS):
        run.fetched(HELD)
        assert run.state is K
        run.emptied()
    run.fetched(HELD)
    assert run.settle().state is I
    assert run.category(ticket) == "slot_occupied"
    assert not run.began(Spawn)


@pytest.mark.parametrize("state", BUSY_STATES)
def test_a_deadline_ends_the_load_in_any_phase(state: State) -> None:
    """The optional hard clock; the effect still ends by itself."""
    run, ticket = in_flight(state, deadline_s=5)
    run.do(TimerFired(Generation(1), 5.0, "deadline"))
    assert SetToken(Generation(1), CancelReason.DEADLINE) in run.commands
    assert run.settle().state is I
    problem = run.answers[ticket]
    assert isinstance(problem, Problem)
    assert (problem.category, problem.field) == ("deadline", "deadline_s")


def test_a_deadline_counts_while_the_load_waits_its_turn() -> None:
    """A caller who gives 5 s means 5 s, also in the queue."""
    run, first = in_flight(D)
    second = run.load(B, on_busy="queue", deadline_s=5)
    assert SetTimer(Generation(2), "deadline", 5.0) in run.commands
    run.do(TimerFired(Generation(2), 5.0, "deadline"))
    assert run.category(second) == "deadline"
    assert run.settle().category(first) == "loaded"


def test_a_cancel_of_an_older_id_is_late_however_many_loads_came_since() -> None:
    """B21: an id may be used again, and its old cancel must not reach the new load."""
    run = Run()
    for model, name in ((A, "x"), (B, "y")):
        run.load(model, load_request_id=name)
        run.settle()
    run.cancel("x")
    again = run.load(A, load_request_id="x")
    assert run.settle().category(again) == "loaded"


def test_the_status_says_by_what_a_load_was_overtaken() -> None:
    run, _ = in_flight(W)
    run.load(B)
    assert run.ctx.last_error is not None
    assert run.ctx.last_error.category == "superseded"
    assert B in run.ctx.last_error.message


def test_a_deadline_waits_for_no_lease() -> None:
    """Who waits for a drain has nothing under way that would have to end first."""
    run = healthy(A)
    run.lease()
    late = run.load(B, deadline_s=5)
    assert (run.state, run.ctx.effect) == (K, None)
    run.do(TimerFired(Generation(2), 5.0, "deadline"))
    assert run.category(late) == "deadline"


def test_a_queued_load_is_timed_from_its_turn() -> None:
    """What it waited for others is in no phase of its own, only in the whole."""
    run, _ = in_flight(D)
    late = run.load(B, on_busy="queue")
    run.now = 7.0
    run.fail()
    assert run.state is K
    run.now = 8.0
    run.settle()
    answer = run.answers[late]
    assert isinstance(answer, Loaded)
    assert (answer.timings.kill, answer.timings.total) == (1.0, 8.0)


def test_a_deadline_that_fires_after_the_commit_is_fenced() -> None:
    """A timer is not taken back; it is not believed."""
    run = healthy(deadline_s=5)
    before = run.ctx
    run.do(TimerFired(Generation(1), 5.0, "deadline"))
    assert (run.state, run.ctx) == (H, before)


@pytest.mark.parametrize("state", BUSY_STATES)
def test_a_completion_of_an_older_load_is_fenced(state: State) -> None:
    """B05: a late completion of load N settles load N+1."""
    run = healthy(A)
    run.load(B)
    run.go(state)
    before = run.ctx
    old, problem = Generation(1), Problem("server_start_failed", "late")
    for fact in (
        Emptied(old, 0.0),
        KillFailed(old, 0.0, problem),
        Fetched(old, 0.0, files(A), FREE),
        FetchFailed(old, 0.0, problem),
        Spawned(old, 0.0, Child(old, 99)),
        SpawnFailed(old, 0.0, problem),
        BecameReady(old, 0.0, SERVER),
        NotReady(old, 0.0, problem),
    ):
        run.do(fact)
        assert (run.state, run.ctx) == (state, before)
        assert run.commands == (DropStale(old, fact.trigger),)
