"""A machine driven by hand: facts in, answers and commands out, without a world around it.

The checker proves that no order of facts breaks an invariant. Tests that use `Run` say what the
answers are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import UnionType
from typing import Any, Self

from orchestrator.base.tokens import CancelReason, Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    Accept,
    Answer,
    CloseGate,
    Command,
    Concluded,
    Download,
    LeaseGranted,
    Loaded,
    OpenGate,
    Post,
    Resolve,
    ServerEnded,
    SetTimer,
    Settle,
    SetToken,
    StopTimer,
)
from orchestrator.machine.context import Context, Policy, Running
from orchestrator.machine.facts import (
    BecameReady,
    CancelRequested,
    Child,
    Drained,
    Emptied,
    Exit,
    Exited,
    Fact,
    Fetched,
    FetchFailed,
    Found,
    Hung,
    KillFailed,
    LeaseRequested,
    LoadRequested,
    LookUpRequested,
    NotReady,
    PrefetchRequested,
    Purpose,
    Resolved,
    ServerFacts,
    ShutdownRequested,
    SlotEvidence,
    Spawned,
    SpawnFailed,
    Timer,
    TimerFired,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.machine.states import State
from orchestrator.machine.step import step
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import Target
from tests.kit.machine.world import files, on_disk, resolved, target

I, K, D, S, W, H = State  # noqa: E741 (the letters of the table)
A, B, C = "A", "B", "C"
BUSY_STATES = [K, D, S, W]
FREE = SlotEvidence(is_empty=True)
OCCUPIED = SlotEvidence(is_empty=False, reason="the slot's lock is held")
SERVER = ServerFacts("http://127.0.0.1:36017")


class Run:
    """A machine, the answers to its callers, and the commands of its last step.

    The timers that have been stopped are in `stopped`, not in `commands`: every load stops that
    of its look-up. All loads that have been concluded are in `history`. Who holds a lease is
    `inside`; a server that is to be stopped, and that nobody uses, is drained in the same step.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.state = State.IDLE
        self.ctx = Context(policy or Policy())
        self.now = 0.0
        self.tickets = 0
        self.commands: tuple[Command, ...] = ()
        self.stopped: list[StopTimer] = []
        self.history: list[Concluded] = []
        self.answers: dict[int, Answer] = {}
        self.generations: dict[int, int] = {}
        self.inside: set[Ticket] = set()

    def do(self, fact: Fact) -> Self:
        self._step(fact)
        drains = [c for c in self.commands_of(CloseGate) if c.drains]
        if drains and not self.inside:  # told at once
            closing = self.commands
            self._step(Drained(drains[0].generation, self.now))
            self.commands = (*closing, *self.commands)
        return self

    def _step(self, fact: Fact) -> None:
        self.state, self.ctx, commands = step(self.state, self.ctx, fact)
        self.commands = tuple(c for c in commands if not isinstance(c, StopTimer))
        self.stopped += [c for c in commands if isinstance(c, StopTimer)]
        for command in self.commands:
            if isinstance(command, Settle):
                assert command.ticket not in self.answers, f"call {command.ticket} answered twice"
                self.answers[command.ticket] = command.answer
                if isinstance(command.answer, LeaseGranted):
                    self.inside.add(command.ticket)
                _check_message(command.answer)
            elif isinstance(command, Accept):
                self.generations[command.ticket] = command.generation
            elif isinstance(command, OpenGate):
                self.inside = set()
        self.history += self.commands_of(Concluded)
        _check_message(self.ctx.last_error)

    # --------------------------------------------------------------------------------- callers

    def ticket(self) -> Ticket:
        self.tickets += 1
        return Ticket(self.tickets)

    def load(
        self, model: str, *, ticket: Ticket | None = None, alive: bool = True, **options: Any
    ) -> Ticket:
        ticket = ticket or self.ticket()
        return self.load_target(
            target(LoadRequest.from_dict({"model_path": model, **options})), ticket, alive=alive
        )

    def load_target(self, wanted: Target, ticket: Ticket, *, alive: bool = True) -> Ticket:
        self.look_up(wanted.request, ticket)
        if ticket not in self.answers:
            self.do(LoadRequested(ticket, wanted, self.now, alive))
        return ticket

    def look_up(self, request: LoadRequest, ticket: Ticket, purpose: Purpose = "load") -> Ticket:
        self.do(LookUpRequested(ticket, request, purpose, self.now))
        return ticket

    def found(self, ticket: Ticket, model: str, purpose: Purpose = "load", **options: Any) -> Self:
        """The look-up of a call has found its model."""
        wanted = target(LoadRequest.from_dict({"model_path": model, **options}))
        requested = LoadRequested if purpose == "load" else PrefetchRequested
        return self.do(requested(ticket, wanted, self.now))

    def prefetch(self, model: str, **options: Any) -> Ticket:
        ticket = self.ticket()
        wanted = target(LoadRequest.from_dict({"model_path": model, **options}))
        self.look_up(wanted.request, ticket, "prefetch")
        if ticket not in self.answers:
            self.do(PrefetchRequested(ticket, wanted, self.now))
        return ticket

    def unload(self, model: str | None = None, *, cut: bool = False) -> Ticket:
        ticket = self.ticket()
        self.do(UnloadRequested(ticket, model, self.now, cut))
        return ticket

    def cancel(self, name: str | None = None, generation: int | None = None) -> Ticket:
        ticket = self.ticket()
        self.do(CancelRequested(ticket, name, generation, self.now))
        return ticket

    def lease(self, *, alive: bool = True) -> Ticket:
        ticket = self.ticket()
        self.do(LeaseRequested(ticket, self.now, alive))
        return ticket

    def release(self, lease: Ticket) -> Self:
        """Leave the gate, which is no fact, except for the last one while the server drains."""
        self.commands = ()
        self.inside.remove(lease)
        if self.ctx.gate == "draining" and not self.inside:
            assert self.ctx.child is not None
            self.do(Drained(self.ctx.child.generation, self.now))
        return self

    def shutdown(self, *, keep: bool = True, alive: bool = True) -> Ticket:
        ticket = self.ticket()
        self.do(ShutdownRequested(ticket, self.now, keep, alive))
        return ticket

    def withdraw(self, ticket: Ticket) -> Self:
        if ticket in self.inside:
            return self.release(ticket)
        return self.do(Withdrawn(ticket, self.now))

    def category(self, ticket: int) -> str | None:
        """Return `loaded`, `already` or the category of a failure; None without such an answer."""
        answer = self.answers.get(ticket)
        if isinstance(answer, Loaded):
            return "already" if answer.already else "loaded"
        return answer.category if isinstance(answer, Problem) else None

    def loaded(self, ticket: int) -> Loaded:
        answer = self.answers[ticket]
        assert isinstance(answer, Loaded)
        return answer

    def problem(self, ticket: int) -> Problem:
        answer = self.answers[ticket]
        assert isinstance(answer, Problem)
        return answer

    # ------------------------------------------------------------------------------- the context

    @property
    def effect(self) -> Generation:
        assert self.ctx.effect is not None
        return self.ctx.effect.generation

    @property
    def running(self) -> Running:
        assert self.ctx.running is not None
        return self.ctx.running

    @property
    def model(self) -> str | None:
        """The model of the running server."""
        return self.ctx.running.target.request.model_path if self.ctx.running else None

    @property
    def last_error(self) -> Problem:
        assert self.ctx.last_error is not None
        return self.ctx.last_error

    @property
    def recovery(self) -> tuple[str, int] | None:
        """The phase of the recovery and the number of failures in a row."""
        known = self.ctx.recovery
        return (known.phase, known.failures) if known else None

    # --------------------------------------------------------------------------------- effects

    def emptied(self, exit_: Exit | None = None) -> Self:
        return self.do(Emptied(self.effect, self.now, exit_))

    def kill_failed(self) -> Self:
        problem = Problem("slot_occupied", "pid 41 would not die")
        return self.do(KillFailed(self.effect, self.now, problem))

    def resolved(self, generation: int, model: str) -> Self:
        return self.do(Resolved(Generation(generation), self.now, resolved(model)))

    def fetched(self, slot: SlotEvidence = FREE) -> Self:
        """The download of the load in flight succeeds."""
        assert self.ctx.job is not None
        return self.do(Fetched(self.effect, self.now, self.ctx.job.target.model, slot))

    def fetched_beside(self, generation: int, model: str) -> Self:
        """The download of a queued load, or of a prefetch, succeeds."""
        return self.do(Fetched(Generation(generation), self.now, files(model)))

    def fetch_failed(self, generation: int) -> Self:
        problem = Problem("hub_unreachable", "the Hub is unreachable")
        return self.do(FetchFailed(Generation(generation), self.now, problem))

    def spawned(self) -> Self:
        generation = self.effect
        return self.do(Spawned(generation, self.now, Child(generation, 40 + generation)))

    def ready(self, *, alive: bool = True) -> Self:
        return self.do(BecameReady(self.effect, self.now, SERVER, alive))

    def fail(self) -> Self:
        """The effect in flight fails."""
        assert self.ctx.effect is not None
        problem = Problem("server_start_failed", "it failed")
        failed: dict[str, Callable[[Generation, float, Problem], Fact]] = {
            "kill": KillFailed,
            "download": FetchFailed,
            "spawn": SpawnFailed,
            "probe": NotReady,
        }
        return self.do(failed[self.ctx.effect.kind](self.effect, self.now, problem))

    def find(self, model: str | None, generation: int = 7, pid: int | None = 47) -> Self:
        """The next owner finds a server; `model` is what its keeper remembers, if it does."""
        child = None if pid is None else Child(Generation(generation), pid)
        remembered = None if model is None else on_disk(model)
        return self.do(Found(Generation(generation), self.now, child, remembered))

    def hang(self, silent_s: float = 60.0) -> Self:
        """The running server hangs."""
        return self.do(self.hang_of(self.running, silent_s))

    def hang_of(self, server: Running, silent_s: float = 60.0) -> Hung:
        exit_ = Exit(server.child.pid, None, ("the last words",), "hung")
        return Hung(server.generation, self.now, exit_, silent_s)

    def exited(self, pid: int = 41, returncode: int | None = -9, generation: int = 1) -> Self:
        return self.do(Exited(Generation(generation), self.now, Exit(pid, returncode)))

    def crash(self, returncode: int | None = -11) -> Self:
        """The running server ends by itself."""
        exit_ = Exit(self.running.child.pid, returncode, ("it crashed",))
        return self.do(Exited(self.running.generation, self.now, exit_))

    def fire(self, kind: Timer, generation: int) -> Self:
        return self.do(
            TimerFired(Generation(generation), self.now, kind, self._idle_in_s(kind, generation))
        )

    def _idle_in_s(self, kind: Timer, generation: int) -> float | None:
        """The evidence of an idle timer: the server is unused if nobody is inside."""
        running = self.ctx.running
        is_asked = kind == "idle" and running is not None and running.generation == generation
        if not is_asked or running is None or self.ctx.gate != "open":
            return None
        return running.idle_ttl_s if self.inside or running.idle_ttl_s is None else 0.0

    def expire(self, timer: SetTimer) -> Self:
        """The time of a timer passes, and it fires."""
        self.now += timer.after_s
        return self.fire(timer.kind, timer.generation)

    def crash_and_restart(self) -> Self:
        timer = self.crash().timer("restart")
        return self.emptied().expire(timer).settle()

    def promote(self) -> Self:
        """The promotion that the last step has posted arrives."""
        (fact,) = self.commands_of(Post)
        return self.do(fact.fact)

    def go(self, state: State) -> Self:
        """Let the load in flight reach a state."""
        for _ in range(40):
            if self.state is state:
                return self
            self._succeed()
        raise AssertionError(f"it does not reach {state}")

    def settle(self) -> Self:
        """Let every effect succeed and every posted fact arrive, until the machine rests."""
        for _ in range(40):
            if posted := self.commands_of(Post):
                self.do(replace(posted[0].fact, child_is_alive=True))
            elif self.ctx.effect is not None:
                self._succeed()
            else:
                return self
        raise AssertionError("it does not come to rest")

    def _succeed(self) -> Self:
        assert self.ctx.effect is not None
        match self.ctx.effect.kind:
            case "kill":
                return self.emptied()
            case "download":
                return self.fetched()
            case "spawn":
                return self.spawned()
            case "probe":
                return self.ready()

    # -------------------------------------------------------------- the commands of the last step

    def commands_of(self, kind: type[Any] | UnionType) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]

    @property
    def kinds(self) -> list[type[Any]]:
        return [type(command) for command in self.commands]

    def begun_beside(self) -> list[tuple[str, int]]:
        """What was begun for queued loads and prefetches, with their generations."""
        return [(type(c).__name__, c.generation) for c in self.commands_of(Resolve | Download)]

    def tokens(self) -> list[int]:
        """The loads whose token was set."""
        return [c.generation for c in self.commands_of(SetToken)]

    def reasons(self) -> list[tuple[int, CancelReason]]:
        """The loads whose token was set, and why."""
        return [(c.generation, c.reason) for c in self.commands_of(SetToken)]

    def timer(self, kind: Timer) -> SetTimer:
        (timer,) = self.timers(kind)
        return timer

    def timers(self, kind: Timer) -> list[SetTimer]:
        return [c for c in self.commands_of(SetTimer) if c.kind == kind]

    def concluded(self) -> list[tuple[int, str]]:
        """The loads that were concluded, each with its category or `loaded`."""
        return [
            (c.generation, "loaded" if isinstance(c.answer, Loaded) else c.answer.category)
            for c in self.commands_of(Concluded)
        ]

    def ended(self) -> list[tuple[int, str]]:
        """The servers that were reported to have ended, and how."""
        return [(c.pid, c.how) for c in self.commands_of(ServerEnded)]


def _check_message(answer: object) -> None:
    if isinstance(answer, Problem):
        assert answer.message
        assert "None" not in answer.message


def healthy(model: str = A, policy: Policy | None = None, **options: Any) -> Run:
    run = Run(policy)
    run.load(model, **options)
    return run.go(H)


def in_flight(state: State, model: str = A, **options: Any) -> tuple[Run, Ticket]:
    """Return a machine whose first load has reached `state`, and the ticket of that load."""
    run = Run()
    ticket = run.load(model, **options)
    run.go(state)
    assert run.category(ticket) is None
    return run, ticket
