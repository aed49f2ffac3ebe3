"""What servers take of memory: their own figures, kept for the next start, or an estimate.

A server that fits unset arguments to the memory prints a figure for what they want, then, if that
is too much, one for the least that they can do with, and perhaps others that it tries. With a
draft model each of these is two figures. What it takes in the end is printed only at its exit, so
it is computed from the context that it reports.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from orchestrator.base.private_file import read_file, write_json
from orchestrator.machine.facts import ServerFacts
from orchestrator.models import estimate
from orchestrator.models.local import identity_of
from orchestrator.server.devices import Device
from orchestrator.server.json_log import Figure
from orchestrator.settings.drafting import has_draft_model
from orchestrator.settings.flags import last_value
from orchestrator.settings.memory import HOST, Devices, Memory, devices_of, total
from orchestrator.settings.reach import named_files
from orchestrator.settings.target import Target

_MOST: Final = 1000  # command lines
_LEAST_CONTEXT: Final = "4096"  # llama-server's default of --fit-ctx


class Sizes:
    """What is known of the memory of servers on this machine.

    Args:
        cache: Folder for the exact figures.
    """

    def __init__(self, cache: Path) -> None:
        self._file = cache / "memory.json"
        self._kept: dict[str, Any] | None = None
        self._guard = threading.Lock()

    def expected(self, target: Target, devices: Sequence[Device]) -> Memory:
        """Return what a server would take: its own figure of an earlier start, or an estimate."""
        if (kept := self._recall(target)) is not None:
            return _exact(target, kept)
        return Memory.of("estimate", estimate.of(target, devices))

    def printed(self, target: Target, figures: Sequence[Figure]) -> Memory | None:
        """Return what a server that is loading says it would take; None if it has said nothing."""
        wanted = _rounds(target, figures)
        return _exact(target, wanted[0]) if wanted else None

    def taken(self, target: Target, figures: Sequence[Figure], server: ServerFacts) -> Memory:
        """Return what a server has taken, once it is ready."""
        rounds = _rounds(target, figures)
        if not rounds:
            return self.expected(target, ())
        self._keep(target, rounds[0])
        if len(rounds) == 1:
            return _exact(target, rounds[0])
        return _exact(target, _fitted(target, rounds, server), fitted=True)
