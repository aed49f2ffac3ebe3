"""Windows: what can be waited for, by handle. Standard library only: the keeper imports it.

The numbers that are passed around are handles of events and processes, or of pipes, of which a read
is begun ahead: an anonymous pipe of Windows cannot be waited for.
"""

from __future__ import annotations

import _winapi
import contextlib
import ctypes
import math
import msvcrt
import os
import secrets
import socket
import threading
import time
from ctypes import wintypes
from typing import Any, BinaryIO, Final, Protocol

READABLE: Final = 1
WRITABLE: Final = 4
_READ_AHEAD: Final = 1 << 16
_LOOK_EVERY_S: Final = 0.02
_PENDING: Final = 997  # ERROR_IO_PENDING
_INCOMPLETE: Final = 996  # ERROR_IO_INCOMPLETE
_FD_EVENTS: Final = {READABLE: 0x01 | 0x20, WRITABLE: 0x02 | 0x10 | 0x20}  # FD_READ, FD_CLOSE, ...

kernel: Final[Any] = ctypes.WinDLL("kernel32", use_last_error=True)
kernel.CreateEventW.restype = wintypes.HANDLE
kernel.CreateEventW.argtypes = (ctypes.c_void_p, wintypes.BOOL, wintypes.BOOL, ctypes.c_void_p)
kernel.SetEvent.argtypes = kernel.ResetEvent.argtypes = (wintypes.HANDLE,)


class Source(Protocol):
    """What is not a handle that can be waited for, and knows one."""

    def waits_on(self) -> int: ...


_sources: Final[dict[int, Source]] = {}


def event(*, is_set: bool = False) -> int:
    """Return a new event, which stays set until it is reset."""
    return int(kernel.CreateEventW(None, True, is_set, None))


class Poll:
    """As `select.poll`: each result is a number that was registered, and that it is ready."""

    def __init__(self) -> None:
        self._sockets: dict[int, int] = {}
        self._registered: dict[int, None] = {}

    def register(self, source: int | socket.socket, mask: int) -> None:
        if isinstance(source, int):
            self._registered[source] = None
            return
        number = source.fileno()
        self._registered[number] = None
        self._sockets[number] = waited = event()
        ctypes.WinDLL("ws2_32").WSAEventSelect(
            ctypes.c_size_t(number), wintypes.HANDLE(waited), _FD_EVENTS[mask]
        )

    def unregister(self, number: int) -> None:
        del self._registered[number]

    def poll(self, timeout_ms: float | None = None) -> list[tuple[int, int]]:
        waits = {number: self._handle_of(number) for number in self._registered}
        most_ms = _winapi.INFINITE if timeout_ms is None else math.ceil(max(0.0, timeout_ms))
        if waits:
            handles = list(dict.fromkeys(waits.values()))
            _winapi.WaitForMultipleObjects(handles, False, most_ms)  # 64 at most, else ValueError
        elif timeout_ms is not None:
            time.sleep(most_ms / 1000)
        return [(number, READABLE) for number, handle in waits.items() if _is_set(handle)]

    def _handle_of(self, number: int) -> int:
        if number in self._sockets:
            return self._sockets[number]
        source = _sources.get(number)
        return number if source is None else source.waits_on()

    def __del__(self) -> None:
        for handle in self._sockets.values():
            _winapi.CloseHandle(handle)


def poll() -> Poll:
    return Poll()


def _is_set(handle: int) -> bool:
    return _winapi.WaitForSingleObject(handle, 0) == _winapi.WAIT_OBJECT_0


class Pipe:
    """An end of a pipe that can be read without waiting.

    Args:
        handle: Opened for overlapped use.
        connecting: Of a server's end, until its client has come.
    """

    def __init__(self, handle: int, connecting: _winapi.Overlapped | None = None) -> None:
        self.handle = handle
        self._connecting = connecting
        self._reading: _winapi.Overlapped | None = None
        self._has_ended = False
        _sources[handle] = self

    def waits_on(self) -> int:
        self._begin()
        if self._connecting is not None:
            return self._connecting.event
        return _ALWAYS if self._reading is None else self._reading.event

    def is_connected(self, within_s: float) -> bool:
        """Wait until the other end is there."""
        if self._connecting is not None:
            waited = _winapi.WaitForSingleObject(self._connecting.event, round(within_s * 1000))
            if waited != _winapi.WAIT_OBJECT_0:
                return False
            self._connecting = None
        return True

    def _begin(self) -> None:
        if self._reading is None and not self._has_ended and self.is_connected(0.0):
            try:
                self._reading, _ = _winapi.ReadFile(self.handle, _READ_AHEAD, overlapped=True)
            except OSError:
                self._has_ended = True

    def read(self) -> bytes:
        """Return what has arrived, nothing at the end; raises BlockingIOError."""
        self._begin()
        if self._reading is None:
            if self._has_ended:
                return b""
            raise BlockingIOError
        try:
            count, error = self._reading.GetOverlappedResult(False)
        except OSError:
            self._has_ended, self._reading = True, None
            return b""
        if error == _INCOMPLETE:
            raise BlockingIOError
        data = bytes(self._reading.getbuffer() or b"")[:count]
        self._reading = None
        return data

    def stop(self) -> bytes:
        """End the read that was begun; return what it has got nevertheless."""
        reading, self._reading = self._reading, None
        if reading is None:
            return b""
        reading.cancel()
        try:
            count, _ = reading.GetOverlappedResult(True)
        except OSError:
            return b""
        return bytes(reading.getbuffer() or b"")[:count]

    def write(self, data: bytes, within_s: float) -> None:
        """Write all of it; raises OSError if the other end is gone, or does not read."""
        writing, error = _winapi.WriteFile(self.handle, data, overlapped=True)
        if error == _PENDING:
            waited = _winapi.WaitForSingleObject(writing.event, round(within_s * 1000))
            if waited != _winapi.WAIT_OBJECT_0:
                writing.cancel()
        count, _ = writing.GetOverlappedResult(True)
        if count != len(data):
            raise BlockingIOError("the other end of a pipe does not read")

    def close(self) -> None:
        if _sources.pop(self.handle, None) is not None:
            self.stop()
            if self._connecting is not None and not _is_set(self._connecting.event):
                self._connecting.cancel()
                _ends_of(self._connecting)
            _winapi.CloseHandle(self.handle)


def _ends_of(operation: _winapi.Overlapped) -> None:
    with contextlib.suppress(OSError):
        operation.GetOverlappedResult(True)


def serve_pipe(name: str, *, is_first: bool = True) -> tuple[int, _winapi.Overlapped]:
    """Return a new end of a named pipe, and what waits for its client. Raises OSError."""
    first = _winapi.FILE_FLAG_FIRST_PIPE_INSTANCE if is_first else 0
    handle = _winapi.CreateNamedPipe(
        name,
        _winapi.PIPE_ACCESS_DUPLEX | _winapi.FILE_FLAG_OVERLAPPED | first,
        0,  # bytes, not messages
        _winapi.PIPE_UNLIMITED_INSTANCES,
        _READ_AHEAD,
        _READ_AHEAD,
        0,
        _winapi.NULL,
    )
    return handle, _winapi.ConnectNamedPipe(handle, overlapped=True)


def open_pipe(name: str, access: int, flags: int = 0) -> int:
    """Return the client's end of a named pipe. Raises OSError."""
    return _winapi.CreateFile(name, access, 0, _winapi.NULL, _winapi.OPEN_EXISTING, flags, 0)


def pipe_name() -> str:
    return rf"\\.\pipe\llama-orchestrator-{secrets.token_hex(16)}"


def pipe() -> tuple[int, int]:
    """Return a pipe's reading end, and a descriptor to write."""
    name = pipe_name()
    handle, connecting = serve_pipe(name)
    reading = Pipe(handle, connecting)
    try:
        writing = open_pipe(name, _winapi.GENERIC_WRITE)
    except OSError:
        reading.close()
        raise
    return handle, msvcrt.open_osfhandle(writing, os.O_BINARY)


def read(number: int, _most: int) -> bytes:
    """Read a pipe, as `os.read` does with a descriptor that does not block."""
    source = _sources[number]
    if not isinstance(source, Pipe):
        raise TypeError("not a pipe")
    return source.read()


def stop_reading(number: int) -> bytes:
    """Leave a pipe to another process; return what had been read ahead."""
    source = _sources.get(number)
    return source.stop() if isinstance(source, Pipe) else b""


def is_pipe(number: int) -> bool:
    return isinstance(_sources.get(number), Pipe)


def add_source(source: Source) -> int:
    """Return a number to wait for this by."""
    number = event()
    _sources[number] = source
    return number


def remove_source(number: int) -> None:
    del _sources[number]
    _winapi.CloseHandle(number)


def close(number: int) -> None:
    source = _sources.get(number)
    if isinstance(source, Pipe):
        source.close()
    else:
        _winapi.CloseHandle(number)


_ALWAYS: Final = event(is_set=True)


class Waker:
    """An event to wait on, as `posix_waker.Waker` is a pipe.

    Attributes:
        fd: Set once it is woken, until `clear`.
    """

    def __init__(self) -> None:
        self.fd: int = event()
        self._is_open = True
        self._guard = threading.Lock()  # a closed handle may be another event by now

    def wake(self) -> None:
        with self._guard:
            if self._is_open:
                kernel.SetEvent(self.fd)

    def wait(self, seconds: float, also: BinaryIO | None = None) -> tuple[bool, bool]:
        """Return (was woken, `also` is readable) after at most `seconds`."""
        ends = time.monotonic() + seconds
        while True:
            left_s = max(0.0, ends - time.monotonic())
            has_data = also is not None and _has_data(also)
            slice_s = 0.0 if has_data else left_s if also is None else min(left_s, _LOOK_EVERY_S)
            if woken := _winapi.WaitForSingleObject(self.fd, math.ceil(slice_s * 1000)) == 0:
                self.clear()
            if woken or has_data or left_s <= 0:
                return woken, has_data

    def clear(self) -> None:
        kernel.ResetEvent(self.fd)

    def close(self) -> None:
        with self._guard:
            self._is_open = False
            _winapi.CloseHandle(self.fd)


def _has_data(file: BinaryIO) -> bool:
    try:
        return bool(_winapi.PeekNamedPipe(msvcrt.get_osfhandle(file.fileno()), 0)[0])
    except OSError:  # the other end is gone
        return True
