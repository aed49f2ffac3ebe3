"""The owner: one thread, one inbox, and the only place that steps the machine.

`pump` processes one fact: it adds the evidence that only the operating system has, steps the
machine, publishes a new snapshot and carries out the commands. The owner's thread calls it in
production, and tests call it by hand. Every call is answered exactly once.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from orchestrator.base import threads
from orchestrator.base.log import event_log
from orchestrator.base.tokens import CancelToken, Generation, Ticket
from orchestrator.errors import Problem, problem_of
from orchestrator.machine import commands, facts
from orchestrator.machine.commands import Answer, Command, Effect, Settle
from orchestrator.machine.context import Context, Policy
from orchestrator.machine.facts import Child, Fact, Request, SlotEvidence, Timer
from orchestrator.machine.guards import is_current
from orchestrator.machine.states import State
from orchestrator.machine.step import Lifecycle, lifecycle
from orchestrator.runtime.answers import LeasedServer, leased_server
from orchestrator.runtime.events import EventLog
from orchestrator.runtime.gate import Gate
from orchestrator.runtime.ports import Clock, Effects, SlotLock
from orchestrator.runtime.snapshot import Observer, Snapshot, StepReport, ended_load

_MAX_STORY: Final = 32
_MAX_HISTORY: Final = 256
_ADOPTED_S: Final = 1.0  # of a server that is still loading, a start does not wait for more
_EMPTY_S: Final = 10.0
_log = event_log("orchestrator.owner")


@dataclass(slots=True, eq=False)
class Call:
    """One call, from any thread.

    Attributes:
        accepted: For a load: its generation, or the problem if it is refused.
        settled: The answer, which may be a `Problem`. Cancelling it withdraws the caller.
    """

    ticket: Ticket
    accepted: Future[Generation | Problem] = field(default_factory=Future)
    settled: Future[Answer] = field(default_factory=Future)
    gate: Gate | None = None  # that it may have entered

    def leave(self) -> None:
        """Give up a lease, whether or not it has been granted yet."""
        self.settled.cancel()
        if self.gate is not None:
            self.gate.leave(self.ticket)

    @contextlib.contextmanager
    def withdrawn_on_error(self) -> Iterator[None]:
        """Withdraw the caller if the body raises, as at Ctrl-C or a cancelled `await`."""
        try:
            yield
        except BaseException:
            self.settled.cancel()
            raise


class _Drop:
    """Put into the inbox when the facade is gone."""


class Owner:
    """Steps one machine over one set of effects.

    Args:
        effects: Makes the effects, given the function to which they post their facts.
        observers: Called after every step, on the owner's thread.
        tickets: Numbers for calls that are opened without a ticket.
        jitter: Factor of the wait before a restart, 0.5 to 1.
        before: The owner of the same orchestrator's last life: its numbers go on, and its history.
    """

    def __init__(
        self,
        effects: Callable[[Callable[[Fact], None]], Effects],
        *,
        policy: Policy | None = None,
        clock: Clock = time.monotonic,
        machine: Lifecycle | None = None,
        observers: Sequence[Observer] = (),
        tickets: Iterator[int] | None = None,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.0),  # noqa: S311
        before: Owner | None = None,
    ) -> None:
        self.clock = clock
        self.events: EventLog = EventLog(before.events.last_id if before else 0)
        self.has_ended: bool = False
        self._is_dropped = False
        ctx = Context(policy or Policy())
        history = before.snapshot.history if before else ()
        if before is not None:
            ended = before.snapshot.ctx
            ctx = replace(ctx, generation=ended.generation, last_prefetch=ended.last_prefetch)
        self.snapshot: Snapshot = Snapshot(State.IDLE, ctx, time.time(), clock(), (), history)
        self._jitter = jitter
        self._machine = machine or lifecycle()
        self._observers = observers
        self._inbox: queue.SimpleQueue[Fact | _Drop | None] = queue.SimpleQueue()
        self._tickets = tickets or itertools.count(1)
        self._at_once: deque[Fact] = deque()  # what a step has found out itself
        self._calls: dict[Ticket, Call] = {}
        self._tokens: dict[Generation, CancelToken] = {}
        self._timers: dict[tuple[Timer, Generation], float] = {}  # too few to sort
        self._thread: threading.Thread | None = None
        self.gate: Gate = self._make_gate(None)
        self.effects: Effects = effects(self.post)

    # ---------------------------------------------------------------------------- from any thread

    def call(self, ticket: Ticket | None = None) -> Call:
        """Open a call. Its ticket is its place in the order of calls."""
        call = Call(Ticket(next(self._tickets)) if ticket is None else ticket)
        self._calls[call.ticket] = call
        call.settled.add_done_callback(lambda _: self._withdraw(call))
        return call

    def ask(self, call: Call, fact: Request) -> None:
        """Post the request of a call."""
        self.post(fact)
        self._withdraw(call)  # again: the machine did not know a caller that left before this

    def post(self, fact: Fact) -> None:
        """Put a fact into the inbox. After the end, refuse the calls that are still open."""
        self._inbox.put(fact)
        if self.has_ended:
            self._refuse_calls()

    def _withdraw(self, call: Call) -> None:
        """Report a caller that has gone away to the machine."""
        if call.settled.cancelled():
            self._calls.pop(call.ticket, None)
            self.post(facts.Withdrawn(call.ticket, self.clock()))

    def _post_drained(self, generation: Generation) -> None:
        self.post(facts.Drained(generation, self.clock()))

    # ------------------------------------------------------------------------ the owner's thread

    def start(self, name: str) -> None:
        """Process facts on a thread of its own until `stop`. Raises NoThread.

        If the effects have found something in the slot, this waits for what becomes of it: a
        second, or until the slot is empty.
        """
        has_found = not self._inbox.empty()
        thread = threading.Thread(target=self._run, name=f"llama-owner-{name}", daemon=True)
        threads.start(thread)
        self._thread = thread
        if has_found:
            self._until_at_rest()

    def _until_at_rest(self) -> None:
        ends, changed = self.clock() + _EMPTY_S, threading.Event()
        adopted_by = self.clock() + _ADOPTED_S
        stop = self.events.subscribe(changed.set)
        try:
            while not self._is_settled:
                is_empty = self.snapshot.state is State.KILLING
                if not changed.wait(max(0.0, (ends if is_empty else adopted_by) - self.clock())):
                    break
                changed.clear()
        finally:
            stop()

    @property
    def _is_settled(self) -> bool:
        """What was found is adopted or gone."""
        state, gate = self.snapshot.state, self.gate
        is_adopted = state is State.HEALTHY and gate.is_open
        return is_adopted or (state is State.IDLE and bool(self.snapshot.story))

    def stop(self) -> None:
        """End the thread and the effects, after the machine has been shut down."""
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()
        if not self._is_dropped:
            self._end()

    def drop(self) -> None:
        """Shut down and stop without anybody who waits for it. A finalizer may call this at any
        point of any thread, as it only puts into a queue.
        """
        self._inbox.put(_Drop())

    def _end(self) -> None:
        try:
            self.effects.close(keep=self.snapshot.state is State.HEALTHY)
        finally:
            self.has_ended = True
            self._refuse_calls()
            self.events.close()

    def _refuse_calls(self) -> None:
        problem = Problem("shutting_down", "the orchestrator has been closed")
        for ticket in tuple(self._calls):
            self._settle(Settle(ticket, problem))

    def _run(self) -> None:
        while True:
            if self._at_once:
                self.pump(self._at_once.popleft())
                continue
            if (due := self._due_timer()) is not None:
                self.pump(due)
                continue
            try:
                fact = self._inbox.get(timeout=self._until_next_timer())
            except queue.Empty:
                continue
            if fact is None:
                break
            if isinstance(fact, _Drop):
                self._is_dropped, call = True, self.call()
                call.settled.add_done_callback(lambda _: self._inbox.put(None))
                fact = facts.ShutdownRequested(call.ticket, self.clock())
            self.pump(fact)
        if self._is_dropped:
            self._end()

    def pump(self, fact: Fact) -> None:
        """Process one fact: evidence, step, snapshot, commands."""
        lock: SlotLock | None = None
        try:
            fact, lock = self._with_evidence(fact)
            before = self.snapshot
            state, ctx, commanded = self._machine.step(before.state, before.ctx, fact)
            concluded = [c for c in commanded if isinstance(c, commands.Concluded)]
            after = self.snapshot = self._next_snapshot(fact, state, ctx, concluded)
            if state is not before.state:
                self._report_transition(fact, before, after)
            if concluded:
                self.events.wake()
            self._call_observers(StepReport(fact, before, after, commanded))
            for command in commanded:
                self._carry_out_safely(command, lock)
            if state is State.HEALTHY is not before.state:
                self.events.wake()  # a start waits for the gate
        except (Exception, SystemExit) as error:  # noqa: BLE001 (this thread must survive)
            _log("exception", "owner.failed", trigger=getattr(fact, "trigger", type(fact).__name__))
            if (ticket := getattr(fact, "ticket", None)) is not None:
                self._settle(Settle(ticket, problem_of(error)))
        finally:
            if lock is not None:
                lock.release()
            if getattr(fact, "idle_in_s", None) == 0.0 and self.snapshot.ctx.gate == "open":
                self.gate.reopen()

    def _with_evidence(self, fact: Fact) -> tuple[Fact, SlotLock | None]:
        """Ask the operating system in the same step that uses the answer."""
        if isinstance(fact, facts.Fetched) and is_current(self.snapshot.ctx, fact):
            evidence, lock = self._take_slot()
            return replace(fact, slot=evidence), lock
        if hasattr(fact, "child_is_alive"):
            is_alive = self._of_child(self.effects.child_is_alive)
            return replace(cast("Any", fact), child_is_alive=is_alive), None
        if isinstance(fact, facts.TimerFired) and fact.kind == "idle":
            return replace(fact, idle_in_s=self._idle_in_s(fact.generation)), None
        if isinstance(fact, facts.ShutdownRequested):
            return replace(fact, can_be_kept=self._of_child(self.effects.can_be_kept)), None
        return fact, None

    def _take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        try:
            return self.effects.take_slot()
        except Exception as error:  # noqa: BLE001 (without an answer the load would wait for ever)
            _log("exception", "slot.not_answering")
            return SlotEvidence(is_empty=False, reason=f"it cannot be checked: {error}"), None

    def _of_child(self, holds: Callable[[Child], bool]) -> bool:
        child = self.snapshot.ctx.child
        try:
            return child is not None and holds(child)
        except Exception:  # noqa: BLE001 (as above)
            _log("exception", "child.not_answering", pid=child.pid if child else None)
            return False

    def _idle_in_s(self, generation: Generation) -> float | None:
        running = self.snapshot.ctx.running
        if running is None or running.generation != generation or running.idle_ttl_s is None:
            return None
        return self.gate.close_if_idle(running.idle_ttl_s, running.wanted_at)

    def _next_snapshot(
        self, fact: Fact, state: State, ctx: Context, concluded: Sequence[commands.Concluded]
    ) -> Snapshot:
        before, story = self.snapshot, self.snapshot.story
        since, entered_at = before.since, before.entered_at
        if state is not before.state:
            since, entered_at = time.time(), self.clock()
            line = f"{before.state} -> {state} on {fact.trigger} (generation {_generation(ctx)})"
            story = (*story, line)[-_MAX_STORY:]
        history = before.history
        if concluded:
            ended = (ended_load(load, self.clock(), story) for load in concluded)
            history = (*history, *ended)[-_MAX_HISTORY:]
        return Snapshot(state, ctx, since, entered_at, story, history)

    def _report_transition(self, fact: Fact, before: Snapshot, after: Snapshot) -> None:
        """Append one event and log one line."""
        load = after.ctx.job or after.ctx.running
        data = transition(fact, before, after)
        self.events.append("transition", data)
        _log(
            "info",
            "lifecycle.transitioned",
            source=data["source"],
            dest=data["dest"],
            trigger=fact.trigger,
            generation=data["generation"],
            model=load.target.request.model_path if load else None,
            pid=data["pid"],
            after_ms=round((after.entered_at - before.entered_at) * 1000, 3),
        )

    def _call_observers(self, report: StepReport) -> None:
        for observer in tuple(self._observers):
            try:
                observer(report)
            except (Exception, SystemExit):  # noqa: BLE001 (code of the host)
                _log("exception", "observer.failed", trigger=report.fact.trigger)

    # -------------------------------------------------------------------------------- commands

    def _carry_out_safely(self, command: Command, lock: SlotLock | None) -> None:
        """A command that fails must not prevent those behind it: the step has been taken."""
        try:
            self._carry_out(command, lock)
        except Exception:  # noqa: BLE001 (as above)
            _log("exception", "command.failed", command=type(command).__name__)

    def _carry_out(self, command: Command, lock: SlotLock | None) -> None:
        """Do what a command says; `Concluded` and `ServerEnded` are for history and observers."""
        if isinstance(command, Effect):
            self._start(command, lock)
            return
        match command:
            case commands.SetToken():
                self._token(command.generation).set(command.reason)
            case commands.SetTimer() | commands.StopTimer():
                self._time(command)
            case commands.LookUp() | commands.Warm():
                self._read(command)
            case commands.OpenGate() | commands.CloseGate():
                self._turn_gate(command)
            case commands.Accept():
                self._accept(command)
            case Settle():
                self._settle(command)
            case commands.Post(fact):
                self.post(fact)
            case commands.DropStale(generation, trigger):
                _log("info", "completion.fenced", trigger=trigger, generation=generation)

    def _start(self, effect: Effect, lock: SlotLock | None) -> None:
        try:
            self.effects.start(effect, self._token(effect.generation), lock)
        except Exception as error:  # noqa: BLE001 (an effect that cannot start has failed)
            _log("exception", "effect.failed", effect=type(effect).__name__)
            self.post(commands.failure_of(effect, problem_of(error), self.clock()))

    def _read(self, command: commands.LookUp | commands.Warm) -> None:
        if isinstance(command, commands.Warm):
            self.effects.warm(command, self._token(command.generation))
            return
        try:
            self.effects.look_up(command)
        except Exception as error:  # noqa: BLE001 (as when no thread can be started)
            _log("exception", "look_up.failed")
            self.post(facts.LookUpFailed(command.ticket, problem_of(error), self.clock()))

    def _turn_gate(self, command: commands.OpenGate | commands.CloseGate) -> None:
        if isinstance(command, commands.OpenGate):
            gate = self._make_gate(leased_server(command.lease))
            gate.places = command.lease.server.total_slots
            self.gate = gate
        elif self.gate.close(drains=command.drains) and command.drains:
            self._at_once.append(facts.Drained(command.generation, self.clock()))

    def _make_gate(self, server: LeasedServer | None) -> Gate:
        return Gate(server, self.clock, self._post_drained)

    def _token(self, generation: Generation) -> CancelToken:
        return self._tokens.setdefault(generation, CancelToken(generation))

    def _accept(self, command: commands.Accept) -> None:
        self._token(command.generation)
        ctx = self.snapshot.ctx
        loads = (ctx.job, *ctx.queue, *ctx.prefetches, ctx.effect)  # an effect may outlive its load
        in_use = {load.generation for load in loads if load} | {ctx.generation}
        for ended in self._tokens.keys() - in_use:
            del self._tokens[ended]
        ticket, generation, joined = command.ticket, command.generation, command.joined
        if (call := self._calls.get(ticket)) is not None:
            resolve(call.accepted, generation)
        running = ctx.running
        if running is not None and running.generation == generation:
            _log("debug", "load.already_loaded", generation=generation, ticket=ticket)
        else:
            _log("info", "load.accepted", generation=generation, ticket=ticket, joined=joined)

    def _settle(self, command: Settle) -> None:
        call, answer = self._calls.pop(command.ticket, None), command.answer
        if call is None:
            return
        if isinstance(answer, Problem):
            answer = replace(answer, story=self.snapshot.story)
            if not call.accepted.done():
                resolve(call.accepted, answer)
        if isinstance(answer, commands.LeaseGranted):
            call.gate = self.gate  # first: who leaves looks at it last
            self.gate.enter(call.ticket)
        if not resolve(call.settled, answer):
            call.leave()

    # ------------------------------------------------------------------------------------- timers

    def _time(self, command: commands.SetTimer | commands.StopTimer) -> None:
        key = command.kind, command.generation
        if isinstance(command, commands.StopTimer):
            self._timers.pop(key, None)
        else:
            factor = self._jitter() if command.kind == "restart" else 1.0
            self._timers[key] = self.clock() + command.after_s * factor

    def _until_next_timer(self) -> float | None:
        return max(0.0, min(self._timers.values()) - self.clock()) if self._timers else None

    def _due_timer(self) -> Fact | None:
        first = min(self._timers, key=self._timers.__getitem__, default=None)
        if first is None or self._timers[first] > self.clock():
            return None
        kind, generation = first
        return facts.TimerFired(generation, self._timers.pop(first), kind)


def transition(fact: Fact, before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """Return the data of the event of a transition."""
    child = after.ctx.child
    return {
        "source": before.state.value,
        "dest": after.state.value,
        "trigger": fact.trigger,
        "generation": _generation(after.ctx),
        "at": after.since,
        "pid": child.pid if child else None,
    }


def _generation(ctx: Context) -> Generation:
    """Return the load that a transition belongs to: the one in flight, else the last one."""
    return ctx.job.generation if ctx.job else ctx.generation


def resolve(future: Future[Any], value: object) -> bool:
    """Set a result, and return whether there is a caller: it may have gone away."""
    try:
        future.set_result(value)
    except InvalidStateError:
        if not future.cancelled():
            raise
        return False
    return True
