"""Orchestrators with a real owner on its own thread, and everything below the owner faked."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, wraps
from typing import Any, ParamSpec

import pytest

from orchestrator.base import workers
from orchestrator.base.tokens import Ticket
from orchestrator.errors import ModelNotFound, OrchestratorError
from orchestrator.machine.commands import LookUp
from orchestrator.machine.facts import CancelRequested, Fact, Withdrawn
from orchestrator.runtime.effects import looked_up
from orchestrator.runtime.events import EventLog
from orchestrator.runtime.orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.runtime.owner import Owner
from orchestrator.runtime.parts import Parts
from orchestrator.runtime.snapshot import Snapshot
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.kit.machine.world import files, target
from tests.kit.shell.fakes import FakeSlot, fake_parts
from tests.kit.shell.gates import ALL_KINDS, GatedEffects, OperatingSystem, VirtualClock

PATIENCE_S = 20.0
_P = ParamSpec("_P")


class Harness:
    """Makes orchestrators, controls what they ask of the system, and waits for their owner.

    Attributes:
        blocked_loop: What ran in the thread of an event loop although it may block.
        looked_up: The models that were looked up, in order.
        owners: The owners that were started.
        claims: How often a slot was claimed.
        claim_gate: Claiming a slot waits for this.
        open_gates: The effects that succeed at once.
    """

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.os = OperatingSystem()
        self.open_gates = ALL_KINDS
        self.blocked_loop: list[str] = []
        self.looked_up: list[str] = []
        self.owners: list[WatchedOwner] = []
        self.claims = 0
        self.releases = 0
        self.claim_gate = _open_gate()
        self.workers: Any = workers.shared()
        self._started = threading.Event()
        self._looked = threading.Condition()
        self._held: dict[str, threading.Event] = {}
        self._begun: dict[str, threading.Event] = {}

    def sync(self, **options: Any) -> Orchestrator:
        return Orchestrator(llama_server="/llama", parts=self.parts(), **options)

    def asynchronous(self, **options: Any) -> AsyncOrchestrator:
        return AsyncOrchestrator(llama_server="/llama", parts=self.parts(), **options)

    def parts(self, **replaced: Any) -> Parts:
        parts = {
            "clock": self.clock,
            "workers": lambda: self.workers,
            "slot": partial(WatchedSlot, self),
            "server": self.find_server,
            "effects": self.make_effects,
            "owner": self.make_owner,
        }
        return fake_parts(look_up=self.look_up, **(parts | replaced))

    def find_server(self, _: str) -> Any:
        self.may_block("find the server")
        return target(LoadRequest(model_path="A")).server

    def make_effects(self, _: object, post: Callable[[Fact], None], *others: Any) -> GatedEffects:
        self.may_block("make effects")
        *_, look_up = others

        def begin(command: LookUp) -> None:
            self.workers.submit(lambda: post(looked_up(command, look_up)))

        return GatedEffects(post, self.clock, self.os, self.open_gates, look_ups=begin)

    def make_owner(self, effects: Any, **settings: Any) -> Owner:
        self.owners.append(WatchedOwner(effects, **settings))
        self._started.set()
        return self.owners[-1]

    def may_block(self, what: str) -> None:
        """Record what runs in the thread of an event loop, and would block it in production."""
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            self.blocked_loop.append(what)

    # ---------------------------------------------------------------------------- model look-up

    def hold_look_ups_of(self, model: str) -> None:
        """From now on looking this model up blocks until `release_look_ups_of`."""
        self._held[model] = threading.Event()
        self._begun[model] = threading.Event()

    def until_look_up_of(self, model: str) -> None:
        assert self._begun[model].wait(PATIENCE_S), f"{model} is not looked up"

    def release_look_ups_of(self, model: str) -> None:
        self._held.pop(model).set()

    def release_all_look_ups(self) -> None:
        for model in tuple(self._held):
            self.release_look_ups_of(model)

    def until_looked_up(self, count: int) -> None:
        """Wait until so many look-ups have ended."""
        with self._looked:
            assert self._looked.wait_for(lambda: len(self.looked_up) >= count, PATIENCE_S)

    def look_up(self, request: LoadRequest) -> ModelFiles:
        self.may_block("look up")
        model = request.model_path
        if (gate := self._held.get(model)) is not None:
            self._begun[model].set()
            assert gate.wait(PATIENCE_S), f"the look-up of {model} was never released"
        with self._looked:
            self.looked_up.append(model)
            self._looked.notify_all()
        if model.startswith("missing"):
            raise ModelNotFound.because(f"{model} does not exist", field="model_path")
        if model.startswith("unreadable"):
            raise PermissionError(13, "Permission denied", model)
        return files(model)

    # -------------------------------------------------------------------------------- the owner

    @property
    def owner(self) -> WatchedOwner:
        """The last owner that was started; waits for the first."""
        assert self._started.wait(PATIENCE_S), "no owner was started"
        return self.owners[-1]

    @property
    def effects(self) -> GatedEffects:
        found = self.owner.effects
        assert isinstance(found, GatedEffects)
        return found

    @property
    def events(self) -> EventLog:
        return self.owner.events

    def until_followed(self) -> None:
        """Wait until events are followed."""
        log = self.events
        assert isinstance(log, WatchedLog)
        assert log.is_followed.wait(PATIENCE_S), "nothing follows the events"

    def until(self, holds: Callable[[Snapshot], object]) -> Snapshot:
        """Wait until a snapshot is as described."""
        return self.owner.until(holds)

    def until_callers(self, count: int) -> None:
        """Wait until the load in flight has so many callers."""
        self.until(lambda shown: shown.ctx.job and len(shown.ctx.job.callers) == count)

    def catch_up(self) -> None:
        """Wait until everything that has been posted by now has been processed."""
        owner = self.owner
        call = owner.call()
        owner.ask(call, CancelRequested(call.ticket, None, 1 << 40, owner.clock()))
        call.settled.result(PATIENCE_S)

    def pass_time(self, seconds: float) -> None:
        """Advance the clock, and wake the owner to read it."""
        self.clock.advance(seconds)
        self.owner.post(Withdrawn(Ticket(0), self.clock()))
        self.catch_up()


class WatchedSlot(FakeSlot):
    def __init__(self, harness: Harness, name: str, state_dir: object) -> None:
        super().__init__(name, state_dir)
        self._harness = harness

    def claim(self) -> None:
        self._harness.may_block("claim")
        self._harness.claims += 1
        assert self._harness.claim_gate.wait(PATIENCE_S)

    def release(self) -> None:
        self._harness.releases += 1


class WatchedOwner(Owner):
    """An owner that tests can pause and wait for."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._stepped = threading.Condition()
        self._unpaused = _open_gate()
        super().__init__(*args, **settings)
        self.events = WatchedLog()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Process no fact inside of the block."""
        self._unpaused.clear()
        try:
            yield
        finally:
            self._unpaused.set()

    def pump(self, fact: Fact) -> None:
        assert self._unpaused.wait(PATIENCE_S)
        super().pump(fact)
        with self._stepped:
            self._stepped.notify_all()

    def until(self, holds: Callable[[Snapshot], object]) -> Snapshot:
        with self._stepped:
            happened = self._stepped.wait_for(lambda: holds(self.snapshot), PATIENCE_S)
        assert happened, f"waited in vain; the snapshot is {self.snapshot}"
        return self.snapshot


class WatchedLog(EventLog):
    """Reports when it is followed."""

    def __init__(self) -> None:
        super().__init__()
        self.is_followed = threading.Event()

    def subscribe(self, waker: Callable[[], None]) -> Callable[[], None]:
        stop = super().subscribe(waker)
        self.is_followed.set()
        return stop


# ------------------------------------------------------------------------------------- callers


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine, for a bounded time."""

    async def bounded() -> Any:
        return await asyncio.wait_for(main(), PATIENCE_S)

    return asyncio.run(bounded())


def asyncio_test(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """Run a test in an event loop of its own, for a bounded time."""

    @wraps(test)
    def in_loop(*args: _P.args, **kwargs: _P.kwargs) -> None:
        run(lambda: test(*args, **kwargs))

    return in_loop


def error_of(caller: Future[Any]) -> OrchestratorError:
    error = caller.exception(PATIENCE_S)
    assert isinstance(error, OrchestratorError), error
    return error


@contextlib.contextmanager
def ctrl_c(pool: ThreadPoolExecutor, once: Callable[[], object]) -> Iterator[None]:
    """Expect the main thread to be interrupted as soon as `once` returns.

    A signal that arrives just before a wait for a lock is handled only after the wait, so it is
    sent again until it has been handled. Only the first one raises.
    """
    handled = threading.Event()
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def handle(*_: object) -> None:
        if not handled.is_set():
            handled.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        once()
        while not handled.wait(0.005):
            signal.pthread_kill(main_thread, signal.SIGINT)

    before = signal.signal(signal.SIGINT, handle)
    interrupting = pool.submit(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
        interrupting.result(PATIENCE_S)
    finally:
        signal.signal(signal.SIGINT, before)


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate
