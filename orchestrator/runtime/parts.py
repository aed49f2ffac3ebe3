"""What an orchestrator is made of: one object, so that somebody else can hand in other parts.

These are the real ones. A test, a pool or an adopter overrides what is to be different; nothing
else in the library makes a slot, effects, an owner or a source.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from orchestrator.base import workers
from orchestrator.base.workers import Workers
from orchestrator.machine.context import Policy
from orchestrator.machine.facts import Fact
from orchestrator.models.roots import ModelRoots
from orchestrator.models.source import ModelSource
from orchestrator.runtime.effects import ProcessEffects
from orchestrator.runtime.owner import Owner
from orchestrator.runtime.ports import ClaimedSlot, Effects
from orchestrator.runtime.snapshot import Observer
from orchestrator.server.binaries import ask_catalogue, find_server
from orchestrator.server.slot import Slot
from orchestrator.settings.help_text import Catalogue
from orchestrator.settings.target import ServerBinary

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How servers are started and stopped.

    Attributes:
        kill_grace_s: Seconds between SIGTERM and SIGKILL.
        env: Variables a server gets beside the allow-list.
        keys: Every server gets a key of its own, and takes these beside it; None = it has none and
            takes everybody.
    """

    kill_grace_s: float = 5.0
    env: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] | None = None


class Parts:
    """The parts that run real servers."""

    clock: Callable[[], float] = staticmethod(time.monotonic)

    @property
    def workers(self) -> Workers:
        """The threads for what may block, shared by all orchestrators of the process."""
        return workers.shared()

    def slot(self, name: str, state_dir: str | os.PathLike[str] | None) -> ClaimedSlot:
        return Slot(name, state_dir)

    def source(self, records: Path, roots: ModelRoots | None) -> ModelSource:
        return ModelSource(records, roots)

    def server(self, llama_server: str) -> ServerBinary:
        """Find the server binary; see `find_server`."""
        return find_server(llama_server)

    def catalogue(self, server: ServerBinary, cache: Path) -> Catalogue | None:
        """Ask the binary what it takes; see `ask_catalogue`."""
        return ask_catalogue(server, cache)

    def effects(
        self,
        slot: ClaimedSlot,
        post: Callable[[Fact], None],
        source: ModelSource,
        settings: ServerSettings,
    ) -> Effects:
        if not isinstance(slot, Slot):
            raise TypeError("real effects need a real slot")
        return ProcessEffects(
            slot,
            post,
            source=source,
            workers=self.workers,
            kill_grace_s=settings.kill_grace_s,
            server_env=settings.env,
            server_keys=settings.keys,
        )

    def owner(
        self,
        effects: Callable[[Callable[[Fact], None]], Effects],
        *,
        policy: Policy,
        observers: Sequence[Observer],
        tickets: Iterator[int],
    ) -> Owner:
        return Owner(effects, policy=policy, clock=self.clock, observers=observers, tickets=tickets)

    def wait(self, future: Future[_T]) -> _T:
        """Wait for what a synchronous call is told."""
        return future.result()

    def at_exit(self, close: Callable[[], None]) -> None:
        """Have the interpreter close an orchestrator that its host has not closed."""
        atexit.register(close)

    def not_at_exit(self, close: Callable[[], None]) -> None:
        atexit.unregister(close)
