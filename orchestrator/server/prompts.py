"""Prompts kept across a swap: what a chat server has computed, for when its target comes back.

The slots of a server are saved before it is stopped for another model, and restored before its
successor with the same target is Healthy. A save is given up after two seconds or as soon as the
load is cancelled; whatever fails costs only the saving. A target whose restored prompts are of no
use to its first answers is not saved any more. The files hold conversations: their folder is
private, and removed when they are not to be kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from orchestrator.base.log import event_log
from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.server.child import ServerProcess
from orchestrator.server.talk import NO_ANSWER, Connection
from orchestrator.settings.target import Target

_SAVE_S: Final = 2.0
_RESTORE_S: Final = 10.0
_MOST_TARGETS: Final = 16
_FRUITLESS: Final = 3  # restores in a row whose first answer had to compute everything
_log = event_log("orchestrator.prompts")

_Ask = Callable[[str, str | None], Any]


@dataclass(slots=True)
class Counts:
    """Prompt tokens since the start: saved, restored, and not computed anew by first answers."""

    saved: int = 0
    restored: int = 0
    reused: int = 0


class PromptStore:
    """The saved prompts of one slot's servers.

    Args:
        folder: Is made, and private.
        most_bytes: The size of all files together; the oldest go first.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.counts: Counts = Counts()
        self._most_bytes = most_bytes
        self._fruitless: Counter[str] = Counter()
        self._unjudged: tuple[Generation, str] | None = None
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        self.tidy()

    def save(self, target: Target, server: ServerProcess, port: int, token: CancelToken) -> None:
        """Save every slot that is not computing."""
        key, saved = _key_of(target), set[str]()
        if self._fruitless[key] >= _FRUITLESS:
            return
        with _at_no_cost(server), self._asking(server, port, token, _SAVE_S) as ask:
            if shutil.disk_usage(self.folder).free < self._most_bytes:
                raise _RefusedError("the disk is nearly full")
            for slot in ask("/slots", None):
                if slot.get("is_processing"):
                    continue
                name = f"{key}-{slot['id']}"
                answer = ask(f"/slots/{slot['id']}?action=save", f"{name}.part")
                if (count := int(answer["n_saved"])) > 0:
                    os.replace(self.folder / f"{name}.part", self.folder / f"{name}.bin")
                    saved.add(f"{name}.bin")
                    self.counts.saved += count
        with _at_no_cost(server):
            for old in self._files_of(key) if saved else ():
                if old.name not in saved:
                    old.unlink(missing_ok=True)
            self._stay_within_bounds()

    def restore(self, target: Target, server: ServerProcess, port: int, token: CancelToken) -> None:
        """Restore what was saved of this target."""
        key, count = _key_of(target), 0
        with _at_no_cost(server), self._asking(server, port, token, _RESTORE_S) as ask:
            for file in self._files_of(key):
                number = file.stem.rpartition("-")[2]
                try:
                    answer = ask(f"/slots/{number}?action=restore", file.name)
                except _RefusedError:
                    file.unlink(missing_ok=True)
                    continue
                count += int(answer["n_restored"])
                file.touch()
        if count:
            self.counts.restored += count
            self._unjudged = server.generation, key
            _log("info", "prompts.restored", generation=server.generation, tokens=count)

    def judge_of(self, generation: Generation) -> Callable[[int], None] | None:
        """Return what to tell the `cache_n` of the first answer to; None if that is not awaited."""
        waiting = self._unjudged
        if waiting is None or waiting[0] != generation:
            return None
        return lambda cached: self._judge(waiting, cached)

    def _judge(self, waiting: tuple[Generation, str], cached: int) -> None:
        if self._unjudged is not waiting:
            return
        self._unjudged = None
        self.counts.reused += cached
        key = waiting[1]
        self._fruitless[key] = 0 if cached else self._fruitless[key] + 1
        if self._fruitless[key] >= _FRUITLESS:
            _log("warning", "prompts.fruitless", generation=waiting[0])
            for file in self._files_of(key):
                file.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what an unfinished save has left."""
        for part in self.folder.glob("*.part"):
            part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _asking(
        self, server: ServerProcess, port: int, token: CancelToken, limit_s: float
    ) -> Iterator[_Ask]:
        """Yield requests to the server, which together end in time."""
        connection, ends = Connection(server, token), time.monotonic() + limit_s
        token.on_set(connection.interrupt)

        def ask(path: str, filename: str | None) -> Any:
            body = None if filename is None else json.dumps({"filename": filename})
            left_s = max(0.001, ends - time.monotonic())
            status, answer = talk.ask(path, left_s, server.api_key, body=body)
            if status != HTTPStatus.OK:
                raise _RefusedError(f"{path} was answered with status {status}")
            return json.loads(answer)

        with connection.talk(port) as talk:
            yield ask

    def _files_of(self, key: str) -> list[Path]:
        return sorted(self.folder.glob(f"{key}-*.bin"))

    def _stay_within_bounds(self) -> None:
        """Remove the oldest targets until the rest is small enough."""
        files = self.folder.glob("*.bin")
        total, keys = 0, set[str]()
        for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            total += file.stat().st_size
            keys.add(file.stem.rpartition("-")[0])
            if total > self._most_bytes or len(keys) > _MOST_TARGETS:
                file.unlink(missing_ok=True)


class _RefusedError(Exception):
    """It will not be done."""


@contextlib.contextmanager
def _at_no_cost(server: ServerProcess) -> Iterator[None]:
    """Whatever fails in here, only prompts are computed once more."""
    try:
        yield
    except (*NO_ANSWER, _RefusedError, LookupError, TypeError, AttributeError) as error:
        _log("info", "prompts.given_up", generation=server.generation, reason=str(error))


def _key_of(target: Target) -> str:
    """Return the same text for targets that compute the same from the same prompt."""
    identity = repr(sorted(target.identity().items()))
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
