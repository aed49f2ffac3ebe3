"""The pool's owner: one thread, one inbox, and the only place that steps the pool's machine.

`pump` processes one fact: it adds how the gates are used, steps, publishes the new context and
carries the commands out. Every call is answered exactly once.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Final, Literal, Protocol, cast

from orchestrator.base import threads
from orchestrator.base.log import event_log
from orchestrator.base.tokens import Ticket
from orchestrator.errors import Problem, problem_of
from orchestrator.pool import commands, facts
from orchestrator.pool.by_hand import ByHand
from orchestrator.pool.commands import Command
from orchestrator.pool.context import Context, Waiter
from orchestrator.pool.facts import Fact, Use, Uses
from orchestrator.pool.policy import in_turn
from orchestrator.pool.states import State
from orchestrator.pool.step import PoolMachine, pool_machine
from orchestrator.runtime.answers import LeasedServer
from orchestrator.runtime.gate import Gate
from orchestrator.runtime.owner import resolve
from orchestrator.runtime.ports import Clock

_MAX_STEPS: Final = 8  # of one fact: each is taken anew because somebody has entered a gate
EVICTIONS: Final = ("room", "memory", "budget", "idle")
_log = event_log("orchestrator.pool")
CallKind = Literal["lease", "request", "load", "end"]


@dataclass(slots=True, eq=False)
class PoolCall:
    """One call, from any thread. Its answer is a `Granted`, for an end None, or a `Problem`.

    Cancelling `settled` withdraws the caller.
    """

    ticket: Ticket
    name: str
    kind: CallKind
    hand: ByHand | None = None  # of a load
    settled: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Lease:
    """A place inside the gate of a server."""

    name: str
    gate: Gate
    who: Hashable
    server: LeasedServer


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease or a load that has succeeded.

    Attributes:
        evicted: The models that were stopped for it.
        is_at_once: Its model was resident already.
    """

    lease: Lease | None
    evicted: tuple[str, ...] = ()
    is_at_once: bool = False


class _Drop:
    """Put into the inbox when the pool is gone."""


class Slots(Protocol):
    """What the owner needs of the slots; only `rest` blocks, until all are given back."""

    def gate(self, name: str) -> Gate | None: ...
    def start(self, command: commands.Start) -> None: ...
    def stop(self, command: commands.Stop) -> None: ...
    def measure(self, command: commands.Measure) -> None: ...
    def rest(self) -> None: ...


class PoolOwner:
    """Steps the pool's machine over its slots.

    Args:
        slots: Makes what carries out orders about servers, given where to post its facts.
        ended: Called once when this owner has stopped, or has been dropped and has stopped itself.
    """

    def __init__(
        self,
        slots: Callable[[Callable[[Fact], None]], Slots],
        clock: Clock,
        ended: Callable[[], None] = lambda: None,
        *,
        machine: PoolMachine | None = None,
    ) -> None:
        self.clock = clock
        self._ended = ended
        self.ctx: Context = Context()
        self.evictions: dict[str, int] = {}  # by reason, since the start
        self._machine = machine or pool_machine()
        self._inbox: queue.SimpleQueue[Fact | threading.Event | _Drop | None] = queue.SimpleQueue()
        self._tickets = itertools.count(1)
        self._calls: dict[Ticket, PoolCall] = {}
        self._entered: dict[Ticket, Lease] = {}  # in this step, and not granted yet
        self._evicted: dict[str, list[str]] = {}  # by the model that wanted their room
        self._timer_at: float | None = None
        self._is_looking = False
        self._is_at_once = False
        self.is_empty: threading.Event = threading.Event()  # of servers, after a shutdown
        self._thread: threading.Thread | None = None
        self.has_ended: bool = False
        self._slots: Slots = slots(self.post)

    # ---------------------------------------------------------------------------- from any thread

    def call(self, name: str, kind: CallKind, hand: ByHand | None = None) -> PoolCall:
        call = PoolCall(Ticket(next(self._tickets)), name, kind, hand)
        self._calls[call.ticket] = call
        call.settled.add_done_callback(lambda _: self._withdraw(call))
        return call

    def dismiss(self, call: PoolCall) -> bool:
        """Answer a call that is still open as cancelled, and withdraw its caller.

        Whoever takes a call from the open ones answers it: a grant that came first stands.
        """
        problem = Problem("cancelled", f"the load of {call.name} was cancelled")
        if not self._answer(call.ticket, problem):
            return False
        self.post(facts.Withdrawn(call.name, call.ticket, self.clock()))
        return True

    def dismiss_named(self, name: str, request_id: str) -> bool:
        """Dismiss the open calls for a model with this id; return whether there was one."""
        calls = [one for one, hand in self._loads(name) if hand.load_request_id == request_id]
        return sum(map(self.dismiss, calls)) > 0  # all of them

    def _loads(self, name: str) -> Iterator[tuple[PoolCall, ByHand]]:
        """Yield the open calls that load a model by hand, in the order in which they came."""
        for call in tuple(self._calls.values()):
            if call.name == name and call.hand is not None:
                yield call, call.hand

    def post(self, fact: Fact) -> None:
        """Put a fact into the inbox. After the end, refuse the calls that are still open."""
        self._inbox.put(fact)
        if self.has_ended:
            self._refuse_calls()

    def until_done(self) -> None:
        """Block until everything that has been posted so far is processed."""
        done = threading.Event()
        self._inbox.put(done)
        if self.has_ended:
            self._end_waits()
        done.wait()

    def left(self, name: str, gate: Gate) -> None:
        """Look again if somebody waits for what a lease that has ended leaves free."""
        if self.ctx.waiting and (not gate.inside or self._may_admit(name, gate)):
            self._look()

    def _may_admit(self, name: str, gate: Gate) -> bool:
        return gate.has_free_place and any(_requests(self.ctx, name))

    def _look(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            self.post(facts.Looked(self.clock()))

    def drop(self) -> None:
        """Shut down and stop without anybody who waits for it. A finalizer may call this at any
        point of any thread, as it only puts into a queue.
        """
        self._inbox.put(_Drop())

    def _withdraw(self, call: PoolCall) -> None:
        if call.settled.cancelled():
            self._calls.pop(call.ticket, None)
            self.post(facts.Withdrawn(call.name, call.ticket, self.clock()))

    # ------------------------------------------------------------------------ the owner's thread

    def start(self, name: str) -> None:
        """Process facts on a thread of its own until `stop`. Raises NoThread."""
        thread = threading.Thread(target=self._run, name=f"llama-pool-{name}", daemon=True)
        threads.start(thread)
        self._thread = thread

    def stop(self) -> None:
        """End the thread, and refuse the calls that are still open."""
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()
        self._end()

    def _end(self) -> None:
        self.has_ended = True
        self._refuse_calls()
        self._end_waits()
        self._slots.rest()
        self._ended()

    def _end_waits(self) -> None:
        """Let go who waits for facts that nobody processes any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                if isinstance(left := self._inbox.get_nowait(), threading.Event):
                    left.set()

    def _refuse_calls(self) -> None:
        problem = Problem("shutting_down", "the pool has been closed")
        for ticket in tuple(self._calls):
            self._answer(ticket, problem)

    def _run(self) -> None:
        is_dropped = False
        while not (is_dropped and self.is_empty.is_set()):
            due, now = self._timer_at, self.clock()
            if due is not None and now >= due:
                self._timer_at = None
                self.pump(facts.Looked(now))
                continue
            try:
                fact = self._inbox.get(timeout=None if due is None else due - now)
            except queue.Empty:
                continue
            if fact is None:
                return
            if isinstance(fact, threading.Event):
                fact.set()
                continue
            if isinstance(fact, _Drop):
                is_dropped, fact = True, facts.ShutdownRequested(self.clock())
            self.pump(fact)
        self._end()

    def pump(self, fact: Fact) -> None:
        """Process one fact."""
        try:
            if isinstance(fact, facts.Looked):
                self._is_looking = False
            self._step(fact)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (this thread must survive)
            _log("exception", "pool.failed", trigger=fact.trigger)
            if (ticket := getattr(fact, "ticket", None)) is not None:
                self._answer(ticket, problem_of(error))

    def _step(self, fact: Fact) -> None:
        self._entered = {}
        try:
            fact = self._enter(fact)
            made, uses = self._decide(fact)
            self._is_at_once = isinstance(fact, facts.Wanted)
            for command in made:
                self._carry_out_safely(command)
        finally:
            for lease in self._entered.values():  # the machine has not granted them
                lease.gate.leave(lease.who)
        if isinstance(fact, facts.BecameHealthy | facts.Emptied) and not any(
            self.ctx.waiters_of(fact.name)
        ):
            self._evicted.pop(fact.name, None)
        if self.ctx.is_shutting_down and all(
            entry.state in (State.ABSENT, State.STUCK) for entry in self.ctx.entries
        ):
            self.is_empty.set()
        self._look_if_missed(uses)

    def _look_if_missed(self, before: Uses) -> None:
        """Who left a gate during this step has not seen who waits since it."""
        if not self.ctx.waiting:
            return
        were_inside = {use.name for use in before if use.is_inside}
        for use in uses_of(self.ctx, self._slots.gate):
            gate = self._slots.gate(use.name)
            has_emptied = not use.is_inside and use.name in were_inside
            if gate is not None and (has_emptied or self._may_admit(use.name, gate)):
                self._look()
                return

    def _decide(self, fact: Fact) -> tuple[tuple[Command, ...], Uses]:
        """Step, anew if somebody has entered a gate that was to be closed because it was idle.

        Returns:
            What is to be done, and the evidence that it was decided by.
        """
        for attempt in range(1, _MAX_STEPS + 1):
            uses = uses_of(self.ctx, self._slots.gate)
            stepped = self._machine.step(self.ctx, replace(cast("Any", fact), uses=uses))
            if self._hold(stepped.commands, must=attempt == _MAX_STEPS):
                break
        self.ctx = stepped.ctx
        return stepped.commands, uses

    def _enter(self, fact: Fact) -> Fact:
        """Let into the gates whoever this step may grant; return the fact with that evidence."""
        match fact:
            case facts.Wanted():
                return replace(fact, has_entered=self._let_in(fact))
            case facts.BecameHealthy() | facts.Adopted():
                leases = [one for one in self.ctx.waiters_of(fact.name) if one.kind == "lease"]
                tickets = [one.ticket for one in leases if one.ticket is not None]
                gate = self._slots.gate(fact.name)
                has_entered = gate is not None and gate.is_open
                has_entered = has_entered and all(self._enters(fact.name, one) for one in tickets)
                admitted = self._admit(fact.name) if has_entered else ()
                return replace(fact, has_entered=has_entered, admitted=admitted)
            case facts.Looked():
                names = dict.fromkeys(one.name for one in self.ctx.waiting if one.kind == "request")
                return replace(fact, admitted=tuple(chain(*map(self._admit, names))))
        return fact

    def _let_in(self, fact: facts.Wanted) -> bool:
        entry = self.ctx.find(fact.name)
        if entry is None or entry.state is not State.RESIDENT or entry.is_changed or fact.is_forced:
            return False
        is_request = fact.kind == "request"
        if is_request and any(_requests(self.ctx, fact.name)):
            return False  # those come first
        return self._enters(fact.name, fact.ticket, is_request=is_request)

    def _admit(self, name: str) -> tuple[Ticket, ...]:
        """Give the free places of a server that is open to the requests whose turn it is."""
        entry, admitted = self.ctx.find(name), []
        for one in in_turn(_requests(self.ctx, name), entry.turns if entry is not None else ()):
            if one.ticket is None or not self._enters(name, one.ticket, is_request=True):
                break
            admitted.append(one.ticket)
        return tuple(admitted)

    def _enters(self, name: str, ticket: Ticket, *, is_request: bool = False) -> bool:
        """Try the gate; who has entered and is not granted in this step leaves at its end."""
        if (gate := self._slots.gate(name)) is None:
            return False
        who = ("pool", ticket)
        server = gate.admit(who) if is_request else gate.enter(who)
        if server is not None:
            self._entered[ticket] = Lease(name, gate, who, server)
        return server is not None

    def _hold(self, made: Sequence[Command], *, must: bool) -> bool:
        """Close the gates of those that go because nobody uses them; whether that is still so."""
        held: list[Gate] = []
        for command in made:
            if not (isinstance(command, commands.Stop) and command.if_idle):
                continue
            if (gate := self._slots.gate(command.name)) is None:
                continue
            if not gate.hold(if_empty=not must):
                for closed in held:
                    closed.release()
                return False
            held.append(gate)
        return True

    # -------------------------------------------------------------------------------- commands

    def _carry_out_safely(self, command: Command) -> None:
        try:
            self._carry_out(command)
        except Exception:  # noqa: BLE001 (the step has been taken: those behind it follow)
            _log("exception", "command.failed", command=type(command).__name__)

    def _carry_out(self, command: Command) -> None:
        match command:
            case commands.Start() | commands.Stop():
                self._order(command)
            case commands.Grant(ticket, name):
                self._grant(ticket, name)
            case commands.Refuse(ticket, _, problem):
                self._answer(ticket, problem)
            case commands.AnswerEmptied(ticket):
                self._answer(ticket, None)
            case commands.AnswerCancelled(ticket, is_cancelled):
                self._answer(ticket, is_cancelled)
            case commands.GiveUp(name, kind, problem):
                _log("warning", "model.given_up", model=name, kind=kind, error=problem.message)
            case commands.Measure():
                self._slots.measure(command)
            case commands.SetTimer(at):
                self._timer_at = at
            case commands.DropStale(name, trigger):
                _log("info", "report.fenced", model=name, trigger=trigger)

    def _order(self, command: commands.Start | commands.Stop) -> None:
        name, generation = command.name, command.generation
        if isinstance(command, commands.Start):
            reserved = str(command.reserved)
            _log("info", "model.starting", model=name, generation=generation, reserved=reserved)
            self._slots.start(self._limited(command))
            return
        reason = command.reason
        if reason in EVICTIONS:
            self.evictions[reason] = self.evictions.get(reason, 0) + 1
        if command.room_for is not None:
            self._evicted.setdefault(command.room_for, []).append(name)
        _log("info", "model.stopping", model=name, generation=generation, reason=reason)
        self._slots.stop(command)

    def _limited(self, command: commands.Start) -> commands.Start:
        """Give a start the stall timeout of the first load that has one; who joins shares it."""
        given = (hand.stall_timeout_s for _, hand in self._loads(command.name))
        limit_s = next((one for one in given if one is not None), None)
        if limit_s is None or command.request is None:
            return command
        return replace(command, request=replace(command.request, stall_timeout_s=limit_s))

    def _grant(self, ticket: Ticket, name: str) -> None:
        """Answer with the lease; who asked for a load leaves at once."""
        lease, call = self._entered.pop(ticket, None), self._calls.get(ticket)
        evicted = () if self._is_at_once else tuple(self._evicted.get(name, ()))
        is_kept = lease is not None and call is not None and call.kind != "load"
        granted = Granted(lease if is_kept else None, evicted, self._is_at_once)
        is_kept = self._answer(ticket, granted) and is_kept
        if lease is not None and not is_kept:
            lease.gate.leave(lease.who)

    def _answer(self, ticket: Ticket, answer: object) -> bool:
        """Answer a call, and return whether there is a caller: it may have gone away."""
        call = self._calls.pop(ticket, None)
        return call is not None and resolve(call.settled, answer)


def _requests(ctx: Context, name: str) -> Iterator[Waiter]:
    return (waiter for waiter in ctx.waiters_of(name) if waiter.kind == "request")


def uses_of(ctx: Context, gate_of: Callable[[str], Gate | None]) -> Uses:
    """Return how the gates of the residents are used, those that are open."""
    found = []
    for entry in ctx.entries:
        gate = gate_of(entry.name) if entry.state is State.RESIDENT else None
        if gate is not None:
            used_at = gate.used_at
            found.append(Use(entry.name, used_at is None, used_at))
    return tuple(found)
