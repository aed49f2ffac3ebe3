"""Messages between host and keeper: JSON and handles over a named pipe. Standard library only.

A line is a message. A handle is copied into the process at the other end, and is written by number;
a text is written as it is: a pipe has no limit. By default only its user may write to a pipe.
"""

from __future__ import annotations

import _winapi
import base64
import contextlib
import ctypes
import hashlib
import json
import msvcrt
import os
from ctypes import wintypes
from typing import Final, Self

from orchestrator.base import windows
from orchestrator.base.windows import Pipe, kernel
from orchestrator.server.tree.port import Message, Part

_SEND_S: Final = 10.0
_COPY_HANDLES: Final = 0x40  # PROCESS_DUP_HANDLE
_READ_WRITE: Final = _winapi.GENERIC_READ | _winapi.GENERIC_WRITE
for _name in ("GetNamedPipeClientProcessId", "GetNamedPipeServerProcessId"):
    getattr(kernel, _name).argtypes = (wintypes.HANDLE, ctypes.POINTER(wintypes.ULONG))


class End:
    """One end of a pipe, before it is a channel.

    Attributes:
        pipe: To read and write.
    """

    def __init__(
        self, handle: int, connecting: _winapi.Overlapped | None = None, *, is_server: bool
    ) -> None:
        self.pipe: Pipe = Pipe(handle, connecting)
        self._is_server = is_server

    @classmethod
    def serve(cls, name: str) -> Self:
        """Return a new pipe's end. Raises OSError."""
        return cls(*windows.serve_pipe(name), is_server=True)

    @classmethod
    def to(cls, name: str) -> Self:
        """Return the other end. Raises OSError."""
        handle = windows.open_pipe(name, _READ_WRITE, _winapi.FILE_FLAG_OVERLAPPED)
        return cls(handle, is_server=False)

    def peer(self) -> int | None:
        """Return the pid of the process that opened the other end."""
        found = wintypes.ULONG()
        of = "Client" if self._is_server else "Server"
        ask = getattr(kernel, f"GetNamedPipe{of}ProcessId")
        return found.value if ask(self.pipe.handle, ctypes.byref(found)) else None

    def close(self) -> None:
        self.pipe.close()


class Channel:
    """One end of a connection. Any thread may send; one receives."""

    def __init__(self, end: End) -> None:
        self._end = end
        self._partial = b""

    @classmethod
    def pair(cls) -> tuple[Self, End]:
        """Return an end, and what the other one is made of. Raises OSError."""
        name = windows.pipe_name()
        return cls(End.serve(name)), End.to(name)

    @classmethod
    def to(cls, path: str) -> Self:
        """Connect to the door of a slot's folder. Raises OSError."""
        return cls(End.to(door_name(path)))

    @property
    def fd(self) -> int:
        return self._end.pipe.handle

    def send(self, message: Message, parts: tuple[Part, ...] = ()) -> None:
        """Send a message with copies of its parts; raises OSError if nobody can receive it."""
        if not self._end.pipe.is_connected(_SEND_S):
            raise ConnectionError("nobody has come to the other end of a pipe")
        sent = [self._copied(part) for part in parts]
        line = json.dumps({**message, "parts": sent}).encode() + b"\n"
        self._end.pipe.write(line, _SEND_S)

    def _copied(self, part: Part) -> tuple[str, int | str]:
        if isinstance(part, bytes):
            return "text", base64.b64encode(part).decode()
        peer = self._end.peer()
        if peer is None:
            raise ConnectionError("the other end of a pipe is gone")
        kind, handle = (
            ("pipe", part) if windows.is_pipe(part) else ("file", msvcrt.get_osfhandle(part))
        )
        process = _winapi.OpenProcess(_COPY_HANDLES, False, peer)
        try:
            copy = _winapi.DuplicateHandle(
                _winapi.GetCurrentProcess(),
                handle,
                process,
                0,
                False,
                _winapi.DUPLICATE_SAME_ACCESS,
            )
        finally:
            _winapi.CloseHandle(process)
        return kind, copy

    def receive(self) -> list[tuple[Message, list[Part]]] | None:
        """Return what has arrived, each message with its parts; None at the end."""
        try:
            data = self._end.pipe.read()
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [_with_parts(json.loads(line)) for line in lines]

    def close(self) -> None:
        self._end.close()


def _with_parts(message: Message) -> tuple[Message, list[Part]]:
    parts: list[Part] = []
    for kind, value in message.pop("parts"):
        match kind:
            case "text":
                parts.append(base64.b64decode(value))
            case "pipe":
                parts.append(Pipe(value).handle)
            case _:
                parts.append(msvcrt.open_osfhandle(value, os.O_RDWR | os.O_BINARY))
    return message, parts


class Door:
    """Where the next owner connects.

    Attributes:
        fd: Ready when somebody has come.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle, self._connecting = windows.serve_pipe(name)
        self.fd: int = windows.add_source(self)

    @classmethod
    def at(cls, path: str) -> Self | None:
        """Return the door of a slot's folder; None where none can be."""
        with contextlib.suppress(OSError):
            return cls(door_name(path))
        return None

    def waits_on(self) -> int:
        return self._connecting.event

    def accept(self) -> tuple[End, int | None]:
        """Return who has come, and its pid; None if it is gone again."""
        come = End(self._handle, is_server=True)
        self._handle, self._connecting = windows.serve_pipe(self._name, is_first=False)
        return come, come.peer()

    def close(self) -> None:
        windows.remove_source(self.fd)
        Pipe(self._handle, self._connecting).close()


def can_listen() -> bool:
    """Return whether a door can be."""
    return True


def door_name(path: str) -> str:
    """Return the name of the pipe that stands for a path."""
    key = hashlib.sha256(os.path.normcase(os.path.abspath(path)).encode()).hexdigest()
    return rf"\\.\pipe\llama-orchestrator-{key[:32]}"
