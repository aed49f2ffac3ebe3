"""A body that is read until its `model` is known, kept, and passed on with the rest.

What is kept has a bound: 1 MiB in memory, beyond that a nameless file in the state folder, and
all such files together have a bound too. A request that waits is not read further, but for one
piece, so that a client that leaves is noticed where its body is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Final

from fastapi import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from orchestrator.base import workers
from orchestrator.errors import DiskFull
from orchestrator.http.bodies import Client
from orchestrator.http.pool.members import Members

IN_MEMORY_BYTES: Final = 1 << 20
SPOOLED_BYTES: Final = 1 << 30  # of all requests
_AHEAD_BYTES: Final = 64 << 10
_PIECE_BYTES: Final = 256 << 10


class Spool:
    """Where bodies are kept that are too large for memory.

    Args:
        folder: Returns the folder; it is private.
        most: Bytes of all files together.
    """

    def __init__(self, folder: Callable[[], Path], most: int) -> None:
        self._folder = folder
        self._left = most

    def take(self, count: int) -> None:
        """Take room; raises 413."""
        if count > self._left:
            detail = "there is no room for this body until its model is known: put `model` first"
            raise HTTPException(413, detail, {"Connection": "close"})
        self._left -= count

    def give_back(self, count: int) -> None:
        self._left += count

    def file(self) -> IO[bytes]:
        """Return a new file, which ends with its last descriptor. Blocks."""
        return tempfile.TemporaryFile(dir=self._folder())


class Upload(Client):
    """The client of a request, and its body."""

    def __init__(self, receive: Receive, spool: Spool) -> None:
        super().__init__(receive)
        self._spool = spool
        self._kept: list[bytes] = []  # in memory, behind what is in the file
        self._kept_bytes = 0
        self._file: IO[bytes] | None = None
        self._spooled_bytes = 0
        self._ahead: asyncio.Task[None] | None = None

    @property
    def whole(self) -> bytes | None:
        """The body, if all of it is in memory."""
        return b"".join(self._kept) if self._is_whole and self._file is None else None

    async def find(self, members: Members, *, is_known: bool) -> None:
        """Read until the model is known, or to the end; most requests have one piece only."""
        while True:
            data = await self._read()
            members.feed(data)
            await self._keep(data)
            if self._is_whole or is_known or members.is_over or members.model is not None:
                return

    def look_ahead(self) -> None:
        """Notice while the request waits that the client has gone away."""
        if not self._is_whole:
            self._ahead = asyncio.ensure_future(self._look_ahead())

    async def stop_looking(self) -> None:
        """End that; nothing that has arrived is lost."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.gather(self._ahead, return_exceptions=True)

    async def rest(self) -> AsyncIterator[bytes]:
        """Yield the body: what is kept, and then what arrives."""
        if self._file is not None:
            await workers.waited(lambda: self._file and self._file.seek(0))
            while data := await workers.waited(self._read_back):
                yield data
        for data in self._kept:
            yield data
        while not self._is_whole:
            yield await self._read()

    async def close(self) -> None:
        """Forget what is kept."""
        if self._ahead is not None:
            self._ahead.cancel()
        self._kept.clear()
        if (file := self._file) is not None:
            self._file = None
            self._spool.give_back(self._spooled_bytes)
            await asyncio.shield(workers.waited(file.close))

    async def _look_ahead(self) -> None:
        with contextlib.suppress(ClientDisconnect):
            ahead = 0
            while not self._is_whole and ahead < _AHEAD_BYTES:
                data = await self._read()
                self._kept.append(data)
                ahead += len(data)
            return
        self.leave()

    async def _keep(self, data: bytes) -> None:
        self._kept.append(data)
        self._kept_bytes += len(data)
        most = IN_MEMORY_BYTES if self._file is None else _PIECE_BYTES
        if self._kept_bytes > most:
            await self._spill()

    async def _spill(self) -> None:
        """Write what is kept to the file."""
        self._spool.take(self._kept_bytes)
        self._spooled_bytes += self._kept_bytes
        data, self._kept, self._kept_bytes = b"".join(self._kept), [], 0
        if self._file is None:
            self._file = await workers.waited(self._spool.file)
        try:
            await workers.waited(lambda: self._file and self._file.write(data))
        except OSError as error:
            message = f"the body cannot be kept until its model is known ({error.strerror})"
            raise DiskFull.because(message) from error

    def _read_back(self) -> bytes:
        return self._file.read(_PIECE_BYTES) if self._file is not None else b""
