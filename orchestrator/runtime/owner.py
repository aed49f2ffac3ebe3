"""The owner: one thread, one inbox, and the only place that steps the machine.

`pump` processes one fact: it adds the evidence only the operating system has, steps, carries out
the commands and publishes a new snapshot. Production calls it from the owner's thread, tests call
it by hand. Every call is answered exactly once; nothing a caller reads can gate a change.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from orchestrator.base.log import event_log
from orchestrator.base.tokens import CancelToken, Generation, Ticket
from orchestrator.errors import OrchestratorError, Problem
from orchestrator.machine.commands import (
    Accept,
    Answer,
    Command,
    Concluded,
    Download,
    DropStale,
    Effect,
    Kill,
    Post,
    Probe,
    Resolve,
    ServerEnded,
    SetTimer,
    Settle,
    SetToken,
    Spawn,
    failure_of,
)
from orchestrator.machine.context import Context, Policy
from orchestrator.machine.facts import (
    BecameReady,
    Fact,
    Fetched,
    LeaseRequested,
    LoadRequested,
    Promoted,
    Request,
    SlotEvidence,
    Timer,
    TimerFired,
    Withdrawn,
)
from orchestrator.machine.guards import is_current
from orchestrator.machine.states import State
from orchestrator.machine.step import Lifecycle, lifecycle
from orchestrator.runtime.events import EventLog
from orchestrator.runtime.history import History
from orchestrator.runtime.ports import Clock, Effects, SlotLock
from orchestrator.runtime.snapshot import Observer, Snapshot, StepReport

_T = TypeVar("_T")

_STORY_LINES: Final = 32
_log = event_log("orchestrator.owner")


@dataclass(slots=True, eq=False)
class Call:
    """One call on the orchestrator, from any thread.

    Attributes:
        accepted: For a load: its generation, as soon as there is one, or why there is none.
        settled: The answer; a `Problem` is an answer too. Cancelling it withdraws the caller.
    """

    ticket: Ticket
    accepted: Future[Generation | Problem] = field(default_factory=Future)
    settled: Future[Answer] = field(default_factory=Future)


class Owner:
    """Steps one machine over one set of effects.

    Args:
        effects: What the commands are carried out by.
        policy: Fixed decisions of the embedding backend.
        clock: Monotonic seconds; tests use a virtual one.
        machine: The interpreter of the table.
        observers: Told of every step, on the owner's thread; they must be quick.
        tickets: Numbers the calls; a facade whose calls begin before the owner does has its own.
        jitter: Which part of the wait for a restart is waited, 0.5 to 1.
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
    ) -> None:
        self.clock = clock
        self._jitter = jitter
        self.events: EventLog = EventLog()
        self._machine = machine or lifecycle()
        self._observers = observers
        self._inbox: queue.SimpleQueue[Fact | None] = queue.SimpleQueue()
        self._tickets = tickets or itertools.count(1)
        self._calls: dict[Ticket, Call] = {}
        self._tokens: dict[Generation, CancelToken] = {}
        self._timers: dict[tuple[Timer, Generation], float] = {}  # few: the least is looked for
        self.history: History = History()
        self.has_ended: bool = False
        now = clock()
        self.snapshot: Snapshot = Snapshot(
            State.IDLE, Context(policy or Policy()), time.time(), now
        )
        self.effects: Effects = effects(self.post)
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------------------- from any thread

    def call(self, ticket: Ticket | None = None) -> Call:
        """Open a call; its ticket, taken now if not before, is its place in the order of calls."""
        call = Call(Ticket(next(self._tickets)) if ticket is None else ticket)
        self._calls[call.ticket] = call
        call.settled.add_done_callback(
            lambda done: self._withdraw(call) if done.cancelled() else None
        )
        return call

    def ask(self, call: Call, fact: Request) -> None:
        """Post a call's request. A caller that left before it got here has not left unnoticed."""
        self.post(fact)
        self._withdraw(call)

    def answer(self, call: Call, answer: Answer) -> None:
        """Answer a call that never became a request."""
        self._settle(Settle(call.ticket, answer))

    def post(self, fact: Fact) -> None:
        """Put a fact into the inbox. After the end, whoever posts also answers what is there."""
        self._inbox.put(fact)
        if self.has_ended:
            self._refuse_rest()

    def _withdraw(self, call: Call) -> None:
        """Tell the machine that the caller has gone, if it has."""
        if call.settled.cancelled():
            self._calls.pop(call.ticket, None)
            self.post(Withdrawn(call.ticket, self.clock()))

    # ------------------------------------------------------------------------ the owner's thread

    def start(self, name: str) -> None:
        """Let a thread of our own pump until `stop`."""
        self._thread = threading.Thread(target=self._run, name=f"llama-owner-{name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and the effects; the machine has been shut down before."""
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()
        try:
            self.effects.close()
        finally:
            self.has_ended = True
            self._refuse_rest()
            self.events.close()

    def _refuse_rest(self) -> None:
        """Nobody pumps any more: answer every call that was not answered in time."""
        problem = Problem("shutting_down", "the orchestrator has been closed")
        for ticket in tuple(self._calls):
            self._settle(Settle(ticket, problem))

    def _run(self) -> None:
        while True:
            if (due := self._due_timer()) is not None:
                self.pump(due)
                continue
            try:
                fact = self._inbox.get(timeout=self._until_next_timer())
            except queue.Empty:
                continue
            if fact is None:
                return
            self.pump(fact)

    def pump(self, fact: Fact) -> None:
        """Process one fact, whole: evidence, step, commands, snapshot."""
        lock: SlotLock | None = None
        try:
            fact, lock = self._with_evidence(fact)
            before = self.snapshot
            state, ctx, commands = self._machine.step(before.state, before.ctx, fact)
            shown = self._shown(fact, state, ctx)
            concluded = [c for c in commands if isinstance(c, Concluded)]
            for ended in concluded:
                self.history.add(ended, now=self.clock(), story=shown.story)
            self.snapshot = shown
            if state is not before.state:
                self._tell(fact, before, shown)
            if concluded:
                self.events.wake()
            self._observe(StepReport(fact, before, shown, commands))
            for command in commands:
                self._carry_out_safely(command, lock)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (it outlives what it cannot digest)
            _log("exception", "owner.failed", trigger=getattr(fact, "trigger", type(fact).__name__))
            if (ticket := getattr(fact, "ticket", None)) is not None:
                problem = Problem("internal", f"{type(error).__name__}: {error}")
                self._settle(Settle(ticket, problem))
        finally:
            if lock is not None:
                lock.release()

    def _with_evidence(self, fact: Fact) -> tuple[Fact, SlotLock | None]:
        """Ask the operating system what only it knows, in the same step that uses the answer."""
        match fact:
            case Fetched() if is_current(self.snapshot.ctx, fact):
                evidence, lock = self._take_slot()
                return replace(fact, slot=evidence), lock
            case LoadRequested() | LeaseRequested() | BecameReady() | Promoted():
                return replace(fact, child_is_alive=self._child_is_alive()), None
            case _:
                return fact, None

    def _take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        """A slot that cannot be asked is not known to be empty."""
        try:
            return self.effects.take_slot()
        except Exception as error:  # noqa: BLE001 (an answer must follow: the load waits for it)
            _log("exception", "slot.not_answering")
            return SlotEvidence(is_empty=False, reason=f"it cannot be asked: {error}"), None

    def _child_is_alive(self) -> bool:
        """A child that cannot be asked for is not known to be alive."""
        child = self.snapshot.ctx.child
        try:
            return child is not None and self.effects.child_is_alive(child)
        except Exception:  # noqa: BLE001 (as above)
            _log("exception", "child.not_answering", pid=child.pid if child else None)
            return False

    def _shown(self, fact: Fact, state: State, ctx: Context) -> Snapshot:
        """Return the snapshot after a step."""
        before = self.snapshot
        if state is before.state:
            return replace(before, ctx=ctx)
        generation = _generation(ctx)
        line = f"{before.state} -> {state} on {fact.trigger} (generation {generation})"
        story = (*before.story, line)[-_STORY_LINES:]
        return Snapshot(state, ctx, time.time(), self.clock(), story)

    def _observe(self, report: StepReport) -> None:
        """Tell the observers; one that fails costs the others nothing."""
        for observer in tuple(self._observers):
            try:
                observer(report)
            except (Exception, SystemExit):  # noqa: BLE001 (somebody else's code on our thread)
                _log("exception", "observer.failed", trigger=report.fact.trigger)

    def _tell(self, fact: Fact, before: Snapshot, shown: Snapshot) -> None:
        """One event and one line of the log for each transition."""
        ctx = shown.ctx
        generation, pid = _generation(ctx), ctx.child.pid if ctx.child else None
        self.events.append(
            "transition",
            {
                "source": before.state.value,
                "dest": shown.state.value,
                "trigger": fact.trigger,
                "generation": generation,
                "at": shown.since,
                "pid": pid,
            },
        )
        target = ctx.job.target if ctx.job else ctx.running.target if ctx.running else None
        _log(
            "info",
            "lifecycle.transitioned",
            source=before.state.value,
            dest=shown.state.value,
            trigger=fact.trigger,
            generation=generation,
            model=target.request.model_path if target else None,
            pid=pid,
            after_ms=round((shown.entered_at - before.entered_at) * 1000, 3),
        )

    def _carry_out_safely(self, command: Command, lock: SlotLock | None) -> None:
        """One command that cannot be carried out must not cost the step the ones behind it."""
        try:
            self._carry_out(command, lock)
        except Exception:  # noqa: BLE001 (the machine has taken the step already)
            _log("exception", "command.failed", command=type(command).__name__)

    def _carry_out(self, command: Command, lock: SlotLock | None) -> None:
        match command:
            case Kill() | Resolve() | Download() | Spawn() | Probe():
                self._start(command, lock)
            case SetToken():
                self._token(command.generation).set(command.reason)
            case SetTimer():
                after_s = command.after_s
                if command.kind == "restart":
                    after_s *= self._jitter()
                self._timers[command.kind, command.generation] = self.clock() + after_s
            case Accept():
                self._accept(command)
            case Settle():
                self._settle(command)
            case Post():
                self.post(command.fact)
            case Concluded() | ServerEnded():
                pass  # said to the history and to who counts, before the snapshot was shown
            case DropStale():
                trigger, generation = command.trigger, command.generation
                _log("info", "completion.fenced", trigger=trigger, generation=generation)

    def _start(self, effect: Effect, lock: SlotLock | None) -> None:
        try:
            self.effects.start(effect, self._token(effect.generation), lock)
        except Exception as error:  # noqa: BLE001 (an effect that cannot begin has failed)
            _log("exception", "effect.failed", effect=type(effect).__name__)
            problem = Problem("internal", repr(error))
            if isinstance(error, OrchestratorError):
                problem = error.problem
            self.post(failure_of(effect, problem, self.clock()))

    def _token(self, generation: Generation) -> CancelToken:
        return self._tokens.setdefault(generation, CancelToken(generation))

    def _accept(self, command: Accept) -> None:
        self._token(command.generation)
        ctx = self.snapshot.ctx
        loads = (ctx.job, *ctx.queue, *ctx.prefetches, ctx.effect)  # an effect may outlive its load
        in_use = {load.generation for load in loads if load} | {ctx.generation}
        for ended in self._tokens.keys() - in_use:
            del self._tokens[ended]
        call = self._calls.get(command.ticket)
        if call is not None:
            _resolve(call.accepted, command.generation)
        _log(
            "info",
            "load.accepted",
            generation=command.generation,
            ticket=command.ticket,
            joined=command.joined,
        )

    def _settle(self, command: Settle) -> None:
        answer = command.answer
        if isinstance(answer, Problem):
            answer = replace(answer, story=self.snapshot.story)
        call = self._calls.pop(command.ticket, None)
        if call is not None:
            if isinstance(answer, Problem) and not call.accepted.done():
                _resolve(call.accepted, answer)
            _resolve(call.settled, answer)

    # ------------------------------------------------------------------------------------- timers

    def _until_next_timer(self) -> float | None:
        return max(0.0, min(self._timers.values()) - self.clock()) if self._timers else None

    def _due_timer(self) -> Fact | None:
        if not self._timers:
            return None
        (kind, generation), due = min(self._timers.items(), key=lambda timer: timer[1])
        if due > self.clock():
            return None
        del self._timers[kind, generation]
        return TimerFired(generation, due, kind)


def _generation(ctx: Context) -> Generation:
    """The load a transition is about: the one in flight, else the last one."""
    return ctx.job.generation if ctx.job else ctx.generation


def _resolve(future: Future[_T], value: _T) -> None:
    """Set a result; a caller that has gone meanwhile does not want it."""
    try:
        future.set_result(value)
    except InvalidStateError:
        if not future.cancelled():
            raise
