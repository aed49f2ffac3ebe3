"""Messages between host and keeper: JSON and file descriptors over a UNIX socket.

Standard library only: the keeper imports it. A packet is a message where the platform has
SOCK_SEQPACKET; elsewhere a line of a stream is. Messages are short; a text goes along as a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import IO, Final, Self

from orchestrator.server.tree.port import Message, Part

_TYPE: Final = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_STREAM)
_LONGEST: Final = 1 << 16
_MOST_FDS: Final = 4
_LONGEST_PATH: Final = 107
_SOL_LOCAL: Final = 0
_LOCAL_PEERPID: Final = 2  # of macOS, which Python does not name
_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # `socket.recv_fds` ignores its flags


class Channel:
    """One end of a connection. Any thread may send; one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._partial = b""
        self._fds: list[int] = []
        end.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """Return an end, and the socket of the other one. Raises OSError."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, _TYPE)
        except OSError:  # macOS has the name, but not for UNIX sockets
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    @classmethod
    def to(cls, path: str) -> Self:
        """Connect to the socket at a path. Raises OSError."""
        end = socket.socket(socket.AF_UNIX, _TYPE)
        try:
            with _address(path) as address:
                end.connect(address)
        except OSError:
            end.close()
            raise
        return cls(end)

    @property
    def fd(self) -> int:
        return self._end.fileno()

    def send(self, message: Message, parts: tuple[Part, ...] = ()) -> None:
        """Send a message with copies of its parts; raises OSError if nobody can receive it."""
        data = json.dumps({**message, "fds": len(parts)}).encode() + b"\n"
        with contextlib.ExitStack() as opened:
            fds = [
                opened.enter_context(file_of(part)) if isinstance(part, bytes) else part
                for part in parts
            ]
            socket.send_fds(self._end, [data], fds)

    def receive(self) -> list[tuple[Message, list[Part]]] | None:
        """Return what has arrived, each message with its parts; None at the end."""
        try:
            data, fds = self._receive()
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._fds += fds
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [self._with_fds(json.loads(line)) for line in lines]

    def _receive(self) -> tuple[bytes, list[int]]:
        room = socket.CMSG_SPACE(_MOST_FDS * struct.calcsize("i"))
        data, controls, _, _ = self._end.recvmsg(_LONGEST, room, _CLOEXEC)
        fds = [fd for _, _, some in controls for (fd,) in struct.iter_unpack("i", some)]
        for fd in fds if not _CLOEXEC else ():
            os.set_inheritable(fd, False)
        return data, fds

    def _with_fds(self, message: Message) -> tuple[Message, list[Part]]:
        count = message.pop("fds")
        own, self._fds = self._fds[:count], self._fds[count:]
        return message, [*own]

    def close(self) -> None:
        self._end.close()
        while self._fds:
            os.close(self._fds.pop())


def can_listen() -> bool:
    """Return whether a door can be: who connects must be known, by SO_PEERCRED."""
    return hasattr(socket, "SO_PEERCRED")


class Door:
    """Where the next owner connects.

    Attributes:
        fd: Readable when somebody has come.
    """

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening

    @classmethod
    def at(cls, path: str) -> Self | None:
        """Return a door at a path; None where none can be."""
        if not can_listen():
            return None
        end = socket.socket(socket.AF_UNIX, _TYPE)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            with _address(path) as address:
                end.bind(address)
            os.chmod(path, 0o600)
            end.listen(1)
        except OSError:
            end.close()
            return None
        return cls(end)

    @property
    def fd(self) -> int:
        return self._listening.fileno()

    def accept(self) -> tuple[socket.socket, int | None]:
        """Return who has come, and its pid; None for another user's, or an unknown one."""
        end, _ = self._listening.accept()
        pid, uid = peer_of(end)
        return end, pid if uid in (None, os.geteuid()) else None

    def close(self) -> None:
        self._listening.close()


@contextlib.contextmanager
def _address(path: str) -> Iterator[str]:
    """Yield a name of a path that the kernel takes, which is 107 bytes at most. Raises OSError."""
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


@contextlib.contextmanager
def file_of(data: bytes) -> Iterator[int]:
    """Yield a descriptor of a file that is in memory only, or has no name where such files are not:
    what it holds may be secret.
    """
    with _nameless_file() as file:
        file.write(data)
        file.flush()
        yield file.fileno()


def _nameless_file() -> IO[bytes]:
    file: IO[bytes]
    if sys.platform == "linux":
        file = open(os.memfd_create("data"), "wb")  # noqa: SIM115 (of the caller)
    else:
        from tempfile import TemporaryFile

        file = TemporaryFile()  # noqa: SIM115
    return file


def peer_of(end: socket.socket) -> tuple[int | None, int | None]:
    """Return the pid and the user of the other end; None = unknown. Raises OSError."""
    pid, uid = None, None
    if sys.platform == "linux":
        pid, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    elif sys.platform == "darwin":
        pid = end.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID)
    return pid or None, uid
