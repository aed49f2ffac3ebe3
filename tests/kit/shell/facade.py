"""A facade with everything under its owner replaced: the slot, the effects, the looking-up.

What the replacements are asked to do that may take long, they note when it is done in a thread
that runs an event loop: whoever awaits there would wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base import workers
from orchestrator.base.tokens import Ticket
from orchestrator.errors import ModelNotFound
from orchestrator.machine.facts import CancelRequested, Fact, Withdrawn
from orchestrator.models.roots import ModelRoots
from orchestrator.models.source import ModelSource
from orchestrator.runtime.events import EventLog
from orchestrator.runtime.orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.runtime.owner import Owner
from orchestrator.runtime.parts import Parts
from orchestrator.runtime.ports import ClaimedSlot, Effects
from orchestrator.runtime.snapshot import Snapshot
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary
from tests.kit.machine.world import files
from tests.kit.shell.gates import ALL_KINDS, GatedEffects, OperatingSystem, VirtualClock

PATIENCE_S = 20.0


class House:
    """Makes orchestrators with other parts.

    Attributes:
        on_loop: What was done in the thread of an event loop and may block it.
        owners: The owners that were started.
        claims: How often a slot was claimed.
        claim_gate: What claiming a slot waits for.
    """

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.os = OperatingSystem()
        self.open_gates = ALL_KINDS
        self.on_loop: list[str] = []
        self.looked_up: list[str] = []
        self.owners: list[WatchedOwner] = []
        self.claims = 0
        self.releases = 0
        self.claim_gate = _open_gate()
        self.workers: Any = workers.shared()
        self._started = threading.Event()
        self._looked = threading.Condition()
        self._gates: dict[str, threading.Event] = {}
        self._begun: dict[str, threading.Event] = {}

    def sync(self, **settings: Any) -> Orchestrator:
        return Orchestrator(llama_server="/llama", parts=HouseParts(self), **settings)

    def asynchronous(self, **settings: Any) -> AsyncOrchestrator:
        return AsyncOrchestrator(llama_server="/llama", parts=HouseParts(self), **settings)

    def adopt(self, owner: WatchedOwner) -> None:
        self.owners.append(owner)
        self._started.set()

    # ------------------------------------------------------------------------------ looking up

    def hold_look_ups_of(self, model: str) -> None:
        """From now on looking this model up takes until it is let go."""
        self._gates[model] = threading.Event()
        self._begun[model] = threading.Event()

    def look_up_has_begun(self, model: str) -> None:
        assert self._begun[model].wait(PATIENCE_S), f"nobody looks {model} up"

    def let_look_ups_go(self, model: str) -> None:
        self._gates.pop(model).set()

    def look_up(self, request: LoadRequest) -> ModelFiles:
        self.may_block("look up")
        model = request.model_path
        if (gate := self._gates.get(model)) is not None:
            self._begun[model].set()
            assert gate.wait(PATIENCE_S), f"the look-up of {model} was never let go"
        with self._looked:
            self.looked_up.append(model)
            self._looked.notify_all()
        if model.startswith("missing"):
            raise ModelNotFound.because(f"{model} does not exist", field="model_path")
        if model.startswith("unreadable"):
            raise PermissionError(13, "Permission denied", model)
        return files(model)

    def may_block(self, what: str) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        self.on_loop.append(what)

    def looked_up_count(self, count: int) -> None:
        """Wait until so many models have been looked up."""
        with self._looked:
            assert self._looked.wait_for(lambda: len(self.looked_up) >= count, PATIENCE_S)

    # ------------------------------------------------------------------------------ the owner

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

    def until_read(self) -> None:
        """Wait until somebody waits for events."""
        log = self.events
        assert isinstance(log, WatchedLog)
        assert log.is_followed.wait(PATIENCE_S), "nobody reads"

    def until(self, holds: Callable[[Snapshot], bool]) -> Snapshot:
        """Wait until a snapshot is as described."""
        return self.owner.until(holds)

    def until_callers(self, count: int) -> None:
        """Wait until so many callers wait for the load in flight."""
        self.until(lambda shown: bool(shown.ctx.job) and len(shown.ctx.job.callers) == count)  # type: ignore[union-attr]

    def catch_up(self) -> None:
        """Wait until everything that has been posted by now has been processed."""
        owner = self.owner
        call = owner.call()
        owner.ask(call, CancelRequested(call.ticket, None, 1 << 40, owner.clock()))
        call.settled.result(PATIENCE_S)

    def pass_time(self, seconds: float) -> None:
        """Move the clock, and wake the owner to look at it."""
        self.clock.advance(seconds)
        self.owner.post(Withdrawn(Ticket(0), self.clock()))
        self.catch_up()


class HouseParts(Parts):
    """What the orchestrators of a house are made of."""

    def __init__(self, house: House) -> None:
        self._house = house

    @property
    def workers(self) -> Any:
        return self._house.workers

    def slot(self, name: str, state_dir: object) -> ClaimedSlot:
        return HouseSlot(name, self._house)

    def source(self, records: Path, roots: ModelRoots | None) -> ModelSource:
        return HouseSource(records, roots, self._house)

    def server(self, llama_server: str) -> ServerBinary:
        self._house.may_block("find the server")
        return ServerBinary("external", ("/llama",), FileIdentity("/llama", 1, 1, 1, 1))

    def effects(self, _: object, post: Callable[[Fact], None], *__: object) -> Effects:
        self._house.may_block("effects")
        return GatedEffects(post, self._house.clock, self._house.os, self._house.open_gates)

    def owner(self, effects: Any, **settings: Any) -> Owner:
        made = WatchedOwner(effects, clock=self._house.clock, **settings)
        self._house.adopt(made)
        return made


class HouseSlot:
    def __init__(self, name: str, house: House) -> None:
        self.name = name
        self._house = house

    def claim(self) -> None:
        self._house.may_block("claim")
        self._house.claims += 1
        assert self._house.claim_gate.wait(PATIENCE_S)

    def release(self) -> None:
        self._house.releases += 1


class HouseSource(ModelSource):
    def __init__(self, records: Path, roots: ModelRoots | None, house: House) -> None:
        super().__init__(records, roots)
        self.look_up = house.look_up  # type: ignore[method-assign]


class WatchedOwner(Owner):
    """An owner on its own thread that tests can wait for."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._stepped = threading.Condition()
        self._free = _open_gate()
        super().__init__(*args, **settings)
        self.events = WatchedLog()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Process nothing meanwhile."""
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def pump(self, fact: Fact) -> None:
        assert self._free.wait(PATIENCE_S)
        super().pump(fact)
        with self._stepped:
            self._stepped.notify_all()

    def until(self, holds: Callable[[Snapshot], bool]) -> Snapshot:
        with self._stepped:
            happened = self._stepped.wait_for(lambda: holds(self.snapshot), PATIENCE_S)
        assert happened, f"it never came to that; it is {self.snapshot}"
        return self.snapshot


class WatchedLog(EventLog):
    """Says when somebody has begun to follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_followed = threading.Event()

    def subscribe(self, waker: Callable[[], None]) -> Callable[[], None]:
        stop = super().subscribe(waker)
        self.is_followed.set()
        return stop


@contextlib.contextmanager
def ctrl_c(pool: ThreadPoolExecutor, once: Callable[[], object]) -> Iterator[None]:
    """Expect the main thread to be interrupted as soon as `once` returns.

    A signal that arrives just before a lock is waited for is only noticed after the wait, so it is
    sent until it has been noticed, and raises only then.
    """
    noticed = threading.Event()
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def notice(*_: object) -> None:
        if not noticed.is_set():
            noticed.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        once()
        while not noticed.wait(0.005):
            signal.pthread_kill(main_thread, signal.SIGINT)

    before = signal.signal(signal.SIGINT, notice)
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
