"""A pool whose slots do what a test says, for scenarios in seconds and MiB."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self, TypeVar

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.pool import facts
from orchestrator.pool.commands import (
    AnswerCancelled,
    AnswerEmptied,
    Command,
    GiveUp,
    Grant,
    Refuse,
    Start,
    Stop,
)
from orchestrator.pool.context import Context, Definition, Entry, Need, Policy, Source
from orchestrator.pool.facts import Fact, Use
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.states import State
from orchestrator.pool.step import step

A, S, R, P, X, _POOL = State
GB = 1_000_000_000
Kind = TypeVar("Kind", bound=Command)


def host(mib: int) -> Amounts:
    return Amounts.of({"Host": mib})


def definition(
    mib: int | None = 1000,
    *,
    source: Source = "estimate",
    least: int | None = None,
    **options: Any,
) -> Definition:
    """Return an entry that needs so much of the host, and at least `least` if its context is Auto;
    its files are as large.
    """
    smallest = None if least is None else host(least)
    need = None if mib is None else Need(host(mib), source, smallest)
    return Definition(need, size_bytes=(mib or 0) * 1_000_000, **options)


class Run:
    """A pool, the answers to its callers, and the commands of its last step.

    `uses` are the open gates: who is inside, and when that was.
    """

    def __init__(self, budget: int = 3000, policy: Policy | None = None, **entries: Any) -> None:
        self.ctx = Context()
        self.now = 0.0
        self.commands: tuple[Command, ...] = ()
        self.answers: dict[int, str] = {}
        self.problems: dict[int, Problem] = {}
        self.uses: dict[str, Use] = {}
        self.tickets = 0
        self.policy = policy or Policy()
        self.do(facts.Configured(self.policy, host(budget), self.now))
        for name, entry in entries.items():
            self.define(name, entry if isinstance(entry, Definition) else definition(entry))

    # ----------------------------------------------------------------------------------- steps
    def do(self, fact: Fact) -> Self:
        fact = replace(fact, at=self.now, uses=tuple(self.uses.values()))
        self.ctx, self.commands = step(self.ctx, fact)
        for command in self.commands:
            match command:
                case Grant(ticket):
                    self._answer(ticket, "granted")
                case AnswerCancelled(ticket, is_cancelled):
                    self._answer(ticket, str(is_cancelled))
                case AnswerEmptied(ticket):
                    self._answer(ticket, "emptied")
                case Refuse(ticket, _, problem):
                    self._answer(ticket, problem.category)
                    self.problems[ticket] = problem
                    assert "None" not in problem.message
                case Stop(name):
                    self.uses.pop(name, None)
                case _:
                    pass
        return self

    def _answer(self, ticket: Ticket, answer: str) -> None:
        assert ticket not in self.answers, f"call {ticket} is answered twice"
        self.answers[ticket] = answer

    def ticket(self) -> Ticket:
        self.tickets += 1
        return Ticket(self.tickets)

    def at(self, now: float) -> Self:
        """Let the time pass, and the timer fire where it was set."""
        while (timer := self.ctx.timer_at) is not None and timer <= now:
            self.now = timer
            self.do(facts.Looked(self.now))
        self.now = now
        return self

    def look(self, *admitted: Ticket) -> Self:
        return self.do(facts.Looked(self.now, admitted))

    # --------------------------------------------------------------------------------- callers
    def want(
        self, name: str, kind: Any = "lease", *, has_place: bool = True, **options: Any
    ) -> Ticket:
        """Want a model as the owner does: it tries the gate of a Resident only."""
        ticket, entry = self.ticket(), self.ctx.find(name)
        is_open = name in self.uses and entry is not None and entry.state is R
        enters = is_open and not options.get("is_forced") and not (entry and entry.is_changed)
        enters = enters and (kind != "request" or has_place)
        if enters and kind != "load":
            self.uses[name] = Use(name, True, self.now)
        self.do(facts.Wanted(name, ticket, kind, self.now, has_entered=enters, **options))
        return ticket

    def load(self, name: str, **options: Any) -> Ticket:
        return self.want(name, "load", **options)

    def withdraw(self, name: str, ticket: Ticket) -> Self:
        return self.do(facts.Withdrawn(name, ticket, self.now))

    def unload(self, name: str, *, cut: bool = False) -> Ticket:
        ticket = self.ticket()
        self.do(facts.UnloadRequested(name, ticket, self.now, cut))
        return ticket

    def cancel(self, name: str) -> str | None:
        """Return the answer, which comes at once."""
        ticket = self.ticket()
        self.do(facts.CancelRequested(name, ticket, self.now))
        return self.answers.get(ticket)

    def remove(self, name: str) -> Ticket:
        ticket = self.ticket()
        self.do(facts.Removed(name, self.now, ticket))
        return ticket

    def define(self, name: str, entry: Definition, *, is_other: bool = True) -> Self:
        return self.do(facts.Defined(name, entry, self.now, is_other))

    def leave(self, name: str) -> Self:
        """The last lease ends; who waits for room makes the pool look."""
        self.uses[name] = Use(name, False, self.now)
        return self.look() if self.ctx.waiting else self

    # ----------------------------------------------------------------------------------- slots
    def generation(self, name: str) -> Generation:
        return self.entry(name).generation

    def sized(self, name: str, mib: int) -> Self:
        return self.do(facts.Sized(name, self.generation(name), host(mib), self.now))

    def healthy(
        self, name: str, *, mib: int | None = None, is_open: bool = True, places: int = 99
    ) -> Self:
        waiters = list(self.ctx.waiters_of(name))
        requests = [one.ticket for one in waiters if one.kind == "request" and one.ticket]
        if is_open:
            is_inside = any(waiter.gets_in for waiter in waiters)
            self.uses[name] = Use(name, is_inside, self.now if is_inside else None)
        figure = None if mib is None else host(mib)
        generation = self.generation(name)
        admitted = tuple(requests[:places]) if is_open else ()
        return self.do(facts.BecameHealthy(name, generation, self.now, figure, is_open, admitted))

    def crash(self, name: str) -> Self:
        self.uses.pop(name, None)
        return self.do(facts.Leaving(name, self.generation(name), self.now))

    def emptied(self, name: str, problem: Problem | None = None) -> Self:
        return self.do(facts.Emptied(name, self.generation(name), self.now, problem))

    def stuck(self, name: str) -> Self:
        return self.do(facts.BecameStuck(name, self.generation(name), self.now))

    def resident(self, *names: str) -> Self:
        """Load these by hand, one after the other; nobody uses them."""
        for name in names:
            self.load(name)
            self.healthy(name)
        return self

    # ------------------------------------------------------------------------------ the result
    def entry(self, name: str) -> Entry:
        entry = self.ctx.find(name)
        assert entry is not None, f"{name} is not there"
        return entry

    def state(self, name: str) -> State:
        return self.entry(name).state

    @property
    def states(self) -> str:
        """The letters of the entries' states, in order."""
        letters = {A: "A", S: "S", R: "R", P: "P", X: "X"}
        return "".join(letters[entry.state] for entry in self.ctx.entries)

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [command for command in self.commands if isinstance(command, kind)]

    @property
    def started(self) -> list[str]:
        return [start.name for start in self.of(Start)]

    @property
    def stopped(self) -> list[str]:
        return [stop.name for stop in self.of(Stop)]

    def tried(self, name: str) -> list[str]:
        """Who would be stopped for a request of this model; it is not made."""
        kept = self.ctx, self.commands, dict(self.uses), self.tickets
        self.want(name)
        stopped = self.stopped
        self.ctx, self.commands, self.uses, self.tickets = kept
        return stopped

    @property
    def stops(self) -> list[Stop]:
        return self.of(Stop)

    @property
    def reasons(self) -> list[str]:
        return [stop.reason for stop in self.of(Stop)]

    @property
    def given_up(self) -> list[tuple[str, str]]:
        return [(one.name, one.kind) for one in self.of(GiveUp)]

    @property
    def reserved(self) -> int:
        return Amounts.total(held for _, held in self.ctx.ledger.reservations)["Host"]

    def answers_of(self, tickets: Iterable[Ticket]) -> list[str | None]:
        return [self.answers.get(ticket) for ticket in tickets]
