"""The parts of an orchestrator, so that tests and embedders can replace them."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base import workers
from orchestrator.base.workers import Workers
from orchestrator.models.roots import ModelRoots
from orchestrator.models.source import ModelSource
from orchestrator.runtime.effects import ProcessEffects
from orchestrator.runtime.owner import Owner
from orchestrator.runtime.ports import Clock, Effects
from orchestrator.server.binaries import ask_catalogue, find_server
from orchestrator.server.devices import Device, devices
from orchestrator.server.slot import Slot
from orchestrator.settings.help_text import Catalogue
from orchestrator.settings.target import ServerBinary


@dataclass(frozen=True)
class Parts:
    """How each part is made; the defaults run real servers.

    `wait` blocks until a synchronous call has its answer. `at_exit` registers the close of an
    orchestrator that is still open when the interpreter exits, and `not_at_exit` unregisters it.
    """

    clock: Clock = time.monotonic
    workers: Callable[[], Workers] = workers.shared
    slot: Callable[[str, str | os.PathLike[str] | None], Slot] = Slot
    source: Callable[[Path, ModelRoots | None], ModelSource] = ModelSource
    server: Callable[[str], ServerBinary] = find_server
    catalogue: Callable[..., Catalogue | None] = ask_catalogue
    devices: Callable[[ServerBinary], Sequence[Device]] = devices
    effects: Callable[..., Effects] = ProcessEffects
    owner: Callable[..., Owner] = Owner
    wait: Callable[[Future[Any]], Any] = Future.result
    at_exit: Callable[[Callable[[], None]], object] = atexit.register
    not_at_exit: Callable[[Callable[[], None]], object] = atexit.unregister
