"""The parts of a staged pool: open inboxes, gated effects, and a machine that is overheard."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from orchestrator.base.tokens import CancelToken
from orchestrator.machine.commands import Effect, Kill
from orchestrator.pool import facts
from orchestrator.pool.context import Context
from orchestrator.pool.step import PoolMachine, Stepped, pool_machine
from orchestrator.runtime.ports import SlotLock
from tests.kit.shell.fakes import FakeSlot
from tests.kit.shell.gates import GatedEffects


class Inbox:
    """An owner's inbox, open to view."""

    def __init__(self) -> None:
        self.facts: list[Any] = []
        self.taken = 0

    def put(self, fact: Any) -> None:
        if fact is not None:  # the end, for which nobody waits here
            self.facts.append(fact)

    def take(self) -> Any:
        self.taken += 1
        return self.facts.pop(0)

    def get_nowait(self) -> Any:
        if not self.facts:
            raise queue.Empty
        return self.facts.pop(0)


class SlotEffects(GatedEffects):
    """Effects of one slot; a kill of nothing ends at once."""

    slot: FakeSlot

    @property
    def name(self) -> str:
        """The model whose slot it is."""
        return self.slot.name.rpartition(".")[2]

    def close(self, *, keep: bool = False) -> None:
        super().close(keep=keep)
        self.slot.release()

    def start(self, effect: Effect, token: CancelToken, lock: SlotLock | None) -> None:
        super().start(effect, token, lock)
        if isinstance(effect, Kill) and not self.os.alive:
            self.gates[-1].succeed()


class StagedMachine(PoolMachine):
    """The pool's machine, which says what it has decided before the owner acts on it.

    It is pure: each step is taken once, whatever the number of schedules.
    """

    _steps: ClassVar[dict[tuple[Context, facts.Fact], Stepped]] = {}

    def __init__(self, decided: Callable[[Context, facts.Fact, Stepped], None]) -> None:
        self._decided = decided

    def step(self, ctx: Context, fact: facts.Fact) -> Stepped:
        if (stepped := self._steps.get((ctx, fact))) is None:
            stepped = self._steps[ctx, fact] = pool_machine().step(ctx, fact)
        self._decided(ctx, fact, stepped)
        return stepped


class Emptied(threading.Event):
    """An event for which a puppet waits."""

    def __init__(self, pause: Callable[[str, Callable[[], bool]], None]) -> None:
        super().__init__()
        self._pause = pause

    def wait(self, timeout: float | None = None) -> bool:
        self._pause("the end of all servers", self.is_set)
        return self.is_set()
