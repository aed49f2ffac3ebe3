"""A claim on a slot that needs no file: a UNIX socket with an abstract name, see unix(7).

It refuses a second owner while the slot's folder is gone. The kernel frees the name with its last
descriptor. Such names belong to one network namespace, so processes of different containers are
told apart by the lock files alone; the mount namespace and the root are part of the name, because
containers that share a network may have different folders at the same path.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import sys
from pathlib import Path

from orchestrator.base import launch
from orchestrator.base.log import event_log
from orchestrator.server import process_table

if sys.platform != "win32":
    from orchestrator.server.tree.unix_channel import peer_of

_PENDING = 4096  # connections to ask for the holder, which accepts none
_log = event_log("orchestrator.server")


class NameTaken(Exception):
    """Another process of this user has the name, or this one has it already."""


def bind(directory: Path) -> int | None:
    """Take the name of a slot until the returned descriptor is closed; None where names cannot be.

    Raises:
        NameTaken: It is in use.
    """
    if sys.platform != "linux":
        return None
    bound = None
    try:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bound.bind(_address(directory))
        bound.listen(_PENDING)
    except OSError as error:
        if bound is not None:
            bound.close()
        if error.errno == errno.EADDRINUSE and _credentials(directory)[1] in (None, os.getuid()):
            raise NameTaken from error
        _log("warning", "slot.name_unavailable", directory=str(directory), error=str(error))
        return None
    return launch.beyond_streams(bound.detach())


def holder(directory: Path) -> int | None:
    """Return the pid of the process that took the name, which may be gone; None if unknown."""
    return _credentials(directory)[0]


def _address(directory: Path) -> bytes:
    if sys.platform != "linux":
        raise NotImplementedError
    folder = repr((process_table.place(os.getpid()), os.fsencode(directory)))
    key = hashlib.sha256(folder.encode()).hexdigest()
    return f"\0llama-orchestrator/{os.getuid()}/{key}".encode()


def _credentials(directory: Path) -> tuple[int | None, int | None]:
    """Return the pid and the user of the holder: another user may have taken the name first."""
    if sys.platform == "linux":
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking,
        ):
            asking.setblocking(False)  # it is never accepted
            asking.connect(_address(directory))
            return peer_of(asking)
    return None, None
