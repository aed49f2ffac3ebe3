"""The last requests in a private SQLite file, written behind the requests.

All of it runs on one thread of ours, whatever the disk does. What cannot be written waits in memory
(bounded) and is tried again with the next request; a file that is not what we wrote is set aside; a
file that was removed is made anew. SIGKILL loses at most what was asked in the last moments.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Final

from orchestrator.base import private_file
from orchestrator.base.log import event_log
from orchestrator.base.record import Record
from orchestrator.errors import ShuttingDown

MOST: Final = 10_000
_VERSION: Final = 1
_BESIDE: Final = ("-wal", "-shm", "-journal")
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
"""The last one: it has a table of this name that is not ours."""
_NO_FILE: Final = (OSError, sqlite3.Error, ShuttingDown)  # the last one: there is no folder yet
_log = event_log("orchestrator.http")


@dataclass(frozen=True, slots=True)
class Served(Record):
    """A request below `/v1` that has ended. No text of it is kept.

    Attributes:
        at: When it came, Unix seconds.
        model: The model it was for; None if it named none there is.
        key: The name of its key; None where keys have none.
        status: Of the answer; 499 if the client went away before it had ended.
        prompt_tokens: Those from the cache included. Tokens are None if the answer told none.
        tokens_per_s: Tokens of the answer by second, as the server measured.
        wait_s: How long it waited for its model.
        first_byte_s: From its arrival to the first byte of the answer; None without one.
        total_s: From its arrival to its end.
    """

    at: float
    model: str | None
    key: str | None
    path: str
    status: int
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    tokens_per_s: float | None
    wait_s: float
    first_byte_s: float | None
    total_s: float


_COLUMNS: Final = tuple(f.name for f in fields(Served))
_ROW: Final = attrgetter(*_COLUMNS)
_CREATE: Final = f"CREATE TABLE served (id INTEGER PRIMARY KEY, {', '.join(_COLUMNS)})"
_VALUES: Final = ", ".join("?" * len(_COLUMNS))
_INSERT: Final = f"INSERT INTO served ({', '.join(_COLUMNS)}) VALUES ({_VALUES})"  # noqa: S608
_TRIM: Final = "DELETE FROM served WHERE id <= (SELECT max(id) FROM served) - ?"
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)} FROM served ORDER BY id DESC"  # noqa: S608


class Store:
    """The file. Its methods block, and are for one thread.

    Args:
        path: Returns where the file is; its folder is private.
        most: How many requests are kept.
    """

    def __init__(self, path: Callable[[], Path], most: int = MOST) -> None:
        self._path = path
        self._most = most
        self._unwritten: deque[Served] = deque(maxlen=MOST)
        self._file: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._problem: str | None = None

    def write(self, rows: Iterable[Served]) -> None:
        """Add requests, oldest first; nothing is raised."""
        self._unwritten.extend(rows)
        if self._unwritten:
            self._say(self._attempt(self._flush))

    def read(self, is_meant: Callable[[Served], bool], limit: int) -> list[Served]:
        """Return the newest requests that are meant, newest first; those in memory if the file
        cannot be read.
        """
        self.write(())
        found = [one for one in reversed(self._unwritten) if is_meant(one)][:limit]

        def more(file: sqlite3.Connection) -> None:
            rows = file.execute(_SELECT)
            with contextlib.closing(rows):
                for row in rows:
                    if len(found) == limit:
                        return
                    if is_meant(one := Served(*row)):
                        found.append(one)

        if (problem := self._attempt(more)) is not None:
            self._say(problem)
        return found

    def close(self) -> None:
        if (file := self._file) is not None:
            self._file = None
            with contextlib.suppress(sqlite3.Error):
                file.close()

    def _attempt(self, work: Callable[[sqlite3.Connection], None]) -> str | None:
        """Do something with the file; return what is wrong with it."""
        try:
            work(self._connected())
        except _NO_FILE as error:
            if getattr(error, "sqlite_errorcode", None) in _DAMAGED:
                return self._set_aside(str(error), work)
            return str(error)
        return None

    def _say(self, problem: str | None) -> None:
        """Log what is wrong with the file, once, and its end."""
        if problem and problem != self._problem:
            _log("warning", "activity.unwritten", error=problem)
        elif self._problem and not problem:
            _log("info", "activity.written_again")
        self._problem = problem

    def _flush(self, file: sqlite3.Connection) -> None:
        with file:
            file.executemany(_INSERT, map(_ROW, self._unwritten))
            file.execute(_TRIM, (self._most,))
        self._unwritten.clear()

    def _connected(self) -> sqlite3.Connection:
        """Return the open file, made anew if it is not there any more."""
        path = self._path()
        if self._file is None or _identity(path) != self._opened:
            self.close()
            self._file = self._open(path)
        return self._file

    def _open(self, path: Path) -> sqlite3.Connection:
        if not path.exists():
            for one in _BESIDE:  # of a file that was removed
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{path}{one}")
        os.close(private_file.open_file(path, os.O_RDWR | os.O_CREAT))
        file = sqlite3.connect(path, timeout=1.0, check_same_thread=False)
        try:
            (version,) = file.execute("PRAGMA user_version").fetchone()
            file.execute("PRAGMA journal_mode = WAL")  # a commit then waits for no disk
            file.execute("PRAGMA synchronous = NORMAL")
            if version == 0:
                version = _VERSION
                with file:
                    file.execute(_CREATE)
                    file.execute(f"PRAGMA user_version = {version}")
            _check(version)
        except BaseException:
            file.close()
            raise
        self._opened = _identity(path)
        return file

    def _set_aside(self, problem: str, work: Callable[[sqlite3.Connection], None]) -> str | None:
        """Rename a file that cannot be used, and try again with a new one; return what is wrong."""
        self.close()
        path = self._path()
        try:
            aside = path.with_suffix(".damaged")
            os.replace(path, aside)
            _log("warning", "activity.set_aside", file=aside.name, error=problem)
            work(self._connected())
        except _NO_FILE as error:
            return str(error)
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _check(version: int) -> None:
    if version != _VERSION:
        error = sqlite3.DatabaseError(f"it is of version {version}")
        error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
        raise error
