"""Stages whose clients call a real facade, as tasks of one event loop or as threads.

They run one at a time: a task up to its next `await`, a thread up to its next wait. Which of them
continues, and when a look-up ends, are moves like any other. So the explorer covers every order of
callbacks, cancelled tasks, interrupted threads, completions and facts.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from asyncio import events as running
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, ClassVar, Final, cast

from orchestrator.base.tokens import Ticket
from orchestrator.errors import OrchestratorError
from orchestrator.machine.commands import LeaseGranted, LookUp
from orchestrator.runtime.effects import looked_up
from orchestrator.runtime.orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.runtime.owner import Call, Owner
from tests.kit.machine.invariants import Violation
from tests.kit.machine.programs import Action
from tests.kit.machine.world import Status
from tests.kit.shell.fakes import fake_parts
from tests.kit.shell.ledger import Caller
from tests.kit.shell.scene import Scene
from tests.kit.shell.stage import BrokenError, Choose, Move, Stage

_PATIENCE_S: Final = 20.0
_NOBODY: Final = Ticket(-1000)


class FacadeStage(Stage):
    """A stage whose clients call a facade."""

    facade: type[AsyncOrchestrator | Orchestrator]

    def _make_owner(self) -> Owner:
        parts = fake_parts(
            clock=self.clock,
            effects=lambda _, post, *__: self._make_effects(post),
            owner=self._make_unstarted,
            wait=self.wait,
        )
        self.orch: Any = self.facade(llama_server="/llama", parts=parts)
        owner: Owner = self.orch._start()
        return owner

    def close(self) -> None:
        self.owner.has_ended = True  # nothing is left to warn of
        super().close()

    def _make_unstarted(self, make: Callable[..., Any], **settings: Any) -> Owner:
        """Return the owner under test: without a thread, and with a record of who calls it."""
        settings |= {"policy": self.scene.policy, "machine": self.machine, "jitter": lambda: 1.0}
        made = self.scene.owner(make, **settings)
        open_call = made.call

        def call(ticket: Ticket | None = None) -> Call:
            opened = open_call(ticket)
            if (caller := self._who()) is not None:
                self._record_call(caller, opened)
            return opened

        vars(made).update(call=call, start=lambda _: None)
        return made

    def _begin_look_up(self, command: LookUp) -> None:
        self.looking.append(command)

    def _end_look_up(self, command: LookUp) -> None:
        self.looking.remove(command)
        self.owner.post(
            looked_up(command, partial(self.orch._look_ups.answer, snapshot=self.owner.snapshot))
        )

    def wait(self, future: Future[Any]) -> Any:
        return future.result()

    def _who(self) -> Caller | None:
        """Return the caller whose code is running."""
        raise NotImplementedError

    def _client_moves(self, number: int, action: Action) -> Iterator[Move]:
        is_possible = True
        if action.verb == "withdraw":
            is_possible = self._can_withdraw(action.refers)
        elif action.verb == "release":
            is_possible = isinstance(self.ledger.callers[action.refers].answer, LeaseGranted)
        if is_possible:
            act = partial(self._act, number, action)
            yield Move(f"client {number + 1}", action.text, act, is_own=False)

    def _can_withdraw(self, index: int) -> bool:
        """Can this caller be cancelled or interrupted now?"""
        raise NotImplementedError

    def _act(self, number: int, action: Action) -> None:
        """Carry out the next action of a client."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------- results

    def check_rest(self) -> None:
        super().check_rest()
        if self.is_quiescent:
            for caller in self.ledger.callers:
                if (message := self._misled(caller)) is not None:
                    raise BrokenError(Violation("promise_callers_get_their_answer", message))

    @property
    def counted(self) -> frozenset[Ticket]:
        """A facade enters under no ticket: there are as many as callers that are inside."""
        gate, fast = self.owner.gate, set[Ticket]()
        for caller in self.ledger.open_calls:
            is_inside = caller.call is not None and caller.call.gate is gate
            if caller.ticket < 0 and is_inside and caller.status is Status.HELD:
                fast.add(caller.ticket)
        slow = {who for who in gate._inside if isinstance(who, int)}
        is_right = len(gate._inside) - len(slow) == len(fast)
        return frozenset(cast("set[Ticket]", slow) | (fast if is_right else {_NOBODY}))

    def has_left(self, caller: Caller) -> bool:
        return self._was_ended(caller)

    @contextlib.contextmanager
    def _inside(self, action: Action) -> Iterator[None]:
        """The body of a `with orch.lease()`."""
        caller = self.ledger.callers[action.index]
        if caller.call is None:
            self.ledger.entered(caller, self._inside_of(Ticket(-1 - action.index)))
        try:
            yield
        finally:
            caller.has_left()

    def _misled(self, caller: Caller) -> str | None:
        """Return how what the facade did differs from the answer to its call."""
        has_ended, result = self._result_of(caller)
        name, answer = caller.action.text, caller.answer
        if caller.call is None:
            return None
        if has_ended and caller.ticket in self.counted:
            return f"{name} has ended, and its lease still counts"
        if not has_ended:
            is_holding = isinstance(answer, LeaseGranted) and not self._was_ended(caller)
            return None if is_holding else f"{name} still waits, and its answer is {answer}"
        if isinstance(result, asyncio.CancelledError | KeyboardInterrupt):
            return None if self._was_ended(caller) else f"{name} ended without a cause"
        if isinstance(result, OrchestratorError):
            result = result.problem
            return (
                None if result == answer else f"{name} raises {result}, and its answer is {answer}"
            )
        if isinstance(result, BaseException):
            return f"{name} raises {result!r}"
        return f"{name} returns, and was withdrawn" if answer == "gone" else None

    def _result_of(self, caller: Caller) -> tuple[bool, object]:
        """Return whether the code of a caller has ended, and its result or exception."""
        raise NotImplementedError

    def _was_ended(self, caller: Caller) -> bool:
        """Was this caller cancelled or interrupted?"""
        raise NotImplementedError


# ----------------------------------------------------------------------------------- event loop


class SteppedLoop(asyncio.BaseEventLoop):
    """An event loop that runs one callback at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.failures.append(context))
        self.set_task_factory(
            lambda loop, coroutine, **settings: asyncio.tasks._PyTask(  # type: ignore[attr-defined]
                coroutine, loop=loop, **settings
            )
        )

    @property
    def ready(self) -> list[asyncio.Handle]:
        handles = cast("Any", self)._ready
        while handles and handles[0].cancelled():
            handles.popleft()
        return list(handles)

    def step(self) -> None:
        handle = cast("Any", self)._ready.popleft()
        running._set_running_loop(self)
        try:
            handle._run()
        finally:
            running._set_running_loop(None)

    def _write_to_self(self) -> None:
        """The loop never sleeps, so it need not be woken."""


class LoopStage(FacadeStage):
    """Clients are tasks of one loop."""

    facade = AsyncOrchestrator

    def __init__(self, scene: Scene, choose: Choose) -> None:
        self.loop = SteppedLoop()
        self.tasks: dict[int, asyncio.Task[object]] = {}
        self.ended: set[int] = set()
        self.given_back: dict[int, asyncio.Event] = {}
        super().__init__(scene, choose)

    def _who(self) -> Caller | None:
        if running._get_running_loop() is None:
            return None
        task = asyncio.current_task(self.loop)
        index = next((i for i, known in self.tasks.items() if known is task), None)
        return None if index is None else self.ledger.callers[index]

    # --------------------------------------------------------------------------------- moves

    def _own_moves(self) -> Iterator[Move]:
        yield from super()._own_moves()
        if ready := self.loop.ready:
            yield Move("loop", f"runs {self._named(ready[0])}", self.loop.step)

    def _named(self, handle: asyncio.Handle) -> str:
        return named(handle, self.tasks, lambda index: self.scene.actions[index].text)

    def _can_withdraw(self, index: int) -> bool:
        return index in self.tasks

    def _act(self, number: int, action: Action) -> None:
        self.progress[number] += 1
        if action.verb == "withdraw":
            if self.tasks[action.refers].cancel():
                self.ended.add(action.refers)
        elif action.verb == "release":
            self.given_back[action.refers].set()
        else:
            self.tasks[action.index] = self.loop.create_task(self._calling(action))

    async def _calling(self, action: Action) -> object:
        orch = self.orch
        match action.verb:
            case "load":
                return await orch.load(action.request)
            case "prefetch":
                return await orch.prefetch(action.request)
            case "unload":
                return await orch.unload(action.model)
            case "cancel":
                return await orch.cancel(action.request_id)
            case _:
                given_back = self.given_back[action.index] = asyncio.Event()
                async with orch.lease() as server:
                    with self._inside(action):
                        await given_back.wait()
                return server

    # ------------------------------------------------------------------------------- checking

    @property
    def is_quiescent(self) -> bool:
        return super().is_quiescent and not self.loop.ready

    def check_rest(self) -> None:
        if self.loop.failures:
            what = str(self.loop.failures[0])
            raise BrokenError(Violation("promise_the_loop_reports_no_error", what))
        super().check_rest()

    def key(self) -> tuple[object, ...]:
        return (
            *super().key(),
            tuple((i, *position(task)) for i, task in self.tasks.items()),
            tuple(self._named(handle) for handle in self.loop.ready),
            frozenset(self.ended),
            frozenset(i for i, event in self.given_back.items() if event.is_set()),
        )

    def _result_of(self, caller: Caller) -> tuple[bool, object]:
        task = self.tasks.get(caller.action.index)
        if task is None or not task.done():
            return False, None
        if task.cancelled():
            return True, asyncio.CancelledError()
        return True, task.exception() or task.result()

    def _was_ended(self, caller: Caller) -> bool:
        return caller.action.index in self.ended

    def close(self) -> None:
        """Drop all tasks, without asyncio's warnings about tasks that are still pending."""
        for task in self.tasks.values():
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            if task.done() and not task.cancelled():
                task.exception()
            task.get_coro().close()
        self.loop.close()
        super().close()


def position(task: asyncio.Task[object]) -> tuple[object, ...]:
    """Return where a task is: every frame it waits in, and whether it is being cancelled."""
    frames, at = [], cast("Any", task.get_coro())
    while at is not None:
        frame = getattr(at, "cr_frame", None) or getattr(at, "ag_frame", None)
        if frame is not None:
            frames.append((frame.f_code.co_name, frame.f_lasti))
        at = getattr(at, "cr_await", None) or getattr(at, "ag_await", None)
    waits_for = cast("Any", task)._fut_waiter
    waits = waits_for is not None and not waits_for.done()
    return (tuple(frames), waits, task.cancelling(), task.done() and task.cancelled())


# -------------------------------------------------------------------------------------- threads


class OverError(BaseException):
    """The schedule has ended: raised in threads that still wait."""


class _Runner:
    """A thread for one puppet after the other: a thread costs more than what most puppets do."""

    _idle: ClassVar[list[_Runner]] = []

    def __init__(self) -> None:
        self._begins = threading.Semaphore(0)
        self._work: Callable[[], None] = lambda: None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @classmethod
    def begin(cls, work: Callable[[], None]) -> threading.Thread:
        """Run this, and return the thread."""
        runner = cls._idle.pop() if cls._idle else cls()
        runner._work = work
        runner._begins.release()
        return runner.thread

    def _run(self) -> None:
        while True:
            self._begins.acquire()
            self._work()
            self._idle.append(self)


class Puppet:
    """A thread that runs only between `go` and its next `pause`.

    Attributes:
        waits_for: What it waits for, in words; empty while it runs and at its end.
        is_ready: Whether it could continue by itself.
        result: What its function returned or raised.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._go, self._paused = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._paused.acquire()
        self._raises: BaseException | None = None
        self.waits_for = "its turn"
        self.is_ready: Callable[[], bool] = lambda: True
        self.has_ended = False
        self.result: object = None
        self.thread = _Runner.begin(self._run)

    def _run(self) -> None:
        assert self._go.acquire(timeout=_PATIENCE_S)
        try:
            if self._raises is None:
                self.result = self._work()
        except BaseException as error:  # noqa: BLE001 (whatever a call may raise)
            self.result = error
        self.waits_for, self.has_ended = "", True
        self._paused.release()

    def go(self, raises: BaseException | None = None) -> None:
        """Let it run to its next pause, or let its wait raise."""
        self._raises = raises
        self._go.release()
        assert self._paused.acquire(timeout=_PATIENCE_S), f"{self.waits_for} blocks"

    def pause(self, waits_for: str, is_ready: Callable[[], bool]) -> None:
        """Called in the thread itself: let the others run."""
        self.waits_for, self.is_ready = waits_for, is_ready
        self._paused.release()
        assert self._go.acquire(timeout=_PATIENCE_S)
        if (error := self._raises) is not None:
            self._raises = None
            raise error


class ThreadStage(FacadeStage):
    """Clients are threads; one that goes away is interrupted where it waits."""

    facade = Orchestrator

    def __init__(self, scene: Scene, choose: Choose) -> None:
        self.puppets: dict[int, Puppet] = {}
        self.ended: set[int] = set()
        self.given_back: set[int] = set()
        super().__init__(scene, choose)

    def wait(self, future: Future[Any]) -> Any:
        if (puppet := self._puppet()) is not None:
            puppet.pause("its answer", future.done)
        return future.result(0)

    def _puppet(self) -> Puppet | None:
        me = threading.current_thread()
        mine = (p for p in self.puppets.values() if p.thread is me and not p.has_ended)
        return next(mine, None)

    def _who(self) -> Caller | None:
        me = self._puppet()
        index = next((i for i, puppet in self.puppets.items() if puppet is me), None)
        return None if index is None else self.ledger.callers[index]

    # --------------------------------------------------------------------------------- moves

    def _own_moves(self) -> Iterator[Move]:
        yield from super()._own_moves()
        for index, puppet in self.puppets.items():
            if not puppet.has_ended and puppet.is_ready():
                text = f"{self.scene.actions[index].text} goes on from {puppet.waits_for}"
                yield Move(f"thread {index}", text, puppet.go)

    def _can_withdraw(self, index: int) -> bool:
        return index in self.puppets and self.ledger.callers[index].call is not None

    def _act(self, number: int, action: Action) -> None:
        self.progress[number] += 1
        if action.verb == "withdraw":
            puppet = self.puppets[action.refers]
            if not puppet.has_ended:
                self.ended.add(action.refers)
                puppet.go(KeyboardInterrupt())
        elif action.verb == "release":
            self.given_back.add(action.refers)
        else:
            self.puppets[action.index] = Puppet(partial(self._calling, action))

    def _calling(self, action: Action) -> object:
        orch = self.orch
        match action.verb:
            case "load":
                return orch.load(action.request)
            case "prefetch":
                return orch.prefetch(action.request)
            case "unload":
                return orch.unload(action.model)
            case "cancel":
                return orch.cancel(action.request_id)
            case _:
                with orch.lease() as server, self._inside(action):
                    is_over = partial(self.given_back.__contains__, action.index)
                    self.puppets[action.index].pause("the end of its lease", is_over)
                return server

    # ------------------------------------------------------------------------------- checking

    @property
    def is_quiescent(self) -> bool:
        moving = any(not p.has_ended and p.is_ready() for p in self.puppets.values())
        return super().is_quiescent and not moving

    def key(self) -> tuple[object, ...]:
        return (
            *super().key(),
            tuple((i, p.waits_for) for i, p in self.puppets.items()),
            frozenset(self.ended),
            frozenset(self.given_back),
        )

    def _result_of(self, caller: Caller) -> tuple[bool, object]:
        puppet = self.puppets.get(caller.action.index)
        return (False, None) if puppet is None else (puppet.has_ended, puppet.result)

    def _was_ended(self, caller: Caller) -> bool:
        return caller.action.index in self.ended

    def close(self) -> None:
        for puppet in self.puppets.values():
            while not puppet.has_ended:
                puppet.go(OverError())
        super().close()


def named(
    handle: asyncio.Handle,
    tasks: Mapping[int, asyncio.Task[object]],
    text: Callable[[int], str],
) -> str:
    """Return in words what a handle of the loop runs: the task of an action, or a callback."""
    callback = cast("Any", handle)._callback
    task = getattr(callback, "__self__", None)
    index = next((i for i, known in tasks.items() if known is task), None)
    if index is not None:
        return f"{text(index)} (task {index})"
    while isinstance(callback, partial):
        callback = callback.func
    return str(getattr(callback, "__qualname__", callback))
