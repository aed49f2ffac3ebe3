"""One slot of a pool: an orchestrator of its own, told what to do, and heard.

What may block runs on worker threads, one thing at a time and in order. At rest a slot has neither
process nor thread. Its reports carry the generation of the pool's `Start` that they are about.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, Literal

from orchestrator.base.log import event_log
from orchestrator.base.threads import NoThread
from orchestrator.base.tokens import Generation
from orchestrator.base.workers import Workers
from orchestrator.errors import Problem, problem_of
from orchestrator.machine import facts as slot_facts
from orchestrator.machine.commands import Loaded, Settle
from orchestrator.machine.states import State
from orchestrator.pool import facts
from orchestrator.pool.ledger import Amounts
from orchestrator.runtime.calls import Facade
from orchestrator.runtime.gate import Gate
from orchestrator.runtime.owner import Call
from orchestrator.runtime.ports import Clock
from orchestrator.runtime.snapshot import Snapshot, StepReport
from orchestrator.settings.memory import Memory
from orchestrator.settings.request import LoadRequest

_log = event_log("orchestrator.pool")
_AT_REST: Final = Generation(0)
_Work = tuple[Callable[[], None], Callable[[Problem], None]]
"""What is to be done, and what follows if it fails."""


class PoolSlot:
    """The slot of one entry.

    Args:
        facade: Its orchestrator, which nobody else gives orders.
        post: Gets the facts, on any thread.
    """

    def __init__(
        self,
        name: str,
        facade: Facade,
        post: Callable[[facts.Fact], None],
        workers: Workers,
        clock: Clock,
    ) -> None:
        self.name = name
        self.facade = facade
        self._post = post
        self._workers = workers
        self._clock = clock
        self._turn = threading.Lock()  # of the work that is left to do
        self._todo: deque[_Work] = deque()
        self._is_working = False
        self._generation = _AT_REST
        self._order: Literal["start", "stop", "close"] = "start"  # the last one of the pool
        self._problem: Problem | None = None  # why that load has failed
        self._call: Call | None = None  # the load of this generation, or what stands for it
        facade.observe(self._observe)

    @property
    def gate(self) -> Gate | None:
        return self.facade.gate

    def adopt(self, generation: Generation, ended: Callable[[bool], None]) -> None:
        """Look for what a dead owner has left here, and say whether it goes on."""
        self._order = "start"

        def run() -> None:
            found = self.facade.begin()
            running = found.ctx.running
            if found.state is not State.HEALTHY or running is None:
                self.facade.give_back(keep=False)
                ended(False)
                return
            self._generation = generation
            self._call = self.facade.open_call()  # it has no load of ours
            held = running.memory.devices if running.memory is not None else {}
            self._post(facts.Adopted(self.name, generation, Amounts.of(held), self._clock()))
            ended(True)

        def failed(problem: Problem) -> None:
            _log("error", "slot.not_adopted", model=self.name, error=problem.message)
            ended(False)

        self._do(run, failed)

    def start(self, generation: Generation, request: LoadRequest) -> None:
        """Load a model; reports follow, and in the end `Emptied`, unless it gets stuck."""
        self._order = "start"

        def run() -> None:
            self._generation, self._problem = generation, None
            call = self._call = self.facade.open_call()
            call.settled.add_done_callback(lambda _: self._settled(generation, call))
            self.facade.send_load(call, request)

        def failed(problem: Problem) -> None:
            self._generation = generation
            self._end(generation, problem)

        self._do(run, failed)

    def stop(self, generation: Generation, *, cut: bool) -> None:
        """Let nobody in any more, drain, and empty the slot."""
        self._shut("stop")

        def run() -> None:
            if self._generation == generation:
                self.facade.send_unload(self.facade.open_call(), cut=cut)

        def failed(_: Problem) -> None:
            self._post(facts.BecameStuck(self.name, generation, self._clock()))

        self._do(run, failed)

    def close(self, *, keep: bool, ended: Callable[[bool], None]) -> None:
        """Let nobody in any more, and give the slot back, with its server left to the next owner if
        that is the policy. Say whether nothing else is left in it, and report nothing before.
        """
        self._shut("close")

        def run() -> None:
            self._generation = _AT_REST
            self.facade.give_back(keep=keep)
            ended(True)

        def failed(problem: Problem) -> None:
            _log("error", "slot.not_closed", model=self.name, error=problem.message)
            ended(False)

        self._do(run, failed)

    def done(self) -> Future[None]:
        """Return what is settled when the slot has come to rest, after what is left to do."""
        done: Future[None] = Future()

        def run() -> None:
            self._rest()
            done.set_result(None)

        self._do(run, lambda problem: done.set_result(None))
        return done

    def _shut(self, order: Literal["stop", "close"]) -> None:
        self._order = order
        if (gate := self.gate) is not None:
            gate.hold()

    # ---------------------------------------------------------------------------------- reports

    def _settled(self, generation: Generation, call: Call) -> None:
        """Report a load that has succeeded, after its gate has been opened: what is closed before
        it opens stays closed.
        """
        if self._order != "start" and (gate := self.gate) is not None:
            gate.hold()
        answer = call.settled.result()
        if isinstance(answer, Loaded):
            figure = _figure_of(answer.memory)
            self._post(facts.BecameHealthy(self.name, generation, self._clock(), figure))

    def _observe(self, report: StepReport) -> None:
        """Report what a step of the slot's machine means for the pool. On its owner's thread."""
        generation, before, after = self._generation, report.before, report.after
        if generation == _AT_REST or self._order == "close":
            return
        fact, job = report.fact, after.ctx.job
        self._problem = self._failure(report) or self._problem
        if isinstance(fact, slot_facts.Sized) and job is not None and job.memory is fact.memory:
            figure = _figure_of(fact.memory)
            if figure is not None:
                self._post(facts.Sized(self.name, generation, figure, self._clock()))
        if before.state is State.HEALTHY is not after.state and self._order == "start":
            self._post(facts.Leaving(self.name, generation, self._clock()))
        has_moved = before.state is not after.state or before.ctx.look_ups != after.ctx.look_ups
        if has_moved and _is_at_rest(after) and self._call is not None:
            if after.ctx.child is None:
                self._end(generation, self._problem)
            else:
                self._post(facts.BecameStuck(self.name, generation, self._clock()))

    def _failure(self, report: StepReport) -> Problem | None:
        ticket = self._call.ticket if self._call is not None else None
        for command in report.commands:
            if isinstance(command, Settle) and command.ticket == ticket:
                return command.answer if isinstance(command.answer, Problem) else None
        return None

    def _end(self, generation: Generation, problem: Problem | None) -> None:
        """The slot is verified empty: its place on paper is free, and it comes to rest."""
        if self._generation != generation or self._order == "close":
            return
        self._generation = _AT_REST
        self._post(facts.Emptied(self.name, generation, self._clock(), problem))
        self._do(self._rest, lambda problem: None)

    def _rest(self) -> None:
        with self._turn:
            is_wanted = bool(self._todo)
        if self._generation == _AT_REST and not is_wanted:
            self.facade.give_back(keep=False)

    # ------------------------------------------------------------------------------------- work

    def _do(self, work: Callable[[], None], failed: Callable[[Problem], None]) -> None:
        """Do this after what is left to do, on a worker thread."""

        with self._turn:
            self._todo.append((work, failed))
            if self._is_working:
                return
            self._is_working = True
        try:
            self._workers.submit(self._work)
        except NoThread as error:
            while (todo := self._next()) is not None:
                todo[1](problem_of(error))

    def _work(self) -> None:
        while (todo := self._next()) is not None:
            work, failed = todo
            try:
                work()
            except BaseException as error:  # noqa: BLE001 (the pool waits for a report)
                failed(problem_of(error))

    def _next(self) -> _Work | None:
        """Return what is to be done next; None if nothing is, and nobody works any more."""
        with self._turn:
            self._is_working = bool(self._todo)
            return self._todo.popleft() if self._todo else None


def _is_at_rest(snapshot: Snapshot) -> bool:
    ctx = snapshot.ctx
    return snapshot.state is State.IDLE and not (ctx.wanted or ctx.look_ups or ctx.effect)


def _figure_of(memory: Memory | None) -> Amounts | None:
    """Return the server's own figure; an estimate is what the pool has already."""
    is_exact = memory is not None and memory.source == "exact"
    return Amounts.of(memory.devices) if memory is not None and is_exact else None
