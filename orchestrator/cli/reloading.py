"""Reads the catalogue of a served pool again: at a signal, or when its file has changed.

One task reads, whoever asks. A mistake is logged and changes nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from typing import Any, Final

from orchestrator.base import log, workers
from orchestrator.errors import OrchestratorError
from orchestrator.pool.pool import AsyncModelPool

_LOOK_EVERY_S: Final = 0.5

_log = log.event_log("orchestrator.cli")
Stamp = tuple[int, ...] | None
"""Differs when a file has changed; None if there is no file."""


def has_terminal() -> bool:
    """Whether this process has a controlling terminal, whose hang-up is a SIGHUP."""
    if sys.platform == "win32":
        return True
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def stamp_of(file: str) -> Stamp:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


class Reloader:
    """Reads a catalogue again.

    Args:
        watches: Whether a change of the file is a reason.
    """

    def __init__(self, file: str, *, watches: bool) -> None:
        self._file, self._watches = os.path.expanduser(file), watches
        self._stamp = stamp_of(self._file)  # to be taken before the pool reads the file
        self._asked = asyncio.Event()
        self._is_closed = False

    def ask(self, *_: object) -> None:
        """Have it read; what is asked for while it reads is done after that."""
        self._asked.set()

    def close(self) -> None:
        """Let `run` end."""
        self._is_closed = True
        self._asked.set()

    async def run(self, pool: AsyncModelPool) -> None:
        """Read whenever it is asked for, until this is closed."""
        watching = asyncio.create_task(self._watch()) if self._watches else None
        try:
            while await self._asked.wait() and not self._is_closed:
                self._asked.clear()
                await self._read(pool)
        finally:
            if watching is not None:
                watching.cancel()

    async def _read(self, pool: AsyncModelPool) -> None:
        try:
            changes = await pool.reload()
        except OrchestratorError as error:
            _log("error", "catalogue.refused", why=error.message)
            return
        named: dict[str, Any] = {
            "added": changes.added,
            "changed": changes.changed,
            "removed": changes.removed,
        }
        shown = {how: ",".join(names) for how, names in named.items() if names}
        _log("info", "catalogue.reloaded", unchanged=len(changes.unchanged), **shown)

    async def _watch(self) -> None:
        """Ask when the file has changed and then stayed as it is for a moment: editors write in
        several steps.
        """
        last = self._stamp
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = await workers.waited(partial(stamp_of, self._file))
            if now == last and now != self._stamp:
                self._stamp = now
                self.ask()
            last = now
